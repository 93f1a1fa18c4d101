"""The config of a run: frozen pydantic models, one class a section.

A field exists only where some code reads it, and nothing changes after load. Numbers that follow from
others (accumulation, total steps) are not fields: `vitscale.config.derive` computes them.
"""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from vitscale.config.average import AverageSection
from vitscale.config.checkpoint import CheckpointSection
from vitscale.config.data import DataSection
from vitscale.config.engine import EngineSection
from vitscale.config.guard import GuardSection
from vitscale.config.loss import LossSection
from vitscale.config.model import InitSection, ModelSection
from vitscale.config.optim import OptimSection
from vitscale.config.reporting import EvalSection, LogSection, ProfileSection
from vitscale.config.schedule import BatchSection, ScheduleSection
from vitscale.config.section import Count, Section
from vitscale.config.watchdog import WatchdogSection


class RunSection(Section):
    """Where the run lives and the one seed that everything random follows from."""

    dir: Path | None = None
    """Run directory; `runs/<config stem>` when left out."""
    seed: Count = 0
    """Seed of the initial weights, the data order, the augmentation, dropout and drop path."""
    branch_from: Path | None = None
    """A checkpoint of another run (its directory, or one of its checkpoints/step-*) that this run goes on from when it
    has none of its own, such as to cool an rsqrt schedule down."""


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
    average: AverageSection | None = None
    guard: GuardSection = GuardSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()
    profile: ProfileSection = ProfileSection()
    watchdog: WatchdogSection = WatchdogSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine.kind == "torch" and self.engine.deepspeed_overrides:
            raise ValueError("engine.deepspeed_overrides has no effect with engine.kind=torch: remove it")
        if self.log.samples and self.data.stream is not None:
            raise ValueError("log.samples names samples by their index, data.stream has none: set log.samples=false")
        distill = self.loss.distill
        if distill is not None and distill.alpha == 1 and self.model.distilled:
            raise ValueError(
                "loss.distill.alpha is 1, which leaves the labels' head of a distilled model untrained: use less than "
                "1, or model.distilled=false"
            )
        if self.engine.activation_checkpointing == "budget" and self.model.drop_rate:
            # torch draws a compiled dropout anew where it recomputes it for a budget: wrong gradients, without a word.
            raise ValueError(
                "engine.activation_checkpointing=budget would draw dropout anew in the backward pass: "
                "use selective, or model.drop_rate=0"
            )
        if self.run.branch_from is not None and self.init.path is not None:
            raise ValueError("run.branch_from brings weights, init.path too: give one of them")
        if self.model.num_classes == 0:
            raise ValueError("model.num_classes is 0, which builds no head to train: give the number of classes")
        return self
