"""What every rank says of itself while it runs (RUN/watchdog/rank-00003.json, 512 bytes), and what that comes to.

The file stays open and its one record is written over: that is a write to a storage server, and no work for the
metadata server of a parallel file system, which thousands of ranks would keep busy with new files.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import TypeAdapter

from vitscale.train.lock import ProcessMark

FOLDER_NAME = "watchdog"
BEAT_BYTES = 512
_NAMED_RANKS = 8


class Part(StrEnum):
    """Sections of a run, as `watchdog` in the config has their limits."""

    START = "start"
    DATA = "data"
    STEP = "step"
    VALIDATION = "validation"
    SAVE = "save"


@dataclass(frozen=True)
class Beat:
    """Where a rank was when it last wrote."""

    generation: int
    rank: int
    host: str
    mark: ProcessMark
    section: str
    step: int
    """Steps of the run that are done."""
    stay_s: float
    """Time in the section."""
    time: float
    """Of the clock, in seconds since 1970."""
    answered: bool = False
    """Whether it has dumped its stacks because a rank was over its limit."""
    asked: bool = False
    """Whether it had been asked to stop."""

    def encode(self) -> bytes:
        """The record, always of the same length."""
        text = json.dumps(asdict(self))
        assert len(text) < BEAT_BYTES
        return f"{text:<{BEAT_BYTES - 1}}\n".encode()


_BEAT = TypeAdapter(Beat)


def beat_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes."""
    return run_dir / FOLDER_NAME / f"rank-{rank:05d}.json"


def read_beat(run_dir: Path, rank: int, generation: int) -> Beat | None:
    """A rank's last beat in a start of the run; None where it has not written any."""
    with contextlib.suppress(OSError, ValueError):
        beat = _BEAT.validate_json(beat_file(run_dir, rank).read_bytes())
        if beat.generation == generation:
            return beat
    return None


def all_asked(run_dir: Path, generation: int) -> bool:
    """Whether every rank that left a beat in that start had been asked to stop by then.

    One rank's word is not enough: when a rank dies, launchers ask those that are left to stop before they kill them.
    """
    last = read_beat(run_dir, 0, generation)
    if last is None or not last.asked:  # spares the files of thousands of ranks after most ends
        return False
    ranks = [int(path.stem.split("-")[1]) for path in (run_dir / FOLDER_NAME).glob("rank-*.json")]
    beats = [read_beat(run_dir, rank, generation) for rank in ranks]
    return all(beat.asked for beat in beats if beat is not None)


def verdict(beats: Mapping[int, Beat | None], limit_s: float | None, folder: Path, generation: int) -> str:
    """One line that says who hangs where, who does not answer, and where the stacks are.

    Those that do not answer come first, then the sections, the one with the fewest ranks first: most ranks wait in
    a step for the few that did not come.

    Args:
        beats: the last one of every rank; None where a rank wrote none.
        limit_s: the limit that was passed.
        folder: of the stacks.
        generation: of this start.
    """
    silent = {rank: beat for rank, beat in beats.items() if beat is None or not beat.answered}
    answered = [beat for beat in beats.values() if beat is not None and beat.answered]
    told = []
    if silent:
        told.append(f"no answer from {_named([_last_seen(rank, beat) for rank, beat in silent.items()])}")
    sections: dict[str, list[Beat]] = {}
    for beat in sorted(answered, key=lambda beat: -beat.stay_s):
        sections.setdefault(beat.section, []).append(beat)
    for section, found in sorted(sections.items(), key=lambda item: (len(item[1]), item[0] == Part.STEP)):
        told.append(f"in section {section} {_named([_stay(beat) for beat in found])}")
    limit = f" past its limit of {limit_s:g} s" if limit_s is not None else ""
    return f"the run stands still{limit}: {'; '.join(told)}; stacks in {folder}/stacks-{generation}-rank-*.txt"


def _last_seen(rank: int, beat: Beat | None) -> str:
    if beat is None:
        return f"rank {rank} (never heard of)"
    return f"rank {rank} ({beat.host}, pid {beat.mark.pid}, last seen in section {beat.section} after step {beat.step})"


def _stay(beat: Beat) -> str:
    return f"rank {beat.rank} ({beat.host}, pid {beat.mark.pid}, for {beat.stay_s:.0f} s after step {beat.step})"


def _named(texts: list[str]) -> str:
    more = len(texts) - _NAMED_RANKS
    return ", ".join(texts[:_NAMED_RANKS]) + (f" and {more} more" if more > 0 else "")
