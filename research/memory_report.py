"""What `python -m research describe --memory` says: predicted bytes by part, and measured ones on request."""

from typing import Any

from rich.table import Table

from research import memory
from research.config import ModelConfig
from research.errors import ConfigError


def memory_report(
    model: ModelConfig, *, batch_size: int, micro_batch_size: int | None, sequence_length: int, bits: float, kernels: bool, measure: bool
) -> dict[str, Any]:
    """`memory.describe`; with `measure`, for the kernels that this machine has, and beside each peak that of a real step here.

    UserError for a micro-batch that does not divide the batch.
    """
    if micro_batch_size is not None and batch_size % micro_batch_size:
        raise ConfigError(f"--micro-batch-size = {micro_batch_size}: must divide --batch-size = {batch_size}")
    if measure:
        from research.training.measured_memory import kernels_in_use, measured_step_bytes  # noqa: PLC0415  (torch: seconds, and only this needs it)

        kernels = kernels_in_use()
    found = memory.describe(
        model, batch_size=batch_size, micro_batch_size=micro_batch_size, sequence_length=sequence_length, bits=bits, kernels=kernels
    )
    if measure:
        for choice, step in found["training"].items():
            step["measured_peak"] = measured_step_bytes(
                model, batch_size, sequence_length, micro_batch_size=micro_batch_size, checkpointed=choice == "blocks"
            )
    return found


def memory_table(name: str, found: dict[str, Any]) -> Table:
    """A row for each part in MB, a column for each choice of `training.activation_checkpointing`, and one for decoding."""
    columns = {f"training, {choice}": _flat(step) for choice, step in found["training"].items()} | {"decoding": found["decoding"]}
    shape = f"{found['batch_size']} x {found['sequence_length']} tokens, {found['micro_batch_size']} sequences at a time"
    table = Table("MB", *columns, title=f"{name}: memory in float32, {shape}; cache of {found['kv_bits']:g} bits")
    for row in sorted(dict.fromkeys(key for column in columns.values() for key in column), key=lambda row: "peak" in row):
        table.add_row(row, *(f"{column[row] / 1e6:,.1f}" if row in column else "" for column in columns.values()))
    return table


def _flat(step: dict[str, Any]) -> dict[str, int]:
    parts = {f"{key}: {kind}": part for key, value in step.items() if isinstance(value, dict) for kind, part in value.items()}
    return parts | {key: value for key, value in step.items() if not isinstance(value, dict)}
