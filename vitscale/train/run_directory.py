"""The run directory: one writer at a time, one config, a record of its starts, and how the last one ended.

RUN/config.yaml       the resolved config; a resume compares with it
RUN/environment.json  what ran: versions, host, launcher, command line
RUN/lock              who holds it while a run is on
RUN/run_id            drawn at the first start; tells this run from another one of its name
RUN/generation        raised by one at every start
RUN/starts.json       every start: how far it came and how it ended
RUN/exit.json         how the last start ended (launchers mask exit statuses)
RUN/watchdog/         what each rank was last doing; stacks of a run that hung
RUN/metrics.jsonl, RUN/tensorboard/, RUN/checkpoints/
"""

import contextlib
import json
import logging
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from vitscale.checkpoint import CheckpointStore, mirror_of, restore_newest
from vitscale.checkpoint.integrity import replace_file
from vitscale.checkpoint.mirroring import Restored
from vitscale.checkpoint.retention import other_runs
from vitscale.checkpoint.store import RUN_ID_NAME
from vitscale.checkpoint.tags import step_of
from vitscale.config import Config, check_recorded
from vitscale.errors import EXIT_FILE_VARIABLE, ExitStatus, RunDirectoryError, VitscaleError
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import newest_record, tags
from vitscale.train.beats import all_asked, read_beat
from vitscale.train.course import write_detours
from vitscale.train.identity import check_is_no_other, raise_generation, read_generation
from vitscale.train.lock import RunLock
from vitscale.train.starts import (
    STARTS_NAME,
    End,
    Start,
    diagnosis,
    dump_starts,
    newest_saved,
    parse_exit,
    parse_starts,
    with_last_end,
)
from vitscale.train.together import on_main

log = logging.getLogger(__name__)


