"""`python -m research`: train a model, look at it, let it speak; without Ray or MLflow."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from research import accounting
from research.benchmark.cli import benchmark
from research.config import ModelConfig
from research.configfile import load_run_config, nearest, read_yaml
from research.data.cli import app as data_app
from research.errors import ConfigError, UserError
from research.evaluation.cli import evaluate
from research.memory_report import memory_report, memory_table
from research.presets import PRESETS, preset
from research.terminal import console
from research.training.cli import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(data_app, name="data")
app.command()(evaluate)
app.command()(benchmark)


@app.command()
def presets(
    family: Annotated[bool, typer.Option("--family", help="The scaled family beside DeepSeek-V2: which ratios are kept, which not")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """The models that have a name.  Example: python -m research presets --family"""
    rows = {name: _ratios(preset(name)) for name in FAMILY} if family else {name: _sizes(make()) for name, make in PRESETS.items()}
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if family:
        table = Table("of DeepSeek-V2", *(name.removeprefix("deepseek-") for name in rows), "kept")
        for quantity in next(iter(rows.values())):
            values = [row[quantity] for row in rows.values()]
            table.add_row(quantity, *map(_short, values), _kept(values))
    else:
        table = Table("preset", *next(iter(rows.values())), "what it is")
        for name, row in rows.items():
            table.add_row(name, *map(_short, row.values()), (PRESETS[name].__doc__ or "").splitlines()[0])
    console().print(table)


FAMILY = ("deepseek-v2", "deepseek-v2-small", "deepseek-v2-mini", "deepseek-v2-micro", "deepseek-v2-nano")


def _sizes(model: ModelConfig) -> dict[str, float]:
    return {
        "parameters": accounting.total_parameters(model),
        "activated": accounting.activated_parameters(model),
        "KV elements/token": accounting.kv_cache_elements_per_token(model),
    }


def _ratios(model: ModelConfig) -> dict[str, float]:
    """What the scaled family keeps of DeepSeek-V2, and what it cannot."""
    a, moe, d = model.attention, model.moe, model.hidden_size
    assert moe is not None
    return {
        "total": accounting.total_parameters(model),
        "d_c / (n_h d_h)": round(a.kv_lora_rank / (a.num_attention_heads * a.v_head_dim), 4),
        "n_h d_h / d": round(a.num_attention_heads * a.v_head_dim / d, 2),
        "d_c / d_h": a.kv_lora_rank / a.v_head_dim,
        "d_h^R / d_h": a.qk_rope_head_dim / a.v_head_dim,
        "d_c' / d_c": (a.q_lora_rank or 0) / a.kv_lora_rank,
        "devices D": moe.expert_devices,
        "limit M": moe.device_limit or moe.expert_devices,
        "experts/device": moe.experts_per_device,
        "K": moe.num_experts_per_tok,
        "shared : K": round(moe.n_shared_experts / moe.num_experts_per_tok, 3),
        "expert width / d": round(moe.moe_intermediate_size / d, 3),
        "dense FFN / d": round(model.intermediate_size / d, 2),
        "dense layers": moe.first_k_dense_replace,
        "gate scale 10/E": round(moe.routed_scaling_factor * 10 / moe.n_routed_experts, 3),
    }


def _kept(values: list[float]) -> str:
    """Of one ratio in the whole family, DeepSeek-V2 first and nano last."""
    if max(values) < 1.1 * min(values):
        return "yes" if len(set(values)) == 1 else "about"
    return "but for nano" if len(set(values[:-1])) == 1 else "no"


def _short(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:,g}"


@app.command()
def describe(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A preset's name, or a YAML file with a run configuration")],
    kv_bits: Annotated[float, typer.Option(min=1, max=64, help="Bits per cached element")] = 16,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Positions, causal; by default the file's, or 4096")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory of a training step and of decoding, by part")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --memory: sequences; by default the file's, or 8")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="With --memory: sequences per pass; by default the file's, or all")] = None,
    kernels: Annotated[bool, typer.Option(help="With --memory: with the compiled CPU kernels, or in plain PyTorch")] = True,
    measure: Annotated[bool, typer.Option("--measure", help="With --memory: also train for a step on this machine's CPU and count")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Parameters, cache, FLOPs and bytes of a model, in closed form.

    Example: python -m research describe deepseek-v2 --kv-bits 6 --json;
    python -m research describe deepseek-v2-nano --memory --batch-size 8 --sequence-length 256 --measure
    """
    if not math.isfinite(kv_bits):
        raise ConfigError(f"--kv-bits = {kv_bits}: expected a number of bits from 1 to 64")
    if Path(name).suffix in (".yaml", ".yml"):
        run = load_run_config(read_yaml(name), name)
        model, training = run.model, run.training
        sequence_length = sequence_length or run.data.sequence_length
        if batch_size is None:
            batch_size, micro_batch_size = training.batch_size, micro_batch_size or training.micro_batch_size
    elif name in PRESETS:
        model = preset(name)
    else:
        raise ConfigError(f"MODEL = {name!r}: no such preset{nearest(name, PRESETS)}")
    sequence_length = sequence_length or 4096
    if memory:
        found = memory_report(
            model,
            batch_size=batch_size or 8,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            bits=kv_bits,
            kernels=kernels,
            measure=measure,
        )
        if as_json:
            print(json.dumps({"model": name, **found}, indent=1))
        else:
            console().print(memory_table(name, found))
        return
    values: dict[str, float] = {
        "total_parameters": accounting.total_parameters(model),
        "activated_parameters": accounting.activated_parameters(model),
        "kv_cache_elements_per_token": accounting.kv_cache_elements_per_token(model),
        "kv_cache_bytes_per_token": accounting.kv_cache_bytes_per_token(model, kv_bits),
        **(
            {"kv_cache_bytes_per_token_stored": accounting.kv_cache_bytes_per_token_stored(model, int(kv_bits))}
            if kv_bits in accounting.KV_BITS
            else {}
        ),
        "forward_flops_per_token": accounting.forward_flops_per_token(model, sequence_length),
        "train_flops_per_token": accounting.train_flops_per_token(model, sequence_length),
        "weights_bytes": accounting.weights_bytes(model),
    }
    if as_json:
        print(json.dumps({"preset": name, "kv_bits": kv_bits, "sequence_length": sequence_length, **values}, indent=1))
        return
    table = Table("quantity", "value", title=name)
    for key, value in values.items():
        table.add_row(key, f"{value:,.0f}")
    console().print(table)


