"""A study as a Ray job: what `ray job submit` does, with the study's home and commit handed along."""

import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from research.errors import UserError
from sweeps.driver import commit
from sweeps.places import home

STOP_WAIT_SECONDS = 60
"""Between `ray job stop` and the kill, for checkpoints; Ray's own is 3."""
HANDED_ALONG = ("MLFLOW_TRACKING_URI", "MOELAB_CACHE")


class Job:
    """A submitted study.  `follow` prints its output and gives the driver's exit code."""

    def __init__(self, client: Any, submission: str) -> None:
        self._client, self.submission = client, submission

    def follow(self, to: TextIO) -> int:
        async def read() -> None:
            async for lines in self._client.tail_job_logs(self.submission):
                print(lines, end="", flush=True, file=to)

        asyncio.run(read())
        code = self._client.get_job_info(self.submission).driver_exit_code
        return 1 if code is None else int(code)


def submit(study: Path, address: str, arguments: list[str]) -> Job:
    """Start `python -m sweeps run STUDY` on the cluster, with this working directory.

    Works with a cluster's token authentication on or off: a token that Ray has left in the user's home is
    sent.  UserError if no cluster answers, or if one on another machine could not see the study's file.
    """
    here = urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
    inside = study.absolute().is_relative_to(Path.cwd())
    if not here and not inside:
        raise UserError(f"{study}: lies outside of {Path.cwd()}, which is all that the cluster at {address} gets; submit from a folder above it")
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415  (seconds)

    variables = {"MOELAB_HOME": str(home()), "MOELAB_COMMIT": commit(), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)}
    variables |= {name: os.environ[name] for name in HANDED_ALONG if name in os.environ}
    path = study.absolute().relative_to(Path.cwd()) if inside else study.absolute()
    # This very Python where the cluster is on this machine; else the one that the cluster's nodes call `python`.
    python = sys.executable if here else "python"
    try:
        client = JobSubmissionClient(address)
        submission = client.submit_job(
            entrypoint=shlex.join([python, "-m", "sweeps", "run", str(path), *arguments]),
            runtime_env={"working_dir": ".", "excludes": [".venv", ".git", ".moelab"], "env_vars": variables},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); start one with `ray start --head`, "
            "or name its dashboard with --address; with token authentication export RAY_AUTH_MODE=token"
        ) from error
    return Job(client, str(submission))
