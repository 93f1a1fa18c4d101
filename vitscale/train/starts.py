"""The starts of a run, how far each came and how it ended: what tells a fresh run from one that lost its checkpoints.

RUN/starts.json is a list with one record a start, the oldest first. It lies outside RUN/checkpoints on purpose. What
follows from it is decided here, without touching a file.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vitscale.errors import ExitStatus, RunDirectoryError

STARTS_NAME = "starts.json"
FENCED_STARTS = 3
"""Starts in a row that fail without a new checkpoint, after which it takes a person to look."""


@dataclass(frozen=True)
class End:
    """How a start ended."""

    reason: str
    step: int
    """Steps of the run that were done, saved or not."""
    status: int | None = None
    """None where it ended without a word."""

    def __str__(self) -> str:
        return f"at step {self.step}: {self.reason}"


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    generation: int
    time: str
    host: str
    job: str | None
    fresh: bool = False
    """Whether it was told to begin at step 0 although checkpoints were lost."""
    found_step: int = 0
    """Of the newest checkpoint that was there, by its name, sound or not; 0 without any."""
    saved_step: int | None = None
    """Of the newest checkpoint that it committed."""
    end: End | None = None

    @property
    def failed(self) -> bool:
        """Whether it ended as launchers requeue it, but not on request."""
        return self.end is not None and self.end.status in (None, ExitStatus.TRANSIENT)

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether it ended because somebody, or the cluster, wanted it to."""
        return self.end is not None and self.end.status == ExitStatus.RUN_AGAIN


@dataclass(frozen=True, kw_only=True)
class _Exit(End):
    """RUN/exit.json."""

    generation: int


_STARTS, _EXIT = TypeAdapter(list[Start]), TypeAdapter(_Exit)


def dump_starts(starts: Sequence[Start]) -> str:
    """The text of RUN/starts.json."""
    return json.dumps([asdict(start) for start in starts], indent=1) + "\n"


def parse_starts(text: str | bytes, file: Path) -> list[Start]:
    """The starts that RUN/starts.json tells of.

    Raises:
        RunDirectoryError: it was damaged.
    """
    try:
        return _STARTS.validate_json(text)
    except ValidationError:
        raise RunDirectoryError(
            f"{file}: is no record of starts: remove it to go on without what it knew of earlier ones"
        ) from None


def parse_exit(text: bytes, generation: int) -> End | None:
    """The end that RUN/exit.json tells of; None where it is of another start, or damaged."""
    try:
        found = _EXIT.validate_json(text)
    except ValidationError:
        return None
    return End(found.reason, found.step, found.status) if found.generation == generation else None


def with_last_end(starts: Sequence[Start], end: End, found_step: int) -> list[Start]:
    """The same starts, the last one of which is over.

    Args:
        starts: on record.
        end: of the last one, unless it has one.
        found_step: of the newest checkpoint that is there now; the last start committed it, though it may have been
            killed before it could say so.
    """
    if not starts or starts[-1].end is not None:
        return list(starts)
    last = starts[-1]
    saved_step = max(found_step, last.saved_step or 0) if found_step > last.found_step else last.saved_step
    return [*starts[:-1], replace(last, saved_step=saved_step, end=end)]


def newest_saved(starts: Sequence[Start]) -> int:
    """The newest step that any start since the last fresh one saved or found saved; 0 when nothing ever was."""
    steps = [0]
    for start in starts:
        steps = [0] if start.fresh else steps
        steps += [start.found_step, start.saved_step or 0]
    return max(steps)


def fruitless(starts: Sequence[Start]) -> list[Start]:
    """The newest starts in a row that failed without a new checkpoint, the oldest first.

    One that was asked to stop neither counts nor ends the row: a job that is preempted in its first minutes has done
    nothing wrong. What a person mends between two starts (an error, a divergence, a fresh start) ends it, and so does a
    finished run.
    """
    row: list[Start] = []
    for index in reversed(range(len(starts))):
        start, advanced = starts[index], _has_advanced(starts[: index + 1])
        if start.was_asked_to_stop and not advanced:
            continue
        if advanced or not start.failed:
            break
        row.insert(0, start)
        if start.fresh:
            break
    return row


def diagnosis(starts: Sequence[Start], run_dir: Path) -> str | None:
    """Why the run should not be started once more; None where it may."""
    row = fruitless(starts)
    if len(row) < FENCED_STARTS:
        return None
    last = row[-FENCED_STARTS:]
    told = "; ".join(f"start {start.generation} {start.end}" for start in last)
    return (
        f"{run_dir}: no new checkpoint since step {last[-1].found_step} in {len(row)} starts that failed one after the "
        f"other ({told}): see the job's log, {run_dir / 'watchdog'} and checkpoint.every_steps, mend the cause, and "
        f"remove {run_dir / STARTS_NAME} to try again{'' if last[-1].found_step else ', with --fresh'}"
    )


def _has_advanced(starts: Sequence[Start]) -> bool:
    """Whether the last of them committed a newer checkpoint than there was.

    Newer than all it found or, below newer ones that are damaged or of a start that was overtaken, than the last that
    a start before it committed. The same one committed again is no step forward.
    """
    *before, start = starts
    if start.saved_step is None:
        return False
    last = next(
        (earlier.saved_step for earlier in reversed(before) if earlier.saved_step is not None), start.found_step
    )
    return start.saved_step > min(start.found_step, last)
