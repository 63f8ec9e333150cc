"""Checkpoints: a folder with weights and optimizer state as safetensors and the rest as JSON; nothing is pickled.

In a run's directory the newest is checkpoint/; where the configuration keeps more, those before it are
checkpoints/step-N/ and the best is checkpoints/best/.  A checkpoint is written beside the old one and
takes its place by rename, so a crash at any moment leaves a whole one.

Batches, spared sequences and chance are functions of (seed, step): the step, and the tokens seen by then,
are all the state of the random numbers and of the position in the data that there is.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from research.atomic import room_for, sync
from research.config import RunConfig, config_id, differences, to_dict
from research.errors import CheckpointError
from research.model.transformer import Transformer
from research.parallel.sharding import ShardedAdamW, join_experts, own_experts
from research.parallel.world import ALONE, World
from research.training.health import Health

FORMAT = 2
"""2: health and the best validation are part of state.json."""


@dataclass(kw_only=True, slots=True)
class Resumed:
    """Where a run is: `step` steps taken, with the last metrics and the routing snapshots (step -> int16 (L, M, K)) so far."""

    step: int
    seconds: float
    metrics: dict[str, float]
    snapshots: dict[int, np.ndarray]
    health: Health = field(default_factory=Health)
    best: float | None = None
    """Lowest validation bits per byte so far."""

    def is_best(self, bits_per_byte: float) -> bool:
        """Whether a validation is the best so far; it is remembered."""
        if self.best is not None and bits_per_byte >= self.best:
            return False
        self.best = bits_per_byte
        return True


def save(
    directory: Path,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    config: RunConfig,
    state: Resumed,
    *,
    is_best: bool = False,
    world: World = ALONE,
) -> None:
    """Write `directory`, whole or not at all, and keep of those before it, and of the best, what the configuration says.

    DiskFull if there is no room for it: the half that was written is removed, the checkpoints that there are stay.  With several
    workers all have to call it and rank 0 writes: the same files, whatever their number.
    """
    weights, moments = _whole_weights(model, world), _optimizer_tensors(model, optimizer)
    if world.rank > 0:
        return
    new, old = directory.with_name(directory.name + ".new"), directory.with_name(directory.name + ".old")
    try:
        with room_for(directory, f"the checkpoint of step {state.step}"):
            _write(new, weights, moments, config, state)
            if is_best:
                _link(new, directory.with_name(directory.name + "s") / "best")
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    tidy(directory, config.training.keep_checkpoints)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    sync(directory.parent)
    tidy(directory, config.training.keep_checkpoints)


def tidy(directory: Path, keep: int) -> None:
    """Finish what a crash left half done around `directory`, and what a save leaves to do: the one before is kept or goes."""
    old, kept = directory.with_name(directory.name + ".old"), directory.with_name(directory.name + "s")
    if old.exists() and directory.exists():
        _retire(old, kept, keep - 1)
    elif old.exists():
        old.rename(directory)


def _write(folder: Path, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], config: RunConfig, state: Resumed) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    save_file(moments, folder / "optimizer.safetensors")
    save_arrays({str(step): ids for step, ids in state.snapshots.items()}, folder / "snapshots.safetensors")
    about = {
        "format": FORMAT,
        "config_id": config_id(config),
        "config": to_dict(config),
        "step": state.step,
        "tokens": config.schedule.tokens(state.step),
        "seconds": state.seconds,
        "best": state.best,
        "metrics": state.metrics,
        "health": state.health.to_dict(),
    }
    (folder / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _link(folder: Path, target: Path) -> None:
    """`target` as a second name of the files in `folder`, which are never written again; as a copy where the disk has no links."""
    new, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for file in folder.iterdir():
        try:
            os.link(file, new / file.name)
        except OSError:
            shutil.copyfile(file, new / file.name)
            sync(new / file.name)
    sync(new)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _retire(old: Path, kept: Path, count: int) -> None:
    """The checkpoint that was replaced joins the `count` last ones before the newest; what is beyond them goes."""
    if count > 0 and (step := _step(old)) is not None:
        place = kept / f"step-{step:06d}"
        shutil.rmtree(place, ignore_errors=True)
        kept.mkdir(exist_ok=True)
        old.rename(place)
        sync(kept)
    shutil.rmtree(old, ignore_errors=True)
    earlier = sorted(kept.glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
    for folder in earlier[: max(len(earlier) - count, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int | None:
    """Of a checkpoint that may be another version's; None if that cannot be told."""
    try:
        return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError):
        return None


