"""What a run directory says of its run to somebody who only looks: it takes no lock, writes nothing and needs no torch.

The state is a decision on a few signs (`state_of`); `read_signs` and `summarise` gather what is there. Files may be
missing, torn or damaged: what cannot be read is not known, and is no error.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vitscale.config import Config, lay_out, parse_config
from vitscale.config.load import read_yaml
from vitscale.errors import ConfigError, ExitStatus, RunDirectoryError
from vitscale.telemetry import newest_record, tags
from vitscale.train.beats import beat_file
from vitscale.train.lock import Owner, read_owner
from vitscale.train.starts import STARTS_NAME, Start, parse_starts

SILENT_S = 120.0
"""Without a sign for so long a run that should be on is not: beats come every 20 s at the latest, and a network file
system shows them up to a minute later."""
_VALIDATION_BYTES = 1 << 24
"""How far back from the end of metrics.jsonl the newest validation is looked for."""
_DEPTH = 3
_FOR_GOOD = (ExitStatus.FINISHED, ExitStatus.USER_ERROR, ExitStatus.DIVERGED)
"""Ends without another try."""
_USUAL_WAITS = frozenset({"None", "Priority", "Resources", "BeginTime"})
"""Slurm's reasons of a job that starts by itself in its turn."""
_NOT_RUNS = frozenset({"slurm", "checkpoints", "tensorboard", "watchdog"})


class State(StrEnum):
    """Where a run is in its life."""

    NEW = "new"
    """Not started."""
    QUEUED = "queued"
    STARTING = "starting"
    """Its job is on, and has not reached the trainer: in the preflight, say, or on its way to another try."""
    RUNNING = "running"
    HUNG = "hung"
    """It should be on, and gives no sign of life."""
    STOPPED = "stopped"
    """Checkpointed on request: run it again."""
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class SlurmJob:
    """A job that Slurm has waiting or on, in the words of squeue."""

    state: str
    reason: str = "None"
    """Why it waits."""

    @property
    def waits(self) -> bool:
        """Whether it is in the queue; else it is on."""
        return self.state == "PENDING"


@dataclass(frozen=True)
class Signs:
    """What a state is decided from."""

    job: SlurmJob | None = None
    """That was submitted for it last, where Slurm still has it."""
    started: bool = False
    end: tuple[int, str] | None = None
    """Status and reason, as RUN/exit.json has them; none while a start is on."""
    owner: str = ""
    """Who signed RUN/lock; empty where nobody holds it."""
    owner_lives: bool | None = None
    """None where that cannot be seen from this machine."""
    silent_s: float = 0.0
    """Since the newest sign of life."""


@dataclass(frozen=True)
class Summary:
    """A run in a row; None for what is not known."""

    run: str
    state: State
    reason: str
    step: int | None
    total_steps: int | None
    loss_ema: float | None
    val_top1: float | None
    images_per_s: float | None
    mfu: float | None
    restarts: int
    left_s: float | None
    """Of training, at the rate of the newest record; of runs that may go on."""


def state_of(signs: Signs) -> tuple[State, str]:
    """The state, and in a few words why, where there is something to say."""
    job = signs.job
    if job is not None and job.waits and signs.owner_lives is not True:
        return State.QUEUED, "" if job.reason in _USUAL_WAITS else job.reason
    state, reason = _state_in_directory(signs)
    is_over = signs.end is not None and signs.end[0] in _FOR_GOOD
    if job is not None and not job.waits and not is_over and state not in (State.RUNNING, State.HUNG):
        return State.STARTING, ""
    return state, reason


def _state_in_directory(signs: Signs) -> tuple[State, str]:
    """The state as it is without Slurm."""
    if signs.owner and signs.end is None:
        if signs.owner_lives is False:
            return State.FAILED, f"ended without a word: {signs.owner} is gone"
        if signs.silent_s > SILENT_S:
            return State.HUNG, f"no sign of life for {signs.silent_s / 60:.0f} min from {signs.owner}"
        return State.RUNNING, ""
    if signs.end is None:
        return (State.FAILED, "ended without a word") if signs.started else (State.NEW, "")
    status, reason = signs.end
    if status == ExitStatus.FINISHED:
        return State.FINISHED, ""
    return (State.STOPPED if status == ExitStatus.RUN_AGAIN else State.FAILED), reason


