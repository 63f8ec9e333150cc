"""Checkpoints: a folder with weights and optimizer state as safetensors and the rest as JSON; nothing is pickled.

A checkpoint is written beside the old one and takes its place by rename, so a crash at any moment
leaves a whole one.  Batches and spared sequences are functions of (seed, step): the step is all the
state of the random numbers that there is.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from research.config import RunConfig, config_id, differences, to_dict
from research.errors import CheckpointError
from research.model.transformer import Transformer

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Where a run goes on: after `step`, with the routing snapshots (step -> int16 (L, M, K)) taken so far."""

    step: int
    seconds: float
    metrics: dict[str, float]
    snapshots: dict[int, np.ndarray]


def save(directory: Path, model: Transformer, optimizer: torch.optim.AdamW, config: RunConfig, state: Resumed) -> None:
    """Write `directory`, whole or not at all."""
    new, old = directory.with_name(directory.name + ".new"), directory.with_name(directory.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_weights(model, new / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), new / "optimizer.safetensors")
    save_arrays({str(step): ids for step, ids in state.snapshots.items()}, new / "snapshots.safetensors")
    about = {
        "format": FORMAT,
        "config_id": config_id(config),
        "config": to_dict(config),
        "step": state.step,
        "seconds": state.seconds,
        "metrics": state.metrics,
    }
    (new / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    for file in new.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def save_weights(model: Transformer, file: Path) -> None:
    """The model's tensors under its own names.  A tied head is written as a copy: the format holds no tensor under two names."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, file)


def load(directory: Path, model: Transformer, optimizer: torch.optim.AdamW, config: RunConfig) -> Resumed | None:
    """Fill model and optimizer from `directory`; None when there is none.

    CheckpointError if it is of another configuration (the differing keys are listed), another format, or damaged.
    """
    folder = _whole(directory)
    if folder is None:
        return None
    about = read_state(folder)
    if about["config_id"] != config_id(config):
        raise CheckpointError(f"{folder}: is of another configuration; differing: {'; '.join(differences(about['config'], to_dict(config)))}")
    try:
        device = model.lm_head.weight.device
        model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
        tensors = load_file(folder / "optimizer.safetensors", device=str(device))
        snapshots = {int(step): ids for step, ids in load_arrays(folder / "snapshots.safetensors").items()}
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(about["step"]), device=device if device.type == "cuda" else "cpu"),
                "exp_avg": tensors[f"{name}.exp_avg"],
                "exp_avg_sq": tensors[f"{name}.exp_avg_sq"],
            }
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: is damaged ({error}); remove it to start this run again") from error
    return Resumed(step=about["step"], seconds=about["seconds"], metrics=about["metrics"], snapshots=dict(sorted(snapshots.items())))


def load_model(directory: Path) -> tuple[Transformer, RunConfig]:
    """The trained model of a run directory (or of its checkpoint folder), on the CPU."""
    from research.configfile import load_run_config  # noqa: PLC0415  (presets -> configfile -> yaml: only where a file is read)

    folder = _whole(directory) or _whole(directory / "checkpoint")
    if folder is None:
        raise CheckpointError(f"{directory}: holds no checkpoint (expected state.json and model.safetensors there or in checkpoint/)")
    about = read_state(folder)
    if not isinstance(about.get("config"), dict):
        raise CheckpointError(f"{folder}/state.json: is damaged (it holds no configuration)")
    config = load_run_config(about["config"], str(folder / "state.json"))
    model = Transformer(config.model)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}/model.safetensors: is damaged ({error})") from error
    return model.eval(), config


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint folder."""
    try:
        about: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/state.json: cannot be read ({error})") from error
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint of format {about.get('format')}, this version reads {FORMAT}")
    return about


def _whole(directory: Path) -> Path | None:
    """`directory`, or the old one that a crash between two renames left beside it."""
    old = directory.with_name(directory.name + ".old")
    return next((d for d in (directory, old) if (d / "state.json").exists()), None)


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in ("exp_avg", "exp_avg_sq")
    }
