"""The config of a run's course: images a step, length, and how learning rate, batch and input size move."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from vitscale.config.length import Length, LengthField
from vitscale.config.section import NotNegative, Positive, Section


def _in_pairs(images: int) -> int:
    if images % 2:
        raise ValueError(f"images come in pairs: use an even number, such as {images + 1}")
    return images


# Augmentation pairs position p with p xor 1.
Images = Annotated[Positive, AfterValidator(_in_pairs)]


class BatchSection(Section):
    """Images an optimizer step sees, and how many of them a rank holds at once."""

    global_batch: Images
    """Images a step, over all ranks and accumulation."""
    micro_batch: Images
    """Images a rank and forward; with `pad` the most of them."""
    pad: bool = False
    """Whether any number of ranks will do: places that the batch does not fill are masked, and count for nothing."""


class PhaseSection(Section):
    """A part of the run before its end, with another input size or batch; what is left out is as after it."""

    until: LengthField
    """Where in the run the phase ends, such as `80 %`, `80 epochs` or 240000 (steps)."""
    img_size: Positive | None = None
    """Input in pixels, such as 168 for /14 or 160 for /16; the position embedding is resized to it on the way."""
    global_batch: Images | None = None
    """Images a step."""
    micro_batch: Images | None = None
    """Images a rank and forward; small images leave room for more."""


class ScheduleSection(Section):
    """How long the run is, how the learning rate moves, and what changes on the way.

    Lengths are steps where they are bare numbers, or texts such as `90 epochs`, `1e9 images` or `3 %`.
    """

    kind: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    length: LengthField
    """Length of the run."""
    warmup: LengthField = Length(0, "steps")
    """Linear warm-up from 0, part of the length."""
    cooldown: LengthField = Length(0, "steps")
    """Linear way to 0 at the end of an rsqrt or constant schedule, part of the length."""
    timescale: LengthField | None = None
    """Of an rsqrt schedule: the rate is peak / sqrt(1 + t / timescale) at t after the warm-up (Zhai et al. 2022)."""
    final_lr: NotNegative = 0.0
    """Learning rate that a cosine or linear decay would reach just after the last step."""
    phases: tuple[PhaseSection, ...] = ()
    """Earlier parts of the run with another input size or batch, in order; the rest runs as model and batch say."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        decays = self.kind in ("cosine", "linear")
        if self.length.unit == "percent" or not self.length.amount:
            raise ValueError(f"length {self.length}: give steps, images or epochs, more than 0")
        if decays and self.cooldown.amount:
            raise ValueError(f"cooldown is for rsqrt and constant, {self.kind} goes down by itself: remove it")
        if not decays and self.final_lr:
            raise ValueError(f"final_lr is for cosine and linear: remove it, or use cooldown with {self.kind}")
        if (self.kind == "rsqrt") != (self.timescale is not None):
            raise ValueError("give timescale with kind rsqrt, such as timescale: 10000, and with no other")
        if self.timescale is not None and (self.timescale.unit == "percent" or not self.timescale.amount):
            raise ValueError(f"timescale {self.timescale}: give steps, images or epochs, more than 0")
        return self