def find_runs(folder: Path) -> list[Path]:
    """The run directories in a folder, a few levels down, or the folder itself if it is one; sorted.

    Raises:
        RunDirectoryError: there is none.
    """
    if not (found := sorted(_runs_below(folder, _DEPTH))):
        raise RunDirectoryError(f"{folder}: no run directory here: give one, or a folder that holds some")
    return found


def job_of(run_dir: Path) -> str | None:
    """The id of the Slurm job that was submitted for the run last, as RUN/slurm/job.json has it."""
    record = _read_json(run_dir / "slurm" / "job.json")
    return str(record["job_id"]) if record is not None and "job_id" in record else None


def summarise(run_dir: Path, job: SlurmJob | None, now_s: float) -> Summary:
    """The run's row.

    Args:
        run_dir: of the run.
        job: its job, where Slurm has one.
        now_s: the time, in seconds since 1970.
    """
    starts = _read_starts(run_dir)
    signs = read_signs(run_dir, bool(starts), job, now_s)
    state, reason = state_of(signs)
    metrics, config = run_dir / "metrics.jsonl", _read_config(run_dir)
    record = newest_record(metrics, tags.TRAIN_IMAGES_SEEN) or {}
    validates = config is None or config.data.val is not None
    val = (newest_record(metrics, tags.VAL_TOP1, _VALIDATION_BYTES) or {}) if validates else {}
    total = _total_steps(config, record) if config is not None else None
    step, step_s, left_s = record.get("step"), record.get(tags.PERF_STEP_TIME_S), None
    if state not in (State.FINISHED, State.FAILED) and total is not None and step is not None and step_s is not None:
        left_s = (total - step) * step_s
    return Summary(
        run=str(run_dir),
        state=state,
        reason=reason,
        step=step,
        total_steps=total,
        loss_ema=record.get(tags.TRAIN_LOSS_EMA),
        val_top1=val.get(tags.VAL_TOP1),
        images_per_s=record.get(tags.PERF_IMAGES_PER_S),
        mfu=record.get(tags.PERF_MFU),
        restarts=max(len(starts) - 1, 0),
        left_s=left_s,
    )


def read_signs(run_dir: Path, started: bool, job: SlurmJob | None, now_s: float) -> Signs:
    """What the directory shows of its run's state."""
    owner, exit_record = read_owner(run_dir / "lock"), _read_json(run_dir / "exit.json")
    end = None
    if exit_record is not None and isinstance(exit_record.get("status"), int):
        end = (exit_record["status"], str(exit_record.get("reason", "")))
    signs = (run_dir / "lock", run_dir / "metrics.jsonl", beat_file(run_dir, rank=0))
    seen_s = max((_touched_s(file) for file in signs), default=0.0)
    return Signs(
        job=job,
        started=started,
        end=end,
        owner=str(owner) if owner is not None else "",
        owner_lives=_lives(owner) if owner is not None else False,
        silent_s=max(now_s - seen_s, 0.0),
    )


def _lives(owner: Owner) -> bool | None:
    return owner.mark.is_alive() if owner.mark.is_local() else None


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):  # a file, or a folder that may not be read
        if any((folder / sign).exists() for sign in (STARTS_NAME, "lock", "metrics.jsonl", "slurm/job.json")):
            yield folder
        elif depth:
            for entry in folder.iterdir():
                if entry.name not in _NOT_RUNS:
                    yield from _runs_below(entry, depth - 1)


def _total_steps(config: Config, record: dict[str, Any]) -> int | None:
    """Length of the run; None where it follows from the size of a dataset that no record tells yet."""
    epoch, images = record.get(tags.TRAIN_EPOCH), record.get(tags.TRAIN_IMAGES_SEEN)
    epoch_images = round(images / epoch) if images and epoch else 0
    try:
        return lay_out(config.schedule, config.batch, 1, epoch_images).total_steps
    except ConfigError:
        return None


def _read_starts(run_dir: Path) -> Sequence[Start]:
    file = run_dir / STARTS_NAME
    try:
        return parse_starts(file.read_bytes(), file)
    except (OSError, RunDirectoryError):
        return []


def _read_config(run_dir: Path) -> Config | None:
    file = run_dir / "config.yaml"
    try:
        return parse_config(read_yaml(file), source=str(file))
    except ConfigError:
        return None


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _touched_s(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
