"""A study: one YAML file that says what is asked, of what, over what, and with which means.  This is the door to it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from research import configfile
from research.errors import ConfigError
from sweeps.check import problems
from sweeps.definition import METRICS, Objective, Resources, Search, SimulatedCluster, Study, label, short_name
from sweeps.variants import with_dimension

__all__ = [
    "METRICS",
    "Objective",
    "Resources",
    "Search",
    "SimulatedCluster",
    "Study",
    "label",
    "load_study",
    "short_name",
]


def load_study(path: str | Path, overrides: Iterable[str] = (), *, here: bool = True) -> Study:
    """Read and check a study; ConfigError lists every mistake that was found, each with path, value and remedy.

    `here`: it is to run on this machine (not on a cluster that it is sent to), whose GPUs count.
    """
    mapping = with_dimension(_overridden(configfile.read_yaml(path), overrides))
    found = problems(mapping, str(path), here=here)
    if found:
        raise ConfigError(*found)
    return configfile.validate(Study, mapping, str(path))


def _overridden(mapping: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """--set on a study; what follows `space.` or `baseline.` is one key, itself a dotted path."""
    for override in overrides:
        section, _, rest = override.partition(".")
        path, equals, text = rest.partition("=")
        if section in ("space", "baseline") and equals and isinstance(mapping.get(section), dict):
            value = configfile.apply_overrides({}, [f"value={text}"])["value"]
            mapping = {**mapping, section: {**mapping[section], path.strip(): value}}
        else:
            mapping = configfile.apply_overrides(mapping, [override])
    return mapping
