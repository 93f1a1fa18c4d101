"""Saving a run beside its training and going on from a save, all ranks together."""

import datetime
import logging
import socket
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vitscale.checkpoint import (
    BackgroundTask,
    CheckpointStore,
    FileRecord,
    Manifest,
    Snapshot,
    Uploads,
    collect_records,
    leave_record,
    locate,
    mirror_of,
    pin_branch,
    rank_file_name,
    read_fragments,
    record_file,
    write_index,
)
from vitscale.config import Config
from vitscale.engine import TrainEngine
from vitscale.errors import CheckpointError, ExitStatus, VitscaleError
from vitscale.ranks.groups import Ranks
from vitscale.train.run_directory import RunDirectory, library_versions
from vitscale.train.together import as_one, on_main, raise_first, wait_while

log = logging.getLogger(__name__)

_WRITING_S = 3600.0
"""For all ranks to write; one that needs longer is not going to."""
_CLOSING_S = 20.0
"""For a save or an upload under way when the run ends: peers that died never finish theirs."""
_LAST_UPLOAD_S = 1500.0
"""For what no later start would upload; below the default of `watchdog.save_s`."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Steps done."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Newest validation metrics."""
    course: dict[str, Any] = field(default_factory=dict)
    """Plain values of the course and the guard, for the manifest."""


