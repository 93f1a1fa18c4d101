"""The config of how long a run may stand still before it is ended: the `watchdog` section."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from vitscale.config.section import AboveZero, Section

Beat = Annotated[float, Field(gt=0.0, le=20.0)]


class WatchdogSection(Section):
    """Longest stay in each section of the run; null sets no limit.

    A rank that stays longer has all ranks dump their stacks to RUN/watchdog, and the run ends as worth a requeue. The
    limits of data and step lie below the 600 s after which a collective fails by itself, without any stacks.
    """

    start_s: AboveZero | None = 1800.0
    """Building the engine, restoring a checkpoint and the first step at each input size, which may compile."""
    data_s: AboveZero | None = 360.0
    """Waiting for one micro-batch; above `data.remote.patience_s`, so that a slow server is tried again first."""
    step_s: AboveZero | None = 480.0
    """Forward and backward pass, collectives and update of one step; above data_s, because the others wait here for a
    rank that waits for data."""
    validation_s: AboveZero | None = 1800.0
    """One whole validation, or one set of pictures."""
    save_s: AboveZero | None = 1800.0
    """What of a save holds up training: the copy, and the wait for the save before it or, at the end, for itself."""
    beat_s: Beat = 10.0
    """Pause between two looks of each rank's watchdog, each of which writes 512 bytes to a file that stays open."""
    answer_s: AboveZero = 60.0
    """Time that the ranks have to answer once one is over its limit; a network file system may need as long to show
    them each other's files."""

    @model_validator(mode="after")
    def _in_proportion(self) -> Self:
        if self.data_s is not None and self.step_s is not None and self.step_s < self.data_s:
            raise ValueError(
                f"step_s={self.step_s:g} is less than data_s={self.data_s:g}: ranks that wait in a step for another's "
                "data would be ended first: raise step_s"
            )
        if self.answer_s < 2 * self.beat_s:
            raise ValueError(
                f"answer_s={self.answer_s:g} leaves no time to answer to ranks that look every beat_s={self.beat_s:g}: "
                "give it at least twice as much"
            )
        return self
