"""A save that goes on beside training: one thread a rank, which meet in the staging directory and nowhere else.

No collective is used: one in a second thread would mix with those of training. A rank's thread writes the rank's file
and then a small record of it; rank 0's thread waits for the records of all ranks and commits.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from vitscale.checkpoint.manifest import FileRecord
from vitscale.errors import CheckpointError

_RECORD_SUFFIX = ".record.json"
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 0.5
"""Between two looks at the directory: a small save should be committed at once, a large one not watched closely."""


class BackgroundTask:
    """At most one action at a time in a thread of its own; how it ended is told when it is asked for."""

    def __init__(self, name: str) -> None:
        """Nothing runs yet.

        Args:
            name: of the threads, for stack dumps.
        """
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.abandoned = threading.Event()
        """Asks the action to give up."""

    @property
    def busy(self) -> bool:
        """Whether an action was started that nobody has waited for yet."""
        return self._thread is not None

    @property
    def running(self) -> bool:
        """Whether an action has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the action has ended in an error that nobody was told of yet."""
        return self._error is not None

    def start(self, action: Callable[[], None]) -> None:
        """Run an action; the one before it must have been waited for."""
        assert not self.busy
        # Nothing that a hung file system can hold may keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, args=(action,), name=self._name, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the action's end, but no longer than this."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def wait(self) -> None:
        """Wait for the action's end, and raise what it raised."""
        assert self._thread is not None
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            self._error = error


def leave_record(staging: Path, record: FileRecord) -> None:
    """Say in the staging directory that a rank's file is written and flushed.

    Raises:
        OSError: it cannot be written.
    """
    path = staging / f"{record.name}{_RECORD_SUFFIX}"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(record.model_dump_json(), encoding="utf-8")
    temporary.rename(path)  # so that a reader finds all of it


def collect_records(staging: Path, names: list[str], timeout_s: float, abandoned: threading.Event) -> list[FileRecord]:
    """Wait until every file's record is there, and take the records away.

    Args:
        staging: directory of the save.
        names: of the files, in the order wanted.
        timeout_s: for all of them.
        abandoned: gives up when it is set.

    Raises:
        CheckpointError: naming those that are missing.
    """
    deadline_s = time.monotonic() + timeout_s
    wait_s = _FIRST_LOOK_S
    while missing := _without_record(staging, names):
        given_up = abandoned.wait(wait_s)
        if given_up or time.monotonic() > deadline_s:
            why = "the run ends" if given_up else f"not written within {timeout_s:g} s"
            raise CheckpointError(
                f"{staging}: {len(missing)} of {len(names)} files are missing ({missing[0]} ...), {why}: "
                "the save is left, older checkpoints are intact"
            )
        wait_s = min(2 * wait_s, _LONGEST_LOOK_S)
    records = []
    for name in names:
        path = staging / f"{name}{_RECORD_SUFFIX}"
        try:
            records.append(FileRecord.model_validate_json(path.read_text(encoding="utf-8")))
        except (OSError, ValidationError) as error:
            raise CheckpointError(f"{path}: not readable: {error}: the save is left, older ones are intact") from None
        path.unlink()
    return records


def _without_record(staging: Path, names: list[str]) -> list[str]:
    present = {entry.name for entry in staging.iterdir()}
    return [name for name in names if f"{name}{_RECORD_SUFFIX}" not in present]