class RunDirectory:
    """A run directory that this run's rank 0 holds; the other ranks know its path, generation, id and newest step."""

    def __init__(self, config: Config) -> None:
        """Name the directory; `open` takes it."""
        assert config.run.dir is not None  # load_config fills it in
        self.path = config.run.dir
        self.generation, self.run_id = 0, ""
        self.found_step = 0  # of the newest checkpoint, sound or not
        self._lock = RunLock(self.path / "lock")
        self._start: Start

    @classmethod
    def open(
        cls, config: Config, ranks: Ranks, allow_change: Sequence[str] = (), fresh: bool = False
    ) -> "RunDirectory":
        """Take the directory over: lock it, compare or record the config, raise the generation. Collective.

        Args:
            config: the run's config, with `run.dir`.
            ranks: all of them get the directory, rank 0 holds the lock.
            allow_change: dotted config keys that may differ from the recorded ones.
            fresh: begin at step 0 where checkpoints were saved once and none is left.

        Raises:
            RunDirectoryError: another run holds it, its config differs, its checkpoints are gone, its last starts
                came to nothing, or it cannot be written.
        """
        directory = cls(config)
        directory.generation, directory.run_id, directory.found_step = on_main(
            ranks, lambda: directory._take_over(config, allow_change, fresh)
        )
        return directory

    def is_current(self) -> bool:
        """Whether no newer start has raised the generation since."""
        return read_generation(self.path / "generation") == self.generation

    def beat(self) -> None:
        """Show that this run lives, where its lock needs that; does nothing on ranks that do not hold it."""
        self._lock.beat()

    def note_saved(self, step: int) -> None:
        """Remember, beside the checkpoints, that one of `step` was committed; for rank 0, after the commit.

        Raises:
            OSError: the record cannot be written.
        """
        self._start = replace(self._start, saved_step=step)
        others: list[Start] = []
        with contextlib.suppress(RunDirectoryError):  # damaged by someone meanwhile: at least this start is on record
            others = [start for start in self._read_starts() if start.generation != self.generation]
        starts = sorted([*others, self._start], key=lambda start: start.generation)
        replace_file(self.path / STARTS_NAME, dump_starts(starts))

    def close(self, status: ExitStatus, reason: str, step: int) -> None:
        """Record how the run ended and let go of the directory; does nothing on ranks that do not hold it."""
        if self._lock.held:
            self.record_end(status, reason, step)
            self._lock.release()

    def record_end(self, status: ExitStatus, reason: str, step: int) -> None:
        """Write RUN/exit.json, unless it is there: the first reason is the cause, what follows are consequences.

        A newer start of the run owns that file; this one then tells its launcher alone.
        """
        reason = reason.encode("utf-8", "replace").decode()  # a path in it may hold bytes that are no text
        record = {"status": int(status), "reason": reason, "step": step, "generation": self.generation}
        text = json.dumps(record | {"time": time.time()}) + "\n"
        file = self.path / "exit.json"
        try:
            if self._owns_record():
                if file.exists():
                    text = file.read_text(encoding="utf-8")
                else:
                    replace_file(file, text)
        except (OSError, UnicodeDecodeError) as error:  # a full disk, say, which may be the end that was to be recorded
            log.warning("%s: cannot be written: %s", file, error)
        _tell_launcher(text)

    def has_ended(self) -> bool:
        """Whether the end of this start is on record."""
        return (self.path / "exit.json").exists()

    def _take_over(self, config: Config, allow_change: Sequence[str], fresh: bool) -> tuple[int, str, int]:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError.of_system(
                error, f"{path}: cannot be written: {error.strerror}: choose another run.dir"
            ) from None
        check_is_no_other(path)
        self._lock.take()
        try:
            return self._begin(config, allow_change, fresh)
        except OSError as error:
            self._lock.release()
            raise RunDirectoryError.of_system(
                error, f"{path}: cannot be used: {error}: mend it or choose another run.dir"
            ) from None
        except VitscaleError:
            self._lock.release()
            raise

    def _begin(self, config: Config, allow_change: Sequence[str], fresh: bool) -> tuple[int, str, int]:
        """Gives the start's generation, the run's id, and the step of its newest checkpoint."""
        path, store = self.path, CheckpointStore(self.path)
        run_id = store.run_id(store.manifests()[0])
        there = _fetch_newest(config, store, run_id, fresh)
        run_id = run_id or there.run_id or uuid.uuid4().hex
        strangers = other_runs(store.manifests()[0], run_id)
        found_step = max((step_of(tag) for tag in store.tags() if tag not in strangers), default=0)
        starts = self._ended_starts(found_step)
        _check_step_0(store, _traces(path, config, starts), fresh)
        if (why := diagnosis(starts, path)) is not None:
            raise RunDirectoryError(why)
        _keep_config(path / "config.yaml", config, allow_change)
        store.prepare()
        replace_file(path / RUN_ID_NAME, f"{run_id}\n")
        known = [*(start.generation for start in starts), store.highest_generation(), there.generation]
        generation = raise_generation(path / "generation", max(known))
        self._lock.sign(generation)
        self._start = Start(
            generation,
            time.strftime("%Y-%m-%d %H:%M:%S"),
            socket.gethostname(),
            os.environ.get("SLURM_JOB_ID"),
            fresh,
            found_step,
        )
        replace_file(path / STARTS_NAME, dump_starts([*starts, self._start]))
        (path / "exit.json").unlink(missing_ok=True)
        if fresh:
            write_detours(path, ())  # those on record are of a course that is not gone again
        replace_file(path / "environment.json", json.dumps(environment(), indent=1) + "\n")
        return generation, run_id, found_step

    def _owns_record(self) -> bool:
        try:
            return self.is_current()
        except RunDirectoryError:  # a damaged number: nobody newer is known of
            return True

    def _read_starts(self) -> list[Start]:
        file = self.path / STARTS_NAME
        return parse_starts(file.read_bytes(), file) if file.exists() else []

    def _ended_starts(self, found_step: int) -> list[Start]:
        """All starts before this one. What the last one left says how it ended."""
        starts = self._read_starts()
        if not starts:
            return []
        last = starts[-1].generation
        with contextlib.suppress(OSError):
            if (end := parse_exit((self.path / "exit.json").read_bytes(), last)) is not None:
                return with_last_end(starts, end, found_step)
        beat = read_beat(self.path, rank=0, generation=last)
        seen = f", last seen in its section {beat.section}" if beat is not None else ""
        cause, status = "killed, out of memory or its node lost", None
        if all_asked(self.path, last):
            cause, status = "asked to stop, and killed before it could", ExitStatus.RUN_AGAIN
        silent = End(f"{cause}{seen}", beat.step if beat is not None else 0, status)
        return with_last_end(starts, silent, found_step)


