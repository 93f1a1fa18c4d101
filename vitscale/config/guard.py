"""The config of what happens when training leaves its usual course."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from vitscale.config.section import Count, Positive, Section

AboveOne = Annotated[float, Field(gt=1.0)]


class GuardSection(Section):
    """Updates that are skipped, and when the run goes back or stops. A non-finite gradient is never applied."""

    norm_factor: AboveOne | None = None
    """A gradient norm (before clipping) above this multiple of its running mean is a spike, and its update is skipped;
    null skips only what is not finite."""
    loss_factor: AboveOne | None = None
    """A recorded training loss above this multiple of its running mean has diverged; null for no such limit."""
    window_steps: Positive = 100
    """Steps that the running means look back over; before as many no spike is told."""
    patience_steps: Positive = 5
    """Updates skipped in a row after which the run has diverged."""
    roll_backs: Count = 0
    """Times a diverged run goes back to its newest checkpoint and takes the data that follow first; the run stops, with
    a report, when it diverges once more."""

    @model_validator(mode="after")
    def _windowed(self) -> Self:
        limits = self.norm_factor is not None or self.loss_factor is not None
        if not limits and self.window_steps != type(self).model_fields["window_steps"].default:
            raise ValueError("window_steps is for norm_factor and loss_factor: give one of them, or remove it")
        return self
