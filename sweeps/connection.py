"""To a Ray cluster that is there, or to a local Ray that ends with this process."""

import logging
import os
import secrets
from typing import Any

from research.errors import ConfigError

LOCAL_TRIES = 3


def token_of_its_own() -> None:
    """For the local Ray of this process, so that Ray leaves none in the user's home: with one there the next `ray start`
    would ask every client for it.  Ray reads the mode when it is imported."""
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def connect(ray: Any, address: str | None, group_cpus: int = 1) -> None:
    """To the cluster at `address` ($RAY_ADDRESS, which a Ray job has), else to a local one that ends with this process.

    `group_cpus`: those of one trial's workers together, which on this machine alone may share cores if it has fewer.
    ConfigError if none answers at `address`, or if no local one starts.
    """
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(f"RAY_ADDRESS = {address!r}: is a dashboard's address, for `python -m sweeps submit`; `run` needs host:port or auto")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    place: dict[str, Any] = {"address": address}
    if not address:
        # "local", not Ray's own guess: that is the last cluster that was started here, dead or alive.
        place = {"address": "local", "include_dashboard": False}
        if group_cpus > (os.cpu_count() or 1):
            place["num_cpus"] = group_cpus
    for left in reversed(range(1 if address else LOCAL_TRIES)):
        try:
            ray.init(**place, log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as error:
            # Ray gives its own processes 30 s, after which it raises a plain Exception: too little on a machine that is busy.
            ray.shutdown()
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if address:
                raise ConfigError(f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({said})") from error
            if not left:
                raise ConfigError(f"no Ray of its own can be started here, in {LOCAL_TRIES} tries ({said}); `python -m sweeps doctor`") from error
