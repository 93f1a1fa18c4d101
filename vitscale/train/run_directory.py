"""The run directory: one writer at a time, one config, a count of its starts, and how the last one ended.

RUN/config.yaml       the resolved config; a resume compares with it
RUN/environment.json  what ran: versions, host, launcher, command line
RUN/lock              held while a run is on
RUN/generation        raised by one at every start
RUN/exit.json         how the last start ended (launchers mask exit statuses)
RUN/metrics.jsonl, RUN/tensorboard/, RUN/checkpoints/
"""

import contextlib
import fcntl
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import yaml

from vitscale.config import Config, differing_keys, parse_config
from vitscale.errors import EXIT_FILE_VARIABLE, ConfigError, ExitStatus, RunDirectoryError
from vitscale.ranks import Ranks
from vitscale.train.together import on_main


class RunDirectory:
    """A run directory that this run's rank 0 holds; the other ranks know its path and generation."""

    def __init__(self, config: Config) -> None:
        """Name the directory; `open` takes it."""
        assert config.run.dir is not None  # load_config fills it in
        self.path = config.run.dir
        self.generation = 0
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, config: Config, ranks: Ranks, allow_change: Sequence[str] = ()) -> "RunDirectory":
        """Take the directory over: lock it, compare or record the config, raise the generation. Collective.

        Args:
            config: the run's config, with `run.dir`.
            ranks: all of them get the directory, rank 0 holds the lock.
            allow_change: dotted config keys that may differ from the recorded ones.

        Raises:
            RunDirectoryError: another run holds it, its config differs, or it cannot be written.
        """
        directory = cls(config)
        directory.generation = on_main(ranks, lambda: directory._take_over(config, allow_change))
        return directory

    def _take_over(self, config: Config, allow_change: Sequence[str]) -> int:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / "lock").open("a+")
        except OSError as error:
            raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}: choose another run.dir") from None
        _take(lock, path)
        self._lock = lock
        _keep_config(path / "config.yaml", config, allow_change)
        (path / "exit.json").unlink(missing_ok=True)
        replace_file(path / "environment.json", json.dumps(environment(), indent=1) + "\n")
        return _raise_generation(path / "generation")

    def is_current(self) -> bool:
        """Whether no newer start has raised the generation since."""
        return _read_generation(self.path / "generation") == self.generation

    def close(self, status: ExitStatus, reason: str, step: int) -> None:
        """Record how the run ended and let go of the directory; does nothing on ranks that do not hold it."""
        if self._lock is None:
            return
        record = {"status": int(status), "reason": reason, "step": step, "generation": self.generation}
        text = json.dumps(record | {"time": time.time()}) + "\n"
        replace_file(self.path / "exit.json", text)
        if other := os.environ.get(EXIT_FILE_VARIABLE):
            Path(other).write_text(text, encoding="utf-8")
        self._lock.close()


def library_versions() -> dict[str, str]:
    """Versions of vitscale, Python and the libraries that decide the numbers."""
    names = ("vitscale", "torch", "deepspeed", "numpy", "safetensors", "simplejpeg")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def environment() -> dict[str, Any]:
    """What a reader of the run needs to know about where it ran."""
    keys = ("WORLD_SIZE", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "OMP_NUM_THREADS")
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
        "versions": library_versions(),
        "variables": {key: os.environ[key] for key in keys if key in os.environ},
    }


def _take(lock: IO[str], path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "an unknown process"
        lock.close()
        raise RunDirectoryError(f"{path}: held by {owner}: wait for it, stop it, or choose another run.dir") from None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def _keep_config(file: Path, config: Config, allow_change: Sequence[str]) -> None:
    resolved = config.model_dump(mode="json")
    if file.exists():
        recorded = yaml.safe_load(file.read_text(encoding="utf-8"))
        with contextlib.suppress(ConfigError):  # keys that are newer than the run have their defaults in it
            recorded = parse_config(recorded, source=str(file)).model_dump(mode="json")
        changed = [key for key in differing_keys(recorded, resolved) if key not in allow_change]
        if changed:
            flags = " ".join(f"--allow-change {key}" for key in changed)
            raise RunDirectoryError(
                f"{file.parent}: its config differs in {', '.join(changed)}: "
                f"choose another run.dir, or go on with {flags}"
            )
    replace_file(file, yaml.safe_dump(resolved, sort_keys=False))


def _raise_generation(file: Path) -> int:
    generation = _read_generation(file) + 1
    replace_file(file, f"{generation}\n")
    return generation


def _read_generation(file: Path) -> int:
    try:
        return int(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0


def replace_file(file: Path, text: str) -> None:
    """Write a file so that a reader finds the old or the new text, never a part."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
