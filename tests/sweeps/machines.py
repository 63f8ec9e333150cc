"""What a test needs of machines, by means of the kernel.

Two machines out of one: network namespaces with a cable between them, made without any privilege where the kernel lets a user.
Both see the same files and processes; each has a loopback and an address of its own, as machines that share a disk have.

A machine with little memory: a control group, whose processes the kernel kills when they take more.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INSIDE = ("nsenter", "--user", "--net", "--preserve-credentials")


def _within(holder: int) -> list[str]:
    return [*INSIDE, f"--target={holder}"]


def _new_namespace(process: "subprocess.Popen[bytes]", seen: set[str]) -> str:
    """The network namespace of `process`, or of the program that it became, once it is none of those."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            if process.poll() is None and (found := os.readlink(f"/proc/{process.pid}/ns/net")) not in seen:
                return found
        time.sleep(0.02)
    raise OSError("no namespace was made")


@contextlib.contextmanager
def two_machines() -> Iterator[Callable[[int], list[str]]]:
    """`machine(0)` and `machine(1)` are what a command is begun with to run there; their addresses are ADDRESSES.  OSError where the kernel
    or its tools do not let a user do this."""
    holders: list[subprocess.Popen[bytes]] = []
    try:
        _make(holders)
        yield lambda number: _within(holders[number].pid)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _make(holders: list["subprocess.Popen[bytes]"]) -> None:
    """Two processes that do nothing but hold a namespace each, joined."""
    seen = {os.readlink("/proc/self/ns/net")}
    for command in (["unshare", "--user", "--map-root-user", "--net"], ["unshare", "--net"]):
        before = _within(holders[0].pid) if holders else []
        process = subprocess.Popen([*before, *command, "sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        holders.append(process)
        seen.add(_new_namespace(process, seen))
    first, second = (holder.pid for holder in holders)
    commands = [(first, f"ip link add name cable type veth peer name cable netns {second}")]
    for holder, address in ((first, ADDRESSES[0]), (second, ADDRESSES[1])):
        commands += [(holder, c) for c in ("ip link set lo up", f"ip addr add {address}/24 dev cable", "ip link set cable up")]
    for holder, command in commands:
        done = subprocess.run([*_within(holder), *command.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{command}: {done.stderr}")


@contextlib.contextmanager
def little_memory(limit: int) -> Iterator[Path]:
    """A control group of version 1 or 2 whose processes may have `limit` bytes; they join by their number in its `cgroup.procs`.  OSError
    where this user may make none."""
    for parent, name in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = parent / f"moelab-test-{os.getpid()}"
        try:
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text("+memory")
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / name).exists():
                continue
            (group / name).write_text(str(limit))
            yield group
            return
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()
    raise OSError("no control group with a limit of memory can be made here")
