"""Which sizes a benchmark measures: for a card, for a CPU, and quickly."""

import dataclasses
from dataclasses import dataclass

import torch

from research.config import ModelConfig
from research.errors import UserError
from research.presets import PRESETS, preset

SLICE = "deepseek-v2-lite-slice"
"""DeepSeek-V2-Lite with four of its 27 layers, one dense and three of experts: its shapes in a step that fits one card."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`grouped`: (experts, inputs, outputs) of the product; `training`: (batch size, sequence length) by model, largest that is tried."""

    product_size: int
    copy_bytes: int
    grouped: tuple[int, int, int]
    tokens_per_expert: tuple[int, ...]
    training: dict[str, tuple[int, int]]
    decode: tuple[str, ...]
    contexts: tuple[int, ...]
    decode_steps: int
    repeats: int


LITE_EXPERTS = (64, 2048, 2 * 1408)
QUICK = Plan(
    product_size=256,
    copy_bytes=2**24,
    grouped=(8, 64, 64),
    tokens_per_expert=(16,),
    training={"deepseek-v2-nano": (2, 64)},
    decode=("deepseek-v2-nano",),
    contexts=(32, 128),
    decode_steps=4,
    repeats=3,
)
CPU = Plan(
    product_size=1024,
    copy_bytes=2**28,
    grouped=(64, 320, 48),
    tokens_per_expert=(16, 64, 256),
    training={"deepseek-v2-nano": (8, 256), "deepseek-v2-mini": (4, 256)},
    decode=("deepseek-v2-nano", "deepseek-v2-mini"),
    contexts=(1024, 4096),
    decode_steps=16,
    repeats=5,
)
CUDA = Plan(
    product_size=8192,
    copy_bytes=2**32,
    grouped=LITE_EXPERTS,
    tokens_per_expert=(16, 64, 256, 1024),
    training={"deepseek-v2-mini": (32, 1024), "deepseek-v2-small": (16, 2048), SLICE: (8, 2048)},
    decode=("deepseek-v2-mini", "deepseek-v2-small", SLICE),
    contexts=(1024, 4096, 16384),
    decode_steps=32,
    repeats=7,
)
DEFAULT_TRAINING = (8, 1024)


def model_config(name: str) -> ModelConfig:
    """A preset, or SLICE."""
    if name == SLICE:
        return dataclasses.replace(preset("deepseek-v2-lite"), num_hidden_layers=4)
    return preset(name)


def make_plan(device: torch.device, names: list[str], *, quick: bool) -> Plan:
    """What to measure on `device`; `names` stand for the plan's own models.  UserError for a name that is no preset."""
    if unknown := [f"--preset = {name!r}: no such preset; valid: {', '.join([*PRESETS, SLICE])}" for name in names if name not in (*PRESETS, SLICE)]:
        raise UserError(*unknown)
    plan = QUICK if quick else CUDA if device.type == "cuda" else CPU
    if not names:
        return plan
    otherwise = QUICK.training["deepseek-v2-nano"] if quick else DEFAULT_TRAINING
    chosen = tuple(dict.fromkeys(names))
    return dataclasses.replace(plan, training={name: plan.training.get(name, otherwise) for name in chosen}, decode=chosen)