app.command()(train)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run's directory, with its checkpoint")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to go on from; repeatable")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one prompt on each line")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="The same seed goes on from a prompt in the same way, whatever the other prompts are")
    ] = 0,
    kv_bits: Annotated[int | None, typer.Option(help="Bits per cached element: 16, 8, 6 or 4; by default the model's own precision")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Let a trained model go on with texts.

    Example: python -m research generate RUN --prompt 'def shortest_path(' --prompt 'The graph' --temperature 0 --kv-bits 6
    """
    from research.continuation import Sampling, gather_prompts, go_on  # noqa: PLC0415
    from research.evaluation.cache_width import check_bits  # noqa: PLC0415

    check_bits(kv_bits)
    texts = gather_prompts(prompt or [], prompts)
    sampling = Sampling(tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, kv_bits=kv_bits)
    if as_json:
        found = [dataclasses.asdict(c) for c in go_on(run, texts, sampling)]
        print(json.dumps({"run": str(run), "sampling": dataclasses.asdict(sampling), "continuations": found}, indent=1, ensure_ascii=False))
        return
    others = go_on(run, texts, sampling, _write)[1:]
    print()
    for continuation in others:
        print(f"\n{continuation.prompt}{continuation.text}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's directory, with its checkpoint")],
    hf: Annotated[Path, typer.Option("--hf", metavar="DIR", help="The folder to make; nothing may be in it")],
) -> None:
    """Write a trained model as Hugging Face's from_pretrained reads it.  Example: python -m research export /tmp/nano --hf /tmp/nano-hf"""
    from research.exchange import export_run  # noqa: PLC0415

    export_run(run, hf)
    print(f"{hf}: config.json, model.safetensors, tokenizer.json")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json (model_type deepseek_v2) and *.safetensors")],
    out: Annotated[Path, typer.Option(metavar="RUN_DIR", help="The run's directory to make; nothing may be in it")],
) -> None:
    """Make a run, to generate from, of a Hugging Face folder.  Example: python -m research import /tmp/nano-hf --out /tmp/nano-again"""
    from research.exchange import import_run  # noqa: PLC0415

    config = import_run(folder, out)
    print(f"{out}: {accounting.total_parameters(config.model):,} parameters")
    if not (out / "tokenizer.json").exists():
        print(f"{folder} has no tokenizer.json: put one into {out} before you generate from it")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def main() -> None:
    """The door: a UserError becomes its sentences on stderr and exit code 1."""
    # One thread is what the compiled kernels are for, and two in one process are hardly faster than one: OMP_NUM_THREADS=N for more.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
