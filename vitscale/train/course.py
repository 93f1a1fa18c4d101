"""Which stretch of the data order every step trains on: a pure function of the timeline and the detours.

Without detours step s takes the images that follow those of step s - 1. A detour is what a roll-back leaves behind:
it swaps two neighbouring windows of steps, so the data that was there when the run diverged comes later, after other
data, and no sample is lost or seen twice.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from vitscale.checkpoint.integrity import replace_file
from vitscale.config import Phase, Timeline
from vitscale.errors import RunDirectoryError

DETOURS_NAME = "detours.json"
_PAIRS = TypeAdapter(list[tuple[int, int]])


@dataclass(frozen=True)
class Detour:
    """From `first_step` on, the data of `steps` steps and of as many steps after them change places."""

    first_step: int
    steps: int


@dataclass(frozen=True)
class Stretch:
    """Steps first_step to end_step - 1: one phase, and images in sequence from `position` of the data order on."""

    first_step: int
    end_step: int
    position: int
    phase: Phase


@dataclass(frozen=True)
class Course:
    """The way of a run through its data."""

    timeline: Timeline
    detours: tuple[Detour, ...] = ()
    """In the order in which they came about."""
    shift: int = 0
    """Images seen beyond what the timeline says, where the batch was changed between two starts of the run."""

    def images_seen(self, step: int) -> int:
        """Images seen before a step."""
        return self.timeline.images_at(step) + self.shift

    def stretch_from(self, step: int) -> Stretch:
        """The longest stretch that begins at `step`, which lies before the run's end."""
        phase = self.timeline.phase_at(step)
        end, source = phase.end_step, step
        # The newest detour first: the older ones are part of the order that it changed.
        for detour in reversed(self.detours):
            offset = source - detour.first_step
            if offset < 0:
                end = min(end, step - offset)
            elif offset < 2 * detour.steps:
                window, place = divmod(offset, detour.steps)
                end = min(end, step + detour.steps - place)
                source += -detour.steps if window else detour.steps
        return Stretch(step, end, self.images_seen(source), phase)

    def avoiding(self, restored_step: int, failed_step: int) -> Self | None:
        """The course that goes on from `restored_step` with other data than that of the steps up to `failed_step`.

        None where the phase ends before as many steps of other data fit in.
        """
        steps = failed_step - restored_step + 1
        if restored_step + 2 * steps > self.timeline.phase_at(restored_step).end_step:
            return None
        return replace(self, detours=(*self.detours, Detour(restored_step, steps)))


def write_detours(run_dir: Path, detours: Sequence[Detour]) -> None:
    """Have RUN/detours.json say which detours there are, before the first step along the newest."""
    replace_file(run_dir / DETOURS_NAME, json.dumps([astuple(detour) for detour in detours]) + "\n")


def read_detours(run_dir: Path) -> tuple[Detour, ...]:
    """The detours on record; none where there is no file.

    Raises:
        RunDirectoryError: it cannot be read, or was damaged.
    """
    path = run_dir / DETOURS_NAME
    try:
        return tuple(Detour(*values) for values in _PAIRS.validate_json(path.read_bytes()))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise RunDirectoryError.of_system(error, f"{path}: cannot be read: {error.strerror}: mend it") from None
    except ValidationError:
        raise RunDirectoryError(
            f"{path}: is no record of detours: remove it to go on with those that the checkpoint knows of"
        ) from None
