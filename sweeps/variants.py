"""Named variants: whole alternatives that no single setting tells apart (another preset, several widths at once).

Each is a mapping that is laid over the study's `base`; together they are one dimension of the space, `variant`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from research import configfile
from research.errors import ConfigError

VARIANT = "variant"
"""The dimension's path: no setting of a run configuration is called so."""
LONGEST = 60


def with_dimension(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A study's mapping with what its `variants` imply: a space of all of them, and the first as the baseline."""
    variants = mapping.get("variants")
    if not isinstance(variants, Mapping) or not variants:
        return dict(mapping)
    space, baseline = mapping.get("space", {}), mapping.get("baseline", {})
    if isinstance(space, Mapping) and VARIANT not in space:
        space = {VARIANT: list(variants), **space}
    if isinstance(baseline, Mapping) and VARIANT not in baseline:
        baseline = {VARIANT: next(iter(variants)), **baseline}
    return {**mapping, "space": space, "baseline": baseline}


def laid_over(base: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with a variant's values.  A preset named by either is a start: what both say beside it is laid over that."""
    model = variant.get("model")
    over = {**variant, "model": {"preset": model}} if isinstance(model, str) else variant
    under = {**base, "model": {"preset": base["model"]}} if isinstance(base.get("model"), str) else base
    return configfile.merge(under, over)


def sets(variants: Mapping[str, Any], path: str) -> bool:
    """Whether some variant has a value of its own at a dotted path of a run configuration; a preset has one everywhere in the model."""
    return any(_sets(variant, path.split(".")) for variant in variants.values())


def _sets(node: Any, keys: list[str]) -> bool:
    if not isinstance(node, Mapping):
        return True
    if not keys:
        return bool(node)
    model = node.get("model")
    if keys[0] == "model" and (isinstance(model, str) or (isinstance(model, Mapping) and "preset" in model)):
        return True
    return keys[0] in node and _sets(node[keys[0]], keys[1:])


def problems(mapping: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a study's `variants`, each by itself; the space's and the baseline's use of them included."""
    variants = mapping.get("variants", {})
    space, baseline, base = (_section(mapping, key) for key in ("space", "baseline", "base"))
    if not isinstance(variants, Mapping):
        yield f"variants = {variants!r}: expected a mapping of names to what is laid over base, such as {{dense: {{model: dense-nano}}}}"
        return
    if not variants and VARIANT in {*space, *baseline}:
        yield f"{'space' if VARIANT in space else 'baseline'}.{VARIANT}: the study has no variants: say what each is under variants"
    for name, variant in variants.items():
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST or not name.isprintable():
            yield f"variants.{name}: a name must be 1 to {LONGEST} printable characters (quote a number or yes/no)"
        elif not isinstance(variant, Mapping):
            yield f"variants.{name} = {variant!r}: expected a mapping that is laid over base; {{}} for base itself"
        else:
            yield from _own_problems(name, variant, base)
    yield from (
        f"space.{path}: is searched and set by variants at once; take it out of one of them"
        for path in space
        if path != VARIANT and _named(variants, str(path))
    )


def _section(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}


def _own_problems(name: str, variant: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[str]:
    if "seed" in variant:
        yield f"variants.{name}.seed = {variant['seed']!r}: seeds are the study's own (seeds)"
        return
    try:
        configfile.load_run_config(base)
    except ConfigError:
        return  # told of as the base's
    try:
        configfile.load_run_config(laid_over(base, variant), f"variants.{name}")
    except ConfigError as error:
        yield from error.problems


def _named(variants: Mapping[str, Any], path: str) -> bool:
    """Whether some variant names a path itself; a preset's values may be searched over."""
    for variant in variants.values():
        node: Any = variant
        for key in path.split("."):
            node = node[key] if isinstance(node, Mapping) and key in node else None
        if node is not None:
            return True
    return False
