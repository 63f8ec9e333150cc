"""What stands beside the claims: sizes of the models, corrections with computed values, published tables."""

from collections.abc import Mapping, Sequence

from reports.claims.published import PublishedModel, corrections, published, reference_tables
from reports.claims.rows import Row
from reports.document import Cell, Table, safe
from research import accounting as count
from research.presets import preset

CONTEXT = 4096


def model_table() -> Table:
    """Parameters, cache and FLOPs of each model, published beside ours."""
    head = ("model", "all, printed", "all, ours", "activated, printed", "activated, ours", "cached elements/token", "cache, 16 bits (kB/token)")
    return Table(
        name="models",
        caption="Sizes by one set of formulas",
        head=(*head, "training GFLOP/token", "GFLOP/token, printed", "printed in"),
        rows=tuple(_model_row(model) for model in published().models),
        note=f"Activated: without the input embedding, with the head. FLOPs: forward and backward, causal attention over {CONTEXT:,} positions. "
        "Cache of an encoder and decoder as of a decoder of as many layers.",
    )


def _model_row(model: PublishedModel) -> tuple[Cell, ...]:
    config = model.config()
    total, activated = count.total_parameters(config) / 1e9, count.activated_parameters(config) / 1e9
    elements = count.kv_cache_elements_per_token(config)
    kilobytes, flops = count.kv_cache_bytes_per_token(config) / 1e3, count.train_flops_per_token(config, CONTEXT) / 1e9
    return (
        model.name,
        model.total or "not printed",
        (f"{total:,.1f}B", total),
        model.activated or "not printed",
        (f"{activated:,.2f}B", activated),
        (f"{elements:,}", float(elements)),
        (f"{kilobytes:,.1f}", kilobytes),
        (f"{flops:,.1f}", flops),
        model.flops or "not printed",
        model.source,
    )


def correction_lines(rows: Sequence[Row]) -> list[str]:
    """What is said, what is right and where it stands; numbers from the models and from the rows."""
    values = _values({row.id: row.ours for row in rows if row.ours is not None and row.study is None})
    return [f"*“{safe(c.said)}”* {c.right.format(**values)} ({c.source})" for c in corrections()]


def _values(ours: Mapping[str, float]) -> dict[str, float | int | None]:
    v2, dense = preset("deepseek-v2"), preset("deepseek-67b")
    moe, attention = v2.moe, v2.attention
    assert moe is not None
    return {
        "chosen": moe.num_experts_per_tok,
        "experts": moe.n_routed_experts,
        "shared": moe.n_shared_experts,
        "limit": moe.device_limit,
        "devices": moe.expert_devices,
        "hidden": v2.hidden_size,
        "heads": attention.num_attention_heads,
        "latent": attention.kv_lora_rank,
        "rotary": attention.qk_rope_head_dim,
        "query": attention.q_lora_rank,
        "groups_67b": dense.attention.num_key_value_heads,
        "layers_67b": dense.num_hidden_layers,
        "same_bits": ours["kv-cut-same-bits"],
        "mha": ours["kv-cut-mha"],
        "flops": ours["cost-flops"],
        "residents": ours["residents"],
        "slower": 1 / ours["step-ratio"],
    }


def published_tables() -> list[Table]:
    """As the papers print them."""
    return [
        Table(
            name=table.name,
            caption=f"{table.title}: published, not recomputed",
            head=tuple(table.head),
            rows=tuple((safe(str(row[0])), *_cells(row[1:])) for row in table.rows),
            note=f"{table.source}.",
        )
        for table in reference_tables()
    ]


def _cells(row: Sequence[str | int | float]) -> tuple[Cell, ...]:
    """With as many decimals as the longest number of the row."""
    decimals = max((len(str(value).partition(".")[2]) for value in row if isinstance(value, float)), default=0)
    return tuple(value if isinstance(value, str) else (f"{value:.{decimals * isinstance(value, float)}f}", float(value)) for value in row)