@contextlib.contextmanager
def refusals_told(ranks: Ranks) -> Iterator[None]:
    """An error inside, before the run directory is taken, reaches a launcher that hides exit statuses."""
    try:
        yield
    except VitscaleError as error:
        if ranks.is_main:
            record = {"status": int(error.status), "reason": str(error), "step": 0, "time": time.time()}
            _tell_launcher(json.dumps(record) + "\n")
        raise


def library_versions() -> dict[str, str]:
    """Versions of vitscale, Python and the libraries that decide the numbers."""
    names = ("vitscale", "torch", "deepspeed", "numpy", "safetensors", "simplejpeg")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def environment() -> dict[str, Any]:
    """What a reader of the run needs to know about where it ran."""
    keys = (
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
        *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"),
        *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"),
    )
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
        "versions": library_versions(),
        "variables": {key: os.environ[key] for key in keys if key in os.environ},
    }


def _tell_launcher(text: str) -> None:
    if file := os.environ.get(EXIT_FILE_VARIABLE):
        try:
            Path(file).write_text(text, encoding="utf-8")
        except OSError as error:  # on a full disk the launcher has the exit status alone
            log.warning("%s: cannot be written: %s", file, error.strerror)


def _fetch_newest(config: Config, store: CheckpointStore, run_id: str, fresh: bool) -> Restored:
    """On a disk that has no checkpoint so new, go on from the mirror's, and from the config that it was saved with."""
    mirror = mirror_of(config)
    if mirror is None:
        return Restored()
    if fresh:
        if saved := mirror.tags():
            raise RunDirectoryError(
                f"{mirror.url}: holds {saved[-1]}: --fresh is for a run without checkpoints, there too: leave it out "
                "to go on, move that folder away, or give another checkpoint.mirror"
            )
        return Restored()
    restored = restore_newest(store, mirror, run_id)
    file = store.root.parent / "config.yaml"
    if restored.fetched is not None and not file.exists():
        replace_file(file, yaml.safe_dump(restored.fetched.config, sort_keys=False))
    return restored


def _traces(run_dir: Path, config: Config, starts: Sequence[Start]) -> str:
    """What shows that something was saved here, in words; empty where nothing does."""
    if starts:
        return f"step {step} was saved here" if (step := newest_saved(starts)) else ""
    newest = newest_record(run_dir / "metrics.jsonl", tags.TRAIN_LOSS)
    if newest is None or newest["step"] < config.checkpoint.every_steps:
        return ""
    return f"step {newest['step']} was trained here, {STARTS_NAME} is gone"


def _check_step_0(store: CheckpointStore, traces: str, fresh: bool) -> None:
    """No run begins anew unless it never saved anything, or is told to."""
    run_dir = store.root.parent
    if fresh and store.once_committed():
        there = store.tags()[-1] if store.tags() else "the name of a checkpoint that was there"
        raise RunDirectoryError(
            f"{store.root}: holds {there}: --fresh is for a run directory without checkpoints: leave it out to go on, "
            "or move that folder away"
        )
    if traces and not fresh and not store.once_committed():
        raise RunDirectoryError(
            f"{run_dir}: {traces}, and {store.root} holds no checkpoint: put it back, or begin anew with --fresh"
        )


def _keep_config(file: Path, config: Config, allow_change: Sequence[str]) -> None:
    check_recorded(file, config, allow_change)
    replace_file(file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
