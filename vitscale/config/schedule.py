"""The config of a run's course: images a step, length, and how the learning rate moves."""

from typing import Literal, Self

from pydantic import model_validator

from vitscale.config.section import AboveZero, Count, NotNegative, Positive, Section


class BatchSection(Section):
    """Images an optimizer step sees, and how many of them a rank holds at once."""

    global_batch: Positive
    """Images a step, over all ranks and accumulation."""
    micro_batch: Positive
    """Images a rank and forward; even, because augmentation pairs position p with p xor 1."""

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.micro_batch % 2:
            raise ValueError(
                f"micro_batch {self.micro_batch} is odd: use an even number, such as {self.micro_batch + 1}"
            )
        return self


class ScheduleSection(Section):
    """How long the run is and how the learning rate moves."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    steps: Positive | None = None
    """Length in optimizer steps; give this or `epochs`."""
    epochs: AboveZero | None = None
    """Length in passes over the training split; give this or `steps`."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0, part of the length."""
    final_lr: NotNegative = 0.0
    """Learning rate that the decay would reach just after the last step."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self