@dataclass
class Saver:
    """Writes and restores the checkpoints of one run, one at a time. Collective, where not said otherwise."""

    config: Config
    engine: TrainEngine
    ranks: Ranks
    store: CheckpointStore
    run_directory: RunDirectory
    model: dict[str, Any]
    """Arguments of `create_model`, for the manifest."""
    labels: tuple[str, ...]
    shapes: dict[str, list[int]]
    snapshot: Snapshot = field(default_factory=Snapshot)
    task: BackgroundTask = field(default_factory=lambda: BackgroundTask("save"))
    uploads: Uploads | None = field(init=False)
    """To the mirror, on rank 0 of a run that has one."""

    def __post_init__(self) -> None:
        """Open the mirror."""
        mirror = mirror_of(self.config) if self.ranks.is_main else None
        self.uploads = Uploads(mirror, self.store, self.config.checkpoint) if mirror is not None else None

    @property
    def failing(self) -> bool:
        """Whether this rank's part of the save under way has failed; then all should `finish` it. Not collective."""
        return self.task.failed

    def save(self, progress: Progress, cursor: dict[str, Any]) -> None:
        """Copy the present state; it is written and committed while training goes on, and old checkpoints pruned.

        Raises:
            CheckpointError: the save before this one failed, as `finish` says.
        """
        self.finish()
        started_s = time.perf_counter()
        self.snapshot.take(self.engine.fragments())
        manifest = self._manifest(progress, cursor) if self.ranks.is_main else None
        self.task.start(partial(self._write, progress.step, manifest, started_s))

    def finish(self) -> None:
        """Wait until the save under way, if there is one, is committed.

        Raises:
            CheckpointError: on every rank, when any rank could not write or a newer start owns the run.
        """
        if not self.task.busy:
            return
        wait_while(self.ranks, self._still_writing)
        failures = self.ranks.gather_objects(self._outcome())
        self.task.abandoned.clear()
        raise_first(self.ranks, [*failures[1:], failures[0]])  # rank 0's is a consequence

    def close(self, *, finished: bool) -> None:
        """Give a save and an upload under way a last chance, the last upload of a finished run a long one. Not
        collective."""
        if self.task.running:
            log.warning("waiting up to %g s for the save under way", _CLOSING_S)
            self.task.join(_CLOSING_S)
            self.task.abandoned.set()
        if self.uploads is not None:
            self.uploads.close(_LAST_UPLOAD_S if finished else _CLOSING_S)

    def _difference(self, shapes: dict[str, list[int]]) -> str:
        names = sorted(self.shapes.keys() | shapes.keys())
        name = next(name for name in names if self.shapes.get(name) != shapes.get(name))
        return (
            f"is of another model: {name} is {shapes.get(name, 'not there')} in it and "
            f"{self.shapes.get(name, 'not there')} in this run's model: go on with its config "
            "(`vitscale checkpoint inspect` shows it), or choose another run.dir"
        )

    def _still_writing(self) -> bool:
        if self.ranks.any(self.task.failed):
            self.task.abandoned.set()  # rank 0 need not wait for what will not come
        return self.task.running

    def _outcome(self) -> VitscaleError | None:
        """Wait for this rank's part; why it failed, if it did."""
        try:
            self.task.wait()
        except VitscaleError as error:
            return error
        except Exception as error:
            fault = CheckpointError(f"the save failed: {type(error).__name__}: {error}: older checkpoints are intact")
            fault.status = ExitStatus.TRANSIENT
            return fault
        return None

    def _write(self, step: int, manifest: Manifest | None, started_s: float) -> None:
        """Write this rank's file and, on rank 0, commit what all have written; in the background."""
        name = rank_file_name(self.ranks.rank)
        try:
            staging = self.store.staging(step, self.run_directory.generation)
            leave_record(staging, self.snapshot.write(staging / name))
        except OSError as error:
            raise CheckpointError.of_system(
                error,
                f"{self.store.root}: {name} of step {step} cannot be written on {socket.gethostname()}: "
                f"{error.strerror}: mend that and run the same command again, older checkpoints are intact",
            ) from None
        if manifest is not None:
            names = [rank_file_name(rank) for rank in range(self.ranks.world_size)]
            files = collect_records(staging, names, _WRITING_S, self.task.abandoned)
            tag = self._commit(staging, manifest, files)
            log.info("saved %s in %.1f s", tag, time.perf_counter() - started_s)
            if self.uploads is not None:
                self.uploads.push(tag)

    def restore(self) -> tuple[Progress, dict[str, Any]] | None:
        """Fill the engine from the newest valid checkpoint, its own or the one it branches from; None without any.

        Gives how far the run had come, and its cursor in the data.

        Raises:
            CheckpointError: there are checkpoints and none is valid, or the newest is of another model.
        """
        found = on_main(self.ranks, self._newest)
        if found is None:
            return None
        directory, manifest = found
        if manifest.shapes != self.shapes:
            raise as_one(self.ranks, CheckpointError(f"{directory}: {self._difference(manifest.shapes)}"))
        fault: CheckpointError | None = None
        try:
            read_fragments(self.engine.fragments(), directory, manifest)
        except CheckpointError as error:
            fault = error
        raise_first(self.ranks, self.ranks.gather_objects(fault))
        self.engine.state_loaded(manifest.optimizer_steps)
        log.info("goes on from %s", directory)
        return Progress(manifest.step, dict(manifest.metrics), dict(manifest.course)), manifest.cursor

    def _newest(self) -> tuple[Path, Manifest] | None:
        found = self.store.newest_valid()
        if found is None:
            branch = self.config.run.branch_from
            if branch is None:
                return None
            directory, manifest = locate(branch)
            pin_branch(directory)
            return directory, manifest
        tag, manifest, passed_over = found
        for reason in passed_over:
            log.warning("passing over a checkpoint: %s", reason)
        return self.store.path(tag), manifest

    def _manifest(self, progress: Progress, cursor: dict[str, Any]) -> Manifest:
        return Manifest(
            step=progress.step,
            run_id=self.run_directory.run_id,
            generation=self.run_directory.generation,
            world_size=self.ranks.world_size,
            optimizer_steps=self.engine.optimizer_steps(),
            cursor=cursor,
            course=dict(progress.course),
            config=self.config.model_dump(mode="json"),
            model=self.model,
            labels=list(self.labels),
            shapes=self.shapes,
            metrics=dict(progress.metrics),
            versions=library_versions(),
            saved_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files=[],
        )

    def _commit(self, staging: Path, manifest: Manifest, files: list[FileRecord]) -> str:
        if not self.run_directory.is_current():
            raise CheckpointError(
                f"{self.run_directory.path}: a newer start of this run took over, so this one (generation "
                f"{self.run_directory.generation}) may not save any more: it ends here"
            )
        try:
            index = record_file(write_index(staging, self.ranks.world_size))
            tag = self.store.commit(staging, manifest.model_copy(update={"files": [*files, index]}))
            self.run_directory.note_saved(manifest.step)
            self.store.prune(self.config.checkpoint, tag)
        except OSError as error:
            raise CheckpointError.of_system(
                error, f"{self.store.root}: cannot commit: {error}: older checkpoints are intact"
            ) from None
        return tag
