"""The door: YAML and `--set` in, frozen configurations out, every mistake named at once.

Types and unknown keys are pydantic's work over the very dataclasses of `config`; this module turns
its errors into sentences with the path, the value and the nearest valid key.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
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


_Unique.add_implicit_resolver(  # YAML 1.1 takes 1e-3 and 2.5e4 for words; everybody else takes them for numbers
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value in a YAML text; ValueError, in one line with line and column, if it is none."""
    try:
        value = yaml.load(text, _Unique)
        if _contains_itself(value, ()):
            raise ValueError("an anchor contains itself")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        said = ", ".join(filter(None, (error.context, error.problem)))
        tab = "; YAML is indented with spaces" if "'\\t'" in said else ""
        raise ValueError(f"{where}{said}{tab}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return value


def _contains_itself(value: Any, around: tuple[int, ...]) -> bool:
    if id(value) in around:
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_contains_itself(item, (*around, id(value))) for item in items)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError, with line and column where there are such, if it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if value is None:
        raise ConfigError(f"{path}: is empty, expected a mapping of keys to values")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}, expected a mapping of keys to values")
    return value


def validate(cls: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """`mapping` as a `cls`; ConfigError lists every mistake as `source: path = value: sentence`.

    A value of the wrong type hides what only makes sense together, so what was found is put aside and the rest is
    looked at again.
    """
    rest = _copy(mapping)
    problems = [f"{source}: {sentence}" for sentence in _misread(cls, rest)]
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
    if problems:
        raise ConfigError(*_joined(problems))
    return value


ROUNDS = 4


def _misread(hint: Any, value: Any, path: str = "") -> Iterator[str]:
    """What YAML made of a word and no type refuses: true for a number, and keys that are no words; those are taken out."""
    if hint is None or hint is Any:
        return
    if isinstance(value, bool):
        kinds = {hint, *(typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ())}
        if kinds & {int, float} and not kinds & {bool, Any}:
            yield f"{path} = {value}: expected a number (YAML reads yes, on and true as {value})"
    elif isinstance(value, dict):
        owner = _dataclass_in(hint)
        for key in [key for key in value if owner and not (isinstance(key, str) and key)]:
            del value[key]
            read = " (YAML reads on, off, yes and no as true and false: quote it)" if isinstance(key, bool) else ""
            yield f"{path or '(whole)'}: the key {key!r} is no word{read}"
        hints = _hints(owner) if owner else {}
        others = typing.get_args(hint)[-1:] if typing.get_origin(hint) is dict else ()
        for key, item in value.items():
            yield from _misread(hints.get(key, *others or (None,)), item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _misread(next(iter(typing.get_args(hint)), None), item, f"{path}.{index}")


@functools.lru_cache(maxsize=256)
def _hints(owner: Any) -> dict[str, Any]:
    return typing.get_type_hints(owner)


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
        if not equals or not all(path.strip().split(".")):
            raise ConfigError(f"--set {override}: expected path=value, such as model.moe.device_limit=2")
        try:
            set_path(result, path.strip(), parse_yaml(text))
        except ValueError as error:
            raise ConfigError(f"--set {override}: {text!r} is not valid YAML: {error}") from error
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
    if not isinstance(name, str) or name not in PRESETS:
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
    message = _plain(cast(str, item["msg"]).removeprefix("Value error, "))
    if item["type"] == "value_error":
        return f"{source}: {path}: {message}" if path else f"{source}: {message}"
    return f"{source}: {path} = {value!r}: {message[0].lower() + message[1:]}"


def _plain(message: str) -> str:
    """pydantic's sentence in words of YAML."""
    message = re.sub(r"a (valid )?dictionary( or an instance of \w+)?", "a mapping of keys to values", message)
    return re.sub(r"a valid (tuple|list)", "a list", message)
