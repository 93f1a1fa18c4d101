"""The config of what a run measures and tells while it goes on."""

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vitscale.config.section import Count, Positive, Section

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class EvalSection(Section):
    """Validation during the run."""

    every_steps: Positive | None = None
    """Steps between two validations; only after the last step when left out."""
    micro_batch: Positive = 64
    """Images a rank and forward in validation."""


class LogSection(Section):
    """How often metrics are written, and where to beside RUN/metrics.jsonl, TensorBoard and the console."""

    every_steps: Positive = 10
    """Steps between two records of the training metrics."""
    samples: bool = False
    """Whether every rank writes the keys of the samples of each step to RUN/samples, for an audit."""
    pictures: Count = 16
    """Validation images in TensorBoard's pictures (predictions, attention); 0 draws no pictures."""
    pictures_every_steps: Positive | None = None
    """Steps between two sets of pictures; one at each validation when left out."""
    second_sink: Literal["wandb"] | None = None
    """A service that gets the metrics too: Weights & Biases, offline with WANDB_MODE=offline."""


class ProfileSection(Section):
    """A trace of some steps by torch's profiler, at RUN/profile."""

    steps: tuple[Positive, Positive] | None = None
    """First and last step of the trace, such as 10..12 or [10, 12]; no trace when left out."""
    ranks: tuple[Count, ...] = Field(default=(0,), min_length=1)
    """Ranks that write one."""

    @field_validator("steps", mode="before")
    @classmethod
    def _read_range(cls, value: Any) -> Any:
        """A range as it is written on the command line."""
        if not isinstance(value, str):
            return value
        found = _RANGE.fullmatch(value.strip())
        if found is None:
            raise ValueError(f"{value!r} is no range of steps: write FIRST..LAST, such as 10..12")
        return [int(found[1]), int(found[2])]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"profile.steps {self.steps[0]}..{self.steps[1]} ends before it begins: swap the two")
        return self
