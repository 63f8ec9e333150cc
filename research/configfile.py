"""The door: YAML and `--set` in, frozen configurations out, every mistake named at once.

Types and unknown keys are pydantic's work over the very dataclasses of `config`; this module turns
its errors into sentences with the path, the value and the nearest valid key.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from research.config import RunConfig
from research.errors import ConfigError
from research.presets import PRESETS, preset

T = TypeVar("T")


class _Unique(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is a mistake, not the second one's value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (mark, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands there twice", mark.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError with line and column if it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        value = yaml.load(text, _Unique)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}, expected a mapping of keys to values")
    return value


def validate(cls: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """`mapping` as a `cls`; ConfigError lists every mistake as `source: path = value: sentence`.

    A value of the wrong type hides what only makes sense together, so what was found is put aside and the rest is
    looked at again.
    """
    rest, problems = _copy(mapping), list[str]()
    gone, removed = set[tuple[str, ...]](), set[str]()
    for _ in range(ROUNDS):
        try:
            value = TypeAdapter(cls).validate_python(dict(rest))
        except ValidationError as error:
            items = error.errors()
        else:
            items = []
        items = [item for item in items if not (item["type"].startswith("missing") and _path(item) in gone)]
        sentences = [_sentence(cls, item, source) for item in items]
        problems += [sentence for sentence in sentences if sentence not in problems and not removed & set(re.findall(r"\w+", sentence))]
        taken = [path for item in items if not item["type"].startswith("missing") and _remove(rest, path := _path(item))]
        gone |= set(taken)
        removed |= {path[-1] for path in taken}
        if not taken:
            break
    if not problems:
        problems = [f"{source}: {path} = {given!r}: input should be a number, not true or false" for path, given in _booleans(value, mapping)]
    if problems:
        raise ConfigError(*_joined(problems))
    return value


ROUNDS = 4


def _booleans(value: Any, given: Any, path: str = "") -> list[tuple[str, bool]]:
    """Where `given` holds true or false and `value` made a number of it, which pydantic does without a word."""
    if isinstance(given, bool):
        return [(path, given)] if isinstance(value, int | float) and not isinstance(value, bool) else []
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(given, Mapping):
        # Keys of a dict may have become numbers, in the same order; those of a dataclass are its fields.
        made = value.values() if isinstance(value, Mapping) else [getattr(value, str(key), None) for key in given]
        pairs = [(key, one, item) for (key, item), one in zip(given.items(), made, strict=False)]
    elif isinstance(given, list | tuple) and isinstance(value, list | tuple):
        pairs = [(i, one, item) for i, (one, item) in enumerate(zip(value, given, strict=False))]
    return [found for key, one, item in pairs for found in _booleans(one, item, f"{path}.{key}" if path else str(key))]


def _remove(mapping: dict[str, Any], path: tuple[str, ...]) -> bool:
    """Take a key out of nested dicts; False if it is not there."""
    node: Any = mapping
    for key in path[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    return isinstance(node, dict) and bool(path) and node.pop(path[-1], _remove) is not _remove


def _joined(problems: list[str]) -> list[str]:
    """Two sentences about one value (it is neither of two types) as one."""
    joined: dict[str, str] = {}
    for problem in problems:
        head, _, message = problem.rpartition(": ")
        joined[head] = f"{joined[head]}, or {message}" if head in joined and joined[head] != message else message
    return [f"{head}: {message}" for head, message in joined.items()]


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of nested `mapping` with each `a.b.c=value` set; values are read as YAML."""
    result = _copy(mapping)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override}: expected path=value, such as model.moe.device_limit=2")
        try:
            set_path(result, path.strip(), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: {text!r} is not valid YAML") from error
    return result


def set_path(mapping: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path in nested dicts, in place; missing levels are made."""
    *parents, leaf = path.split(".")
    node = mapping
    for key in parents:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[leaf] = value


def load_run_config(mapping: Mapping[str, Any], source: str = "configuration", overrides: Iterable[str] = ()) -> RunConfig:
    """A RunConfig from a mapping in which `model` may name a preset.

    `model: deepseek-v2-nano`, or `model: {preset: deepseek-v2-nano, moe: {device_limit: 2}}`, starts
    from that preset and lays the other keys over it.
    """
    problems: list[str] = []
    try:
        model = resolve_model(mapping.get("model", {}), source)
    except ConfigError as error:
        # The rest is checked beside some model, so that all mistakes are told at once.
        problems += error.problems
        model = dataclasses.asdict(preset(next(iter(PRESETS))))
    try:
        config = validate(RunConfig, apply_overrides({**mapping, "model": model}, overrides), source)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error
    if problems:
        raise ConfigError(*problems)
    return config


def resolve_model(model: Any, source: str) -> dict[str, Any]:
    """The whole model mapping: a preset's values with the given keys laid over them."""
    if isinstance(model, str):
        model = {"preset": model}
    if not isinstance(model, Mapping):
        raise ConfigError(f"{source}: model = {model!r}: expected a preset's name or a mapping")
    rest = {key: value for key, value in model.items() if key != "preset"}
    if "preset" not in model:
        return _copy(rest)
    name = model["preset"]
    if name not in PRESETS:
        raise ConfigError(f"{source}: model.preset = {name!r}: no such preset{nearest(str(name), PRESETS)}")
    return merge(dataclasses.asdict(preset(name)), rest)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other; leaves and lists of `over` win."""
    result = _copy(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else _copy(value)
    return result


def known_paths(cls: Any, prefix: str = "") -> list[str]:
    """Every dotted leaf path of a configuration class."""
    paths: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        if name.startswith("_"):
            continue
        inner = _dataclass_in(hint)
        paths += known_paths(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return paths


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list | tuple) else value


def _dataclass_in(hint: Any) -> Any:
    """The dataclass inside `X`, `X | None` or `list[X]`, if there is one."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for inner in typing.get_args(hint) if (found := _dataclass_in(inner))), None)


def nearest(name: str, choices: Iterable[str]) -> str:
    names = list(choices)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(names))}"


TRIED = {"int", "float", "str", "bool", "none", "Range"}
"""What pydantic adds to a location to say which member of a union it means."""


def _path(item: Any) -> tuple[str, ...]:
    """The keys of the file that lead to a mistake, without pydantic's names of the types that it tried."""
    *before, last = map(str, item["loc"]) if item["loc"] else ("",)
    unknown = item["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    kept = [part for part in before if re.fullmatch(r"[\w. -]+", part) and part not in TRIED]
    return (*kept, *([last] if last and (unknown or (re.fullmatch(r"[\w. -]+", last) and last not in TRIED)) else []))


def _sentence(cls: Any, item: Any, source: str) -> str:
    location = list(_path(item))
    path = ".".join(location)
    value = item["input"]
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = cls
        for part in filter(lambda p: not p.isdigit(), location[:-1]):
            owner = _dataclass_in(typing.get_type_hints(owner).get(part)) if owner else None
        choices = [f.name for f in dataclasses.fields(owner)] if owner else []
        elsewhere = [known for known in known_paths(cls) if known.split(".")[-1] == location[-1]]
        hint = f"; did you mean {elsewhere[0]!r}?" if len(elsewhere) == 1 else nearest(location[-1], choices)
        return f"{source}: {path} = {value!r}: unknown key{hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{source}: {path}: is missing and has no default"
    message = cast(str, item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{source}: {path}: {message}" if path else f"{source}: {message}"
    return f"{source}: {path} = {value!r}: {message[0].lower() + message[1:]}"
