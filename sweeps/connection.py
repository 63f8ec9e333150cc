"""To a Ray cluster that is there, or to a local Ray that ends with this process."""

import contextlib
import logging
import os
import secrets
from typing import Any

from research.errors import ConfigError

LOCAL_TRIES = 3
QUIET = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_raylet_report_resources_period_milliseconds": "2000",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
    "RAY_memory_monitor_refresh_ms": "1000",
}
"""Of a local Ray's own processes: no metrics and no list of tasks, which nobody reads, and slower looks at its one node (by default
four to ten times a second)."""


def settings_of_its_own() -> None:
    """For the local Ray of this process, to be made before Ray is imported, which reads them then.

    A token, so that Ray leaves none in the user's home: with one there the next `ray start` would ask every client for it.  QUIET,
    since every core here has a worker; what the user has set stays.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
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
            if not address:
                _end_idle_services()
            return
        except Exception as error:
            # Ray gives its own processes 30 s, after which it raises a plain Exception: too little on a machine that is busy.
            ray.shutdown()
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if address:
                raise ConfigError(f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({said})") from error
            if not left:
                raise ConfigError(f"no Ray of its own can be started here, in {LOCAL_TRIES} tries ({said}); `python -m sweeps doctor`") from error


def _end_idle_services() -> None:
    """End what a local Ray starts for others: its reader of log files, its autoscaler and its dashboard's server take 1.5 % of a
    core for nothing, and every core here has a worker.  Ray has no public setting for it; without these names they stay."""
    with contextlib.suppress(ImportError, AttributeError, AssertionError):
        from ray._private.worker import _global_node as node  # noqa: PLC0415

        for end in (node.kill_log_monitor, node.kill_monitor, node.kill_dashboard):  # type: ignore[attr-defined]
            end(check_alive=False)
