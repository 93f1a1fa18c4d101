"""The config of a run: frozen pydantic models, one class a section.

A field exists only where some code reads it, and nothing changes after load. Numbers that follow from
others (accumulation, total steps) are not fields: `vitscale.config.derive` computes them.
"""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from vitscale.config.data import DataSection
from vitscale.config.engine import EngineSection
from vitscale.config.loss import LossSection
from vitscale.config.model import InitSection, ModelSection
from vitscale.config.optim import OptimSection
from vitscale.config.reporting import EvalSection, LogSection
from vitscale.config.schedule import BatchSection, ScheduleSection
from vitscale.config.section import Count, Positive, Section


class RunSection(Section):
    """Where the run lives and the one seed that everything random follows from."""

    dir: Path | None = None
    """Run directory; `runs/<config stem>` when left out."""
    seed: Count = 0
    """Seed of the initial weights, the data order, the augmentation, dropout and drop path."""


class CheckpointSection(Section):
    """When the run is saved and what is kept."""

    every_steps: Positive = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: Positive = 2
    """Newest valid checkpoints that are kept."""


class Config(Section):
    """A whole run, as one YAML file describes it."""

    run: RunSection = RunSection()
    model: ModelSection
    init: InitSection = InitSection()
    data: DataSection
    batch: BatchSection
    optim: OptimSection
    schedule: ScheduleSection
    loss: LossSection = LossSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss.kind == "sigmoid" and self.loss.label_smoothing:
            raise ValueError("loss.label_smoothing is for the softmax loss: set it to 0 with loss.kind=sigmoid")
        if self.engine.kind == "torch" and self.engine.deepspeed_overrides:
            raise ValueError("engine.deepspeed_overrides has no effect with engine.kind=torch: remove it")
        if self.log.samples and self.data.stream is not None:
            raise ValueError("log.samples names samples by their index, data.stream has none: set log.samples=false")
        if self.model.num_classes == 0:
            raise ValueError("model.num_classes is 0, which builds no head to train: give the number of classes")
        return self
