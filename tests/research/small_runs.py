"""Runs of seconds on text of their own, for tests of the loop around the model."""

from pathlib import Path
from typing import Any

import yaml

from research.configfile import load_run_config, merge

MODEL = {
    "preset": "deepseek-v2-nano",
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 64,
    "attention": {"num_attention_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "expert_devices": 4, "device_limit": 2},
}
TRAINING = {
    "train_tokens": 12 * 8 * 32,
    "batch_size": 8,
    "record_every": 1,
    "validate_every": 4,
    "checkpoint_every": 2,
    "trace_every": 5,
    "validation_tokens": 256,
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 4},
}


def write_text(folder: Path) -> Path:
    """A little text with something to learn in it."""
    path = folder / "text.txt"
    path.write_text("".join(f"the quick brown fox number {i * 7919 % 10007} jumps over {i * i % 97} lazy dogs\n" for i in range(2000)))
    return path


def mapping(text: Path, **changes: Any) -> dict[str, Any]:
    """A run's configuration as YAML has it; `changes` are merged over it."""
    data = {"corpus": "files", "paths": [str(text)], "tokenizer_vocab_size": 270, "sequence_length": 32}
    return merge({"model": MODEL, "data": data, "training": TRAINING}, changes)


def config(text: Path, **changes: Any):
    return load_run_config(mapping(text, **changes))


def write_config(path: Path, text: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(mapping(text, **changes)))
    return path
