"""The options by which a command leaves files behind; the same for every simulator."""

import json
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sims.outputs.files import check_target, write_bytes

Parquet = Annotated[Path | None, typer.Option("--parquet", help="Write every phase as a row of this Parquet file")]
TraceOut = Annotated[Path | None, typer.Option("--trace-out", help="Write a trace for ui.perfetto.dev or chrome://tracing (.json, or .json.gz)")]
Heatmap = Annotated[Path | None, typer.Option("--heatmap", help="Write bytes from GPU to GPU over each kind of link as this PNG")]
FigureOut = Annotated[Path | None, typer.Option("--figure", help="Write the result as a figure to this PNG (a sweep's data beside it as .csv)")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Where to; made before the simulation, so that a folder that is not there is an error before any work.

    ConfigError names the option and what to do.
    """

    parquet: Path | None = None
    trace_out: Path | None = None
    heatmap: Path | None = None
    figure: Path | None = None

    def __post_init__(self) -> None:
        for option in ("parquet", "trace_out", "heatmap", "figure"):
            if (path := getattr(self, option)) is not None:
                check_target(path, f"--{option.replace('_', '-')}")

    def write(self, result: Any, spec: Any, seed: int | None = None) -> list[Path]:
        """Write what was asked for; the paths written.  `spec` and `seed` go into the files as what they answer."""
        if not any((self.parquet, self.trace_out, self.heatmap, self.figure)):
            return []
        # pyarrow and matplotlib take a second to import, which a command that writes nothing need not wait for.
        from sims.outputs.of_results import figure_files, heatmap_of, parquet_of, trace_of  # noqa: PLC0415

        about = {
            "question": json.dumps(_plain(spec), sort_keys=True, default=str),
            "seed": str(seed if seed is not None else getattr(spec, "seed", "")),
        }
        files: dict[Path, bytes] = {}
        if self.parquet is not None:
            files[self.parquet] = parquet_of(result, about)
        if self.trace_out is not None:
            files[self.trace_out] = trace_of(result, about, compress=self.trace_out.suffix == ".gz")
        if self.heatmap is not None:
            files[self.heatmap] = heatmap_of(result)
        if self.figure is not None:
            files |= {self.figure.with_suffix(suffix) if suffix != ".png" else self.figure: data for suffix, data in figure_files(result).items()}
        for path, data in files.items():
            write_bytes(path, data)
        return list(files)


def say(written: list[Path]) -> None:
    """Where the files are, below a command's tables."""
    for path in written:
        print(f"written: {path}")


def _plain(spec: Any) -> Any:
    return asdict(spec) if is_dataclass(spec) and not isinstance(spec, type) else spec
