"""Saving a run and going on from a save, all ranks together."""

import datetime
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscale.checkpoint import (
    CheckpointStore,
    FileRecord,
    Manifest,
    locate,
    rank_file_name,
    read_fragments,
    record_file,
    write_fragments,
)
from vitscale.config import Config
from vitscale.engine import TrainEngine
from vitscale.errors import CheckpointError
from vitscale.ranks import Ranks
from vitscale.train.run_directory import RunDirectory, library_versions
from vitscale.train.together import as_one, on_main

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Steps done."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Newest validation metrics."""
    course: dict[str, Any] = field(default_factory=dict)
    """Plain values of the course and the guard, for the manifest."""


@dataclass(frozen=True)
class Saver:
    """Writes and restores the checkpoints of one run. Its methods are collective."""

    config: Config
    engine: TrainEngine
    ranks: Ranks
    store: CheckpointStore
    run_directory: RunDirectory
    model: dict[str, Any]
    """Arguments of `create_model`, for the manifest."""
    labels: tuple[str, ...]
    shapes: dict[str, list[int]]

    def save(self, progress: Progress, cursor: dict[str, Any]) -> str:
        """Commit a checkpoint of the present state and prune the old ones; returns the tag.

        Raises:
            CheckpointError: on every rank, when any rank could not write or a newer start owns the run.
        """
        staging = self.store.staging(progress.step, self.run_directory.generation)
        path = staging / rank_file_name(self.ranks.rank)
        record, failure = None, ""
        try:
            write_fragments(self.engine.fragments(), path)
            record = record_file(path)
        except OSError as error:
            failure = f"{path}: cannot be written: {error.strerror}: older checkpoints are intact"
        outcomes = self.ranks.gather_objects((record, failure))
        if failures := [text for _, text in outcomes if text]:
            raise as_one(self.ranks, CheckpointError(failures[0]))
        files = [record for record, _ in outcomes if record is not None]
        return on_main(self.ranks, lambda: self._commit(progress, cursor, files))

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
        read_fragments(self.engine.fragments(), directory, manifest)
        self.engine.state_loaded(manifest.optimizer_steps)
        log.info("goes on from %s", directory)
        return Progress(manifest.step, dict(manifest.metrics), dict(manifest.course)), manifest.cursor

    def _newest(self) -> tuple[Path, Manifest] | None:
        found = self.store.newest_valid()
        if found is None:
            branch = self.config.run.branch_from
            return locate(branch) if branch is not None else None
        tag, manifest, passed_over = found
        for reason in passed_over:
            log.warning("passing over a checkpoint: %s", reason)
        return self.store.path(tag), manifest

    def _commit(self, progress: Progress, cursor: dict[str, Any], files: list[FileRecord]) -> str:
        if not self.run_directory.is_current():
            raise CheckpointError(
                f"{self.run_directory.path}: a newer start of this run took over, so this one (generation "
                f"{self.run_directory.generation}) may not save any more: it ends here"
            )
        manifest = Manifest(
            step=progress.step,
            generation=self.run_directory.generation,
            world_size=self.ranks.world_size,
            optimizer_steps=self.engine.optimizer_steps(),
            cursor=cursor,
            course=progress.course,
            config=self.config.model_dump(mode="json"),
            model=self.model,
            labels=list(self.labels),
            shapes=self.shapes,
            metrics=progress.metrics,
            versions=library_versions(),
            saved_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files=files,
        )
        try:
            tag = self.store.commit(self.store.staging(progress.step, self.run_directory.generation), manifest)
            self.store.prune(self.config.checkpoint.keep_last)
        except OSError as error:
            raise CheckpointError(f"{self.store.root}: cannot commit: {error}: older checkpoints are intact") from None
        return tag