def save_weights(model: Transformer, file: Path) -> None:
    """The model's tensors under its own names."""
    save_file(_whole_weights(model, ALONE), file)


def _whole_weights(model: Transformer, world: World) -> dict[str, torch.Tensor]:
    """Of all experts; a tied head is a copy: the format holds no tensor under two names."""
    weights = {name: tensor.contiguous() for name, tensor in join_experts(model.state_dict(), model, world).items()}
    if world.size > 1:
        # Parameters are views of one buffer there, which the format would take for shared memory.
        weights = {name: tensor.clone() for name, tensor in weights.items()} if world.rank == 0 else weights
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    return weights


def load(directory: Path, model: Transformer, optimizer: torch.optim.AdamW, config: RunConfig) -> Resumed | None:
    """Fill model and optimizer from `directory`; None when there is none.

    CheckpointError if it is of another configuration (the differing keys are listed), another format, or damaged.
    """
    folder = _whole(directory)
    if folder is None:
        return None
    about = read_state(folder)
    if about.get("config_id") != config_id(config):
        raise CheckpointError(f"{folder}: is of another configuration; differing: {'; '.join(differences(about.get('config'), to_dict(config)))}")
    tidy(directory, config.training.keep_checkpoints)
    folder = directory
    try:
        device = model.lm_head.weight.device
        model.load_state_dict(own_experts(load_file(folder / "model.safetensors", device=str(device)), model))
        tensors = load_file(folder / "optimizer.safetensors", device=str(device))
        snapshots = {int(step): ids for step, ids in load_arrays(folder / "snapshots.safetensors").items()}
        if isinstance(optimizer, ShardedAdamW):
            optimizer.take({p: name for name, p in model.named_parameters()}, tensors, model, about["step"])
        else:
            _take_moments(model, optimizer, tensors, about["step"])
        return Resumed(
            step=about["step"],
            seconds=about["seconds"],
            metrics=about["metrics"],
            snapshots=dict(sorted(snapshots.items())),
            health=Health.from_dict(about["health"]),
            best=about["best"],
        )
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
        kept = sorted(directory.with_name(directory.name + "s").glob("*/state.json"))
        others = f", or put an earlier one in its place: {', '.join(str(path.parent) for path in kept)}" if kept else ""
        raise CheckpointError(f"{folder}: is damaged ({error}); remove it to start this run again{others}") from error


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
        raise CheckpointError(
            f"{folder}: is a checkpoint of format {about.get('format')}, this version reads {FORMAT}: use the version that wrote it, or train again"
        )
    return about


def _whole(directory: Path) -> Path | None:
    """`directory`, or the old one that a crash between two renames left beside it."""
    old = directory.with_name(directory.name + ".old")
    return next((d for d in (directory, old) if (d / "state.json").exists()), None)


def _take_moments(model: Transformer, optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor], step: int) -> None:
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device if parameter.is_cuda else "cpu"),
            "exp_avg": tensors[f"{name}.exp_avg"],
            "exp_avg_sq": tensors[f"{name}.exp_avg_sq"],
        }


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    if isinstance(optimizer, ShardedAdamW):
        moments = optimizer.moments({p: name for name, p in model.named_parameters()}, model)
        return {name: tensor.clone() for name, tensor in moments.items()} if optimizer.world.rank == 0 else {}
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in ("exp_avg", "exp_avg_sq")
    }
