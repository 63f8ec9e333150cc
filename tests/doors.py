"""`python -m ROOM ...` as a process of its own, without the seconds that its imports take: a fork of this one, which has them already."""

import importlib
import os
import sys
import tempfile
import traceback
from pathlib import Path
from subprocess import CompletedProcess


def call(room: str, *arguments: object, cwd: Path | None = None, **environment: str) -> "CompletedProcess[str]":
    """Exit code and output of the room's `main`.  What a module reads of the environment when it is imported is this process's."""
    command = [f"{room}/__main__.py", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            _become(room, command, (out.fileno(), errors.fileno()), cwd, environment)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        errors.seek(0)
        return CompletedProcess(command, os.waitstatus_to_exitcode(status), out.read().decode(), errors.read().decode())


def _become(room: str, command: list[str], files: tuple[int, int], cwd: Path | None, environment: dict[str, str]) -> None:
    """In the fork: never comes back."""
    code = 1
    try:
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        os.environ.update(environment)
        os.chdir(cwd or Path.cwd())
        sys.argv = command
        importlib.import_module(f"{room}.__main__").main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
