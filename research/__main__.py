"""`python -m research`: train a model, look at it, let it speak; without Ray or MLflow."""

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from research import accounting
from research.configfile import load_run_config, nearest, read_yaml, resolve_model
from research.data.cli import app as data_app
from research.errors import ConfigError, UserError
from research.presets import PRESETS, preset

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Option("--set", help="path=value, such as model.moe.device_limit=2; repeatable")]


@app.command()
def presets() -> None:
    """The models that have a name.  Example: python -m research presets"""
    table = Table("preset", "parameters", "activated", "KV elements/token", "what it is")
    for name, make in PRESETS.items():
        model = make()
        counts = (accounting.total_parameters(model), accounting.activated_parameters(model), accounting.kv_cache_elements_per_token(model))
        table.add_row(name, *(f"{c:,}" for c in counts), (make.__doc__ or "").splitlines()[0])
    Console().print(table)


@app.command()
def describe(
    name: Annotated[str, typer.Argument(metavar="PRESET")],
    kv_bits: Annotated[float, typer.Option(help="Bits per cached element")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Positions over which attention is counted, causal")] = 4096,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Parameters, cache, FLOPs and bytes of a model, in closed form.  Example: python -m research describe deepseek-v2 --kv-bits 6 --json"""
    if name not in PRESETS:
        raise ConfigError(f"PRESET = {name!r}: no such preset{nearest(name, PRESETS)}")
    model = preset(name)
    values: dict[str, float] = {
        "total_parameters": accounting.total_parameters(model),
        "activated_parameters": accounting.activated_parameters(model),
        "kv_cache_elements_per_token": accounting.kv_cache_elements_per_token(model),
        "kv_cache_bytes_per_token": accounting.kv_cache_bytes_per_token(model, kv_bits),
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
    Console().print(table)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A preset's name, or a YAML file with a run configuration")],
    out: Annotated[Path, typer.Option(help="The run's directory; a checkpoint there is gone on from")],
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    prompt: Annotated[str, typer.Option(help="Text that the trained model goes on from at the end")] = "The ",
) -> None:
    """Train one model.  Example: python -m research train deepseek-v2-nano --out /tmp/nano --set training.train_tokens=200000"""
    # Half a second to two of torch are paid only by the commands that need it.
    from research.training.loop import train as run  # noqa: PLC0415
    from research.training.records import JsonlRecorder, Record  # noqa: PLC0415

    mapping = read_yaml(model) if Path(model).suffix in (".yaml", ".yml") else _default_run(model)
    config = load_run_config(mapping, model, overrides or [])
    with _progress(config.steps) as step:

        def go_on(record: Record) -> bool:
            step(record.step, "  ".join(f"{name} {value:.4g}" for name, value in record.metrics.items() if name in SHOWN))
            return False

        result = run(config, out, JsonlRecorder(out / "metrics.jsonl"), go_on, device=device, announce=lambda line: step(None, line))
    print(json.dumps({"state": result.state, "reason": result.reason, "seconds": round(result.seconds, 1), "metrics": result.metrics}, indent=1))
    if result.trace is not None:
        result.trace.save(out / "routing.npz")
    if result.state == "finished":
        _continue_text(out, prompt, tokens=80, temperature=0.8, top_p=0.95, seed=0)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run's directory, with its checkpoint")],
    prompt: Annotated[str, typer.Option(help="Text to go on from")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
) -> None:
    """Let a trained model go on with a text.  Example: python -m research generate RUN --prompt 'def shortest_path(' --temperature 0"""
    _continue_text(run, prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)


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


SHOWN = ("train/loss", "validation/bits_per_byte", "train/tokens_per_second")


def _default_run(name: str) -> dict[str, object]:
    """What a preset trains on when only its name is given: the quickstart corpus, its vocabulary as the preset has it."""
    model = resolve_model(name, "MODEL")
    vocabulary = min(int(model["vocab_size"]), 16384)
    optimizer = {"learning_rate": 0.0015, "warmup_steps": 50}
    data = {"corpus": "quickstart", "tokenizer_vocab_size": vocabulary}
    return {"model": name, "data": data, "training": {"train_tokens": 1_000_000, "optimizer": optimizer}}


def _continue_text(run: Path, prompt: str, *, tokens: int, temperature: float, top_p: float, seed: int) -> None:
    import torch  # noqa: PLC0415

    from research.exchange import run_tokenizer  # noqa: PLC0415
    from research.model.generation import generate as sample  # noqa: PLC0415
    from research.training.checkpoint import load_model  # noqa: PLC0415

    model, config = load_model(run)
    tokenizer = run_tokenizer(run, config)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise UserError(f"--prompt = {prompt!r}: holds no text to go on from")
    print(prompt, end="", flush=True)
    produced: list[int] = []
    shown = ""
    for new in sample(model, torch.tensor([ids]), tokens, temperature=temperature, top_p=top_p, seed=seed):
        produced.append(int(new[0]))
        text = tokenizer.decode(produced)
        # A character may be spread over several tokens: it is shown when it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


class _progress:  # noqa: N801  (used as a function)
    """A bar on a terminal, plain lines elsewhere: `step(done, text)`."""

    def __init__(self, total: int) -> None:
        self.bar = Progress(TextColumn("{task.percentage:3.0f}%"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.total = total
        self.live = sys.stdout.isatty()

    def __enter__(self) -> Callable[[int | None, str], None]:
        if not self.live:
            return lambda done, text: print(f"{datetime.now():%H:%M:%S} {'' if done is None else f'step {done}/{self.total}  '}{text}", flush=True)
        self.bar.start()
        task = self.bar.add_task("", total=self.total)
        return lambda done, text: self.bar.update(task, completed=done, description=text)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def main() -> None:
    """The door: a UserError becomes its sentences on stderr and exit code 1."""
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
