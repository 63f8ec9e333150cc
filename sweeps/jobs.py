"""A study as a Ray job: what `ray job submit` does, with the study's home and commit handed along."""

import os
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

from research.errors import UserError
from sweeps.driver import _commit
from sweeps.study import home

STOP_WAIT_SECONDS = 60


def submit(study: Path, address: str, arguments: list[str], *, wait: bool) -> str:
    """Submit `python -m sweeps run STUDY` from this working directory; the submission id comes back.

    Works with a cluster's token authentication on or off: Ray writes the token on `ray start`, and
    RAY_AUTH_MODE=token lets the client find it.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415  (seconds)

    try:
        client = JobSubmissionClient(address)
        submission = client.submit_job(
            entrypoint=shlex.join([_python(address), "-m", "sweeps", "run", str(study), *arguments]),
            runtime_env={
                "working_dir": ".",
                "excludes": [".venv", ".git", ".moelab"],
                "env_vars": {"MOELAB_HOME": str(home()), "MOELAB_COMMIT": _commit(), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)},
            },
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); start one with `ray start --head`, "
            "or name its dashboard with --address; with token authentication export RAY_AUTH_MODE=token"
        ) from error
    if wait:
        for chunk in _tail(client, submission):
            print(chunk, end="", flush=True)
    return str(submission)


def _python(address: str) -> str:
    """This very Python where the cluster is on this machine; else the one that the cluster's nodes call `python`."""
    return sys.executable if urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1") else "python"


def _tail(client: object, submission: str) -> list[str]:
    import asyncio  # noqa: PLC0415

    async def read() -> list[str]:
        async for lines in client.tail_job_logs(submission):  # type: ignore[attr-defined]
            print(lines, end="", flush=True)
        return []

    return asyncio.run(read())
