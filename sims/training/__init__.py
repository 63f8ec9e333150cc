"""One optimizer step of a model on a described cluster: its seconds, where they go, and the memory that it takes."""

from sims.training.result import StepResult
from sims.training.simulate import training_step
from sims.training.spec import TrainingStep

__all__ = ["StepResult", "TrainingStep", "training_step"]
