"""The model of a study's best run, kept in MLflow so that it can be used again.

What is kept is a run's own folder, made small: checkpoint/ with weights and configuration, and tokenizer.json.
`python -m research generate FOLDER` reads it once it is downloaded, and so does `mlflow.pyfunc.load_model`, whose
`predict` takes prompts and gives their continuations.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from research.configfile import load_run_config
from research.data.prepare import prepare
from sweeps import schema
from sweeps.status import RunStatus, StudyStatus, read_json

NAME = "best"
FOLDER = "run"
DEFAULTS: dict[str, Any] = {"tokens": 100, "temperature": 0.8, "top_p": 0.95, "seed": 0}
WEIGHTS, STATE = "model.safetensors", "state.json"


def best_run(status: StudyStatus) -> RunStatus | None:
    """The finished run with the best value of the first objective; the lower trial and seed where two are equal."""
    if not status.objectives:
        return None
    metric, direction = status.objectives[0]
    sign = -1.0 if direction == "maximize" else 1.0
    finished = [r for r in status.runs if r.counts and r.state == schema.FINISHED and math.isfinite(r.values.get(metric, math.nan))]
    return min(finished, key=lambda r: (sign * r.values[metric], r.trial, r.seed), default=None)


def has_weights(directory: Path) -> bool:
    """Whether the run left a checkpoint that a model can be made of."""
    return all((directory / schema.CHECKPOINT_DIRECTORY / name).exists() for name in (WEIGHTS, STATE))


def save(directory: Path, out: Path) -> None:
    """Write the run in `directory` as an MLflow model folder `out`; its weights are those of the last checkpoint, which was measured."""
    run = out / "data" / FOLDER
    checkpoint = run / schema.CHECKPOINT_DIRECTORY
    checkpoint.mkdir(parents=True)
    for name in (WEIGHTS, STATE):
        shutil.copyfile(directory / schema.CHECKPOINT_DIRECTORY / name, checkpoint / name)
    shutil.copyfile(directory / schema.CONFIG_FILE, run / schema.CONFIG_FILE)
    config = load_run_config(read_json(directory / schema.CONFIG_FILE), str(directory / schema.CONFIG_FILE))
    prepare(config.data).tokenizer().save(str(run / "tokenizer.json"))
    _describe(out)


def _describe(out: Path) -> None:
    """MLmodel: what `mlflow.pyfunc.save_model` would write, which would first load the model, and torch with it, into the driver."""
    from mlflow import pyfunc  # noqa: PLC0415  (seconds)
    from mlflow.models import Model, ModelSignature  # noqa: PLC0415
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema  # noqa: PLC0415

    kinds = {"tokens": "long", "temperature": "double", "top_p": "double", "seed": "long"}
    sampling = ParamSchema([ParamSpec(name, kind, DEFAULTS[name]) for name, kind in kinds.items()])
    text = Schema([ColSpec("string")])
    model = Model(signature=ModelSignature(inputs=text, outputs=text, params=sampling))
    pyfunc.add_to_model(model, loader_module=__name__, data=f"data/{FOLDER}")
    model.save(str(out / "MLmodel"))


def tags(best: RunStatus) -> dict[str, str]:
    return {schema.TAG_VARIANT: best.variant, schema.TAG_SEED: str(best.seed), schema.TAG_RUN: best.run}


def link(client: Any, run_id: str, model_id: str, best: RunStatus) -> None:
    """Show the model on the page of the run that made it."""
    from mlflow.entities import LoggedModelOutput  # noqa: PLC0415

    client.log_outputs(run_id, models=[LoggedModelOutput(model_id, best.step)])


class Continuations:
    """What `mlflow.pyfunc.load_model` gives: prompts in, prompts with what follows them out."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """model_input: a list of prompts, or a table whose first column they are.  params: of `research.continuation.Sampling`, over DEFAULTS."""
        from research.continuation import Sampling, go_on  # noqa: PLC0415  (torch)

        prompts = (
            list(model_input.iloc[:, 0]) if hasattr(model_input, "iloc") else [model_input] if isinstance(model_input, str) else list(model_input)
        )
        return [c.prompt + c.text for c in go_on(self.run, [str(prompt) for prompt in prompts], Sampling(**{**DEFAULTS, **(params or {})}))]


def _load_pyfunc(path: str) -> Continuations:
    """MLflow calls it with the folder of a downloaded model."""
    return Continuations(Path(path))
