"""From options, files and `--set` to a `TrainingStep`, every mistake as one sentence."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from research.config import ModelConfig, MoEConfig
from research.configfile import apply_overrides, known_paths, nearest, read_yaml, resolve_model, validate
from research.errors import ConfigError
from research.presets import PRESETS
from sims.training.spec import TrainingStep

SOURCE = "training-step"


def training_step_spec(mapping: Mapping[str, Any], overrides: Iterable[str] = ()) -> TrainingStep:
    """The question.  `mapping["model"]` is a preset, the path of a model or run in YAML, or a mapping.

    `--set` takes fields of the question (`schedule=1f1b`), of the model by their path (`model.moe.device_limit=2`), and those of
    its experts by name alone, too (`device_limit=2`, `routing.device_limit=2`).
    """
    given = list(overrides)
    model = dict(mapping).get("model", "deepseek-v2")
    for override in given:
        path, _, value = override.partition("=")
        if path.strip() == "model":
            model = value.strip()
    rest = [_whole_path(override) for override in given if override.partition("=")[0].strip() != "model"]
    return validate(TrainingStep, apply_overrides({**mapping, "model": _model(model)}, rest), SOURCE)


def _model(model: Any) -> dict[str, Any]:
    if not isinstance(model, str) or model in PRESETS:
        return resolve_model(model, SOURCE)
    if not Path(model).is_file():
        raise ConfigError(f"{SOURCE}: model = {model!r}: no such preset or file{nearest(model, PRESETS)}")
    content = read_yaml(model)
    return resolve_model(content.get("model", content), model)


def _whole_path(override: str) -> str:
    """`device_limit=2` as `model.moe.device_limit=2`; ConfigError for a name that is none."""
    path, equals, value = override.partition("=")
    name = path.strip()
    if not equals or name.partition(".")[0] in ("model", "speed", "nic", "nvlink", "constants"):
        return override
    leaf = name.removeprefix("routing.")
    experts, own = ([field.name for field in fields(cls)] for cls in (MoEConfig, TrainingStep))
    if leaf in experts and name not in own:
        return f"model.moe.{leaf}={value}"
    if name not in own:
        choices = [*own, *experts, *(f"model.{p}" for p in known_paths(ModelConfig))]
        raise ConfigError(f"{SOURCE}: --set {name} = {value!r}: unknown key{nearest(name, choices)}")
    return override
