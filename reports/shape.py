"""What a store's files must hold for a page to be made of them: types alone, since a file may have been edited, or cut off in its middle."""

from collections.abc import Mapping
from typing import Any

from sweeps import schema

LARGEST = 1e100
"""Numbers beyond have no squares, and no statistic is made of them."""
NUMBER, WHOLE, TEXT, FLAG, LIST, MAPPING = "a number", "a whole number", "a text", "true or false", "a list", "a mapping"
_TYPES: dict[str, tuple[type, ...]] = {NUMBER: (int, float), WHOLE: (int,), TEXT: (str,), FLAG: (bool,), LIST: (list,), MAPPING: (dict,)}

RUN = {
    "run": TEXT, "variant": TEXT, "seed": WHOLE, "trial": WHOLE, "baseline": FLAG, "parameters": MAPPING, "config_id": TEXT, "commit": TEXT,
}  # fmt: skip
SUMMARY = {"state": TEXT, "metrics": MAPPING, "versions": MAPPING, "tokens": NUMBER, "seconds": NUMBER}
STATE = {"state": TEXT, "versions": MAPPING, "planned": WHOLE}
STUDY = {
    "name": TEXT, "question": TEXT, "space": MAPPING, "seeds": LIST, "objectives": LIST, "search": MAPPING, "budget": MAPPING, "cluster": MAPPING,
    "expects": MAPPING,
}  # fmt: skip
CLUSTER = dict.fromkeys(("nodes", "gpus_per_node", "tokens_per_device", "hidden_size", "dispatch_bits", "combine_bits"), WHOLE)
SIZES = dict.fromkeys(("train_bytes", "train_tokens", "heldout_bytes", "heldout_tokens"), NUMBER)


def fits(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == FLAG or not isinstance(value, bool))


def wrong(value: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, str]:
    """A sentence for each key that is there, is not null, and is not what it must be."""
    return {
        key: f"{key} = {value[key]!r:.60}: expected {kind}"
        for key, kind in kinds.items()
        if value.get(key) is not None and not fits(value[key], kind)
    }


def study_problems(study: Mapping[str, Any]) -> list[str]:
    """What of a resolved study no page can be made of."""
    found = list(wrong(study, STUDY).values())
    found += [f"{key} = null: expected {STUDY[key]}" for key in ("name", "question", "space", "seeds") if key in study and study[key] is None]
    objectives = study.get("objectives")
    for entry in objectives if isinstance(objectives, list) else []:
        if not (isinstance(entry, dict) and isinstance(entry.get("metric"), str)):
            found.append(f"objectives: {entry!r:.60}: expected {{metric: NAME, direction: ...}}")
    space = study.get("space")
    for path, choices in space.items() if isinstance(space, dict) else ():
        if not isinstance(choices, list | dict):
            found.append(f"space.{path} = {choices!r:.60}: expected a list or a range")
    cluster = study.get("cluster")
    if isinstance(cluster, dict):
        found += [f"cluster.{text}" for text in wrong(cluster, CLUSTER).values()]
        found += [f"cluster: has no {key}" for key in ("file", *CLUSTER) if cluster.get(key) is None]
    return found


def config_problem(config: Mapping[str, Any]) -> str | None:
    """Why a resolved configuration cannot be one; None where it can."""
    sections = {**config, **(config["model"] if isinstance(config.get("model"), dict) else {})}
    kinds = {"model": MAPPING, "data": MAPPING, "training": MAPPING, "attention": MAPPING, "moe": MAPPING}
    return next(iter(wrong(sections, kinds).values()), None) or next(
        (f"has no {key}" for key in ("model", "data", "training") if key not in config), None
    )


def data_problem(data: Mapping[str, Any]) -> str | None:
    """Why the sizes and hashes of the text cannot be shown."""
    found = wrong(data, {"domains": MAPPING, "identity": MAPPING})
    if found:
        return next(iter(found.values()))
    for name, sizes in (data.get("domains") or {}).items():
        whole = isinstance(sizes, dict) and not wrong(sizes, SIZES) and all(sizes.get(key) is not None for key in SIZES)
        if not whole:
            return f"domains.{name} = {sizes!r:.60}: expected {', '.join(SIZES)}"
    hashes = (data.get("identity") or {}).get("archives") or (data.get("identity") or {}).get("files")
    if isinstance(hashes, dict) and (bad := next((name for name, value in hashes.items() if not isinstance(value, str)), None)):
        return f"identity: {bad} = {hashes[bad]!r:.60}: expected a SHA-256"
    return None


FILES = {schema.SUMMARY_FILE: SUMMARY, schema.STATE_FILE: STATE}
"""Files of which a wrong value counts as missing, while the rest stands."""
