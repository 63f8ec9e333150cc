"""A headless Chromium over its DevTools protocol: enough to open a page, measure it and press its keys."""

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0")  # fmt: skip
START_SECONDS = 60


def executable():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def running():
    """The DevTools address of a browser of its own profile."""
    # Its helpers write into the profile for a moment after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [executable(), *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            place, until = Path(profile) / "DevToolsActivePort", time.monotonic() + START_SECONDS
            while not (place.exists() and len(place.read_text().splitlines()) == 2):
                assert process.poll() is None, f"{executable()} ended with {process.returncode}"
                assert time.monotonic() < until, "the browser does not answer"
                time.sleep(0.05)
            port, path = place.read_text().splitlines()
            yield f"ws://127.0.0.1:{port}{path}"
        finally:
            process.terminate()
            process.wait(20)


class Page:
    """One tab: `requests` and `complaints` (console errors, uncaught exceptions) of all that it loaded."""

    def __init__(self, socket, session):
        self._socket, self._session, self._count = socket, session, 0
        self.requests, self.complaints, self._events = [], [], []

    async def send(self, method, **params):
        self._count += 1
        number = self._count
        await self._socket.send_json({"id": number, "method": method, "params": params, "sessionId": self._session})
        while True:
            answer = await self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    async def _next(self):
        message = json.loads((await self._socket.receive(timeout=60)).data)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        self._events.append(method)
        return message

    async def open(self, path, *, width, height=900, dark=False):
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.send(f"{domain}.enable")
        await self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self._events.clear()
        await self.send("Page.navigate", url=Path(path).absolute().as_uri())
        while "Page.loadEventFired" not in self._events:
            await self._next()

    async def do(self, script):
        """The value of a JavaScript expression (a promise is awaited)."""
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def press(self, key, code):
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}))


def visit(address, story):
    """Run `story(page)`, a coroutine function, in a new tab of the browser at `address`."""

    async def tell():
        async with aiohttp.ClientSession() as client, client.ws_connect(address, max_msg_size=0) as socket:
            await socket.send_json({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}})
            while (made := json.loads((await socket.receive(timeout=60)).data)).get("id") != 1:
                pass
            await socket.send_json({"id": 2, "method": "Target.attachToTarget", "params": {"targetId": made["result"]["targetId"], "flatten": True}})
            while (attached := json.loads((await socket.receive(timeout=60)).data)).get("id") != 2:
                pass
            return await story(Page(socket, attached["result"]["sessionId"]))

    return asyncio.run(tell())
