"""Runs to and from a folder as Hugging Face's `from_pretrained` reads it: config.json, model.safetensors, tokenizer.json.

Both directions write beside the target and rename: it is there whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from research.config import AttentionConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig, config_id, to_dict
from research.data.prepare import prepare
from research.data.tokenizer import END_OF_TEXT
from research.errors import CheckpointError, ConfigError, UserError
from research.model.huggingface import check_hf_state_dict, config_from_hf, config_to_hf, load_hf_state_dict, to_hf_state_dict
from research.model.transformer import Transformer
from research.training.checkpoint import FORMAT, load_model, save_weights

IMPORTED = "imported"
"""data.corpus of a run that was trained elsewhere: no corpus has that name, the run's tokenizer.json stands for it."""


def run_tokenizer(run: Path, config: RunConfig) -> Tokenizer:
    """The tokenizer of a run directory (or its checkpoint folder): tokenizer.json there, else that of its corpus."""
    folders = (run, run.parent) if run.name == "checkpoint" else (run,)
    file = next((f / "tokenizer.json" for f in folders if (f / "tokenizer.json").exists()), None)
    if file is not None:
        return read_tokenizer(file)
    if config.data.corpus == IMPORTED:
        raise CheckpointError(f"{run}: was imported without a tokenizer; put the model's tokenizer.json there")
    return prepare(config.data).tokenizer()


def read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json; CheckpointError when it is none."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file}: is no tokenizer ({error})") from error


def export_run(run: Path, out: Path) -> None:
    """Write the model and tokenizer of `run` to the folder `out`, with the tensor names of the published checkpoints.

    UserError when `out` is there and not empty; ConfigError for what that architecture cannot say.
    """
    _refuse_taken(out)
    model, config = load_model(run)
    _refuse_odd_offsets(config.model.attention)
    about = config_to_hf(config.model, max_position_embeddings=config.data.sequence_length)
    tokenizer = run_tokenizer(run, config)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": about["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **({"eos_token": END_OF_TEXT} if end is not None else {}),
    }
    with _whole_folder(out) as folder:
        _write_json(folder / "config.json", {**about, "eos_token_id": end, "torch_dtype": "float32", "use_cache": True})
        _write_json(folder / "generation_config.json", {"eos_token_id": end, "do_sample": True, "temperature": 0.8, "top_p": 0.95})
        _write_json(folder / "tokenizer_config.json", tokens)
        tokenizer.save(str(folder / "tokenizer.json"))
        # Copies, because the matrices of the experts are parts of one tensor, which the format does not hold.
        tensors = {name: tensor.clone() for name, tensor in to_hf_state_dict(model, per_expert=True).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _refuse_odd_offsets(attention: AttentionConfig) -> None:
    """transformers (5.23) views rotary parts as complex numbers where they lie: behind an odd width it raises in its first forward pass."""
    widths = {name: getattr(attention, name) for name in ("qk_nope_head_dim", "kv_lora_rank")}
    odd = [f"attention.{name} = {width}: transformers can only run even widths" for name, width in widths.items() if width % 2]
    if odd and attention.kind == "mla":
        raise ConfigError(*odd)


def import_run(source: Path, out: Path) -> RunConfig:
    """Make a run directory `out` of a folder with config.json and *.safetensors; its configuration.

    The run can generate and be exported; it has no corpus and no optimizer state, so it cannot be trained on.
    A tokenizer.json is taken along; without one the run is made too, but cannot generate text.
    UserError when `out` is there and not empty; ConfigError and CheckpointError list what is wrong with `source`.
    """
    _refuse_taken(out)
    about = _read_json(source / "config.json")
    architecture = config_from_hf(about, str(source / "config.json"))
    given = source / "tokenizer.json"
    tokenizer = read_tokenizer(given) if given.exists() else None
    config = _run_of(architecture, about, tokenizer, source)
    tensors = _read_tensors(source)
    try:
        with torch.device("meta"):
            blueprint = Transformer(architecture)
        check_hf_state_dict(blueprint, tensors)  # before a model of any size is allocated
        model = Transformer(architecture)
        load_hf_state_dict(model, tensors)
    except CheckpointError as error:
        raise CheckpointError(*(f"{source}: {problem}" for problem in error.problems)) from error
    state = {"format": FORMAT, "config_id": config_id(config), "config": to_dict(config), "step": 0, "seconds": 0.0, "metrics": {}}
    with _whole_folder(out) as folder:
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        save_weights(model, checkpoint / "model.safetensors")
        _write_json(checkpoint / "state.json", state)
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
    return config


def _run_of(model: ModelConfig, about: dict[str, Any], tokenizer: Tokenizer | None, source: Path) -> RunConfig:
    """A RunConfig around a model that comes from elsewhere: what is said of data and training is the least that is valid."""
    words = tokenizer.get_vocab_size() if tokenizer is not None else model.vocab_size
    if words > model.vocab_size:
        raise ConfigError(f"{source}/tokenizer.json: has {words} tokens, more than vocab_size ({model.vocab_size}) of config.json")
    positions = model.attention.yarn.original_max_position_embeddings if model.attention.yarn else about.get("max_position_embeddings", 0)
    try:
        data = DataConfig(
            corpus=IMPORTED,
            tokenizer_vocab_size=min(max(words, 260), model.vocab_size),
            sequence_length=positions if isinstance(positions, int) and positions >= 2 else DataConfig().sequence_length,
        )
        return RunConfig(model=model, data=data, training=TrainingConfig(train_tokens=1))
    except ValueError as error:
        raise ConfigError(f"{source}/config.json: vocab_size = {model.vocab_size}: a run needs at least 260 ({error})") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, expected an object of keys and values")
    return value


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read_tensors(source: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names, or of every *.safetensors."""
    index = source / "model.safetensors.index.json"
    if (source / "model.safetensors").exists():
        files = [source / "model.safetensors"]
    elif index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
        files = [source / Path(name).name for name in sorted(set(shards.values()))]
    else:
        files = sorted(source.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{source}: holds no weights (expected model.safetensors, or shards with model.safetensors.index.json)")
    tensors: dict[str, Tensor] = {}
    problems = []
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            problems.append(f"{file}: cannot be read ({error})")
    if problems:
        raise CheckpointError(*problems)
    return tensors


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not an empty folder; name another, or remove it")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, flushed and renamed onto it when the block ends without error."""
    out = out.absolute()
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        for file in (f for f in new.rglob("*") if f.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        new.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
