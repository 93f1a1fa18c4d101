"""One writer a run directory: RUN/lock, and who holds it.

Where the file system keeps flock (a local disk, NFS, Lustre mounted with `-o flock`) the kernel decides: a lock that
can be taken has no living owner, for it goes with its process, and with its node once the server gives that node up.

Where flock is not supported, the owner's record in the file decides. An owner that is known to this very kernel is
dead when its process is gone. Any other is dead when it has left the file untouched for LEASE_S. Such an owner may
come back, from a cut-off node for instance; that is safe because the new owner has raised the generation by then, and
a start of an older generation commits no checkpoint.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Self

from pydantic import TypeAdapter

from vitscale.errors import ExitStatus, RunDirectoryError

log = logging.getLogger(__name__)

LEASE_S = 90.0
"""Several beats of the watchdog, of at most 20 s each, behind the attribute cache of NFS, of up to 60 s."""
SETTLE_S = 2.0
"""Two that find the lock free within this time both sign it, and the last to sign has it (Fischer's algorithm)."""
REQUEUE_WAIT_S = 240.0
"""What an earlier start of the same job gets to be gone, longer than Lustre and NFS keep the locks of a lost node."""

_LOOK_S = 0.5
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True)
class ProcessMark:
    """A process beyond doubt: numbers are given again, also by another kernel or in another container."""

    kernel: str
    """Boot id and process namespace, within which a pid has one meaning; empty where the system tells none."""
    pid: int
    started: int
    """Clock ticks from boot to the start of the process: no change of the clock touches them."""

    @classmethod
    def own(cls) -> Self:
        """Of this process."""
        return cls(_kernel(), os.getpid(), _started(os.getpid()) or 0)

    def is_local(self) -> bool:
        """Whether this process can see that one, dead or alive."""
        return bool(self.kernel) and self.kernel == _kernel()

    def is_alive(self) -> bool:
        """Whether the process still runs, for a local one; a zombie does not."""
        return _started(self.pid) == self.started


@dataclass(frozen=True)
class Owner:
    """What RUN/lock says of who holds it."""

    mark: ProcessMark
    host: str
    since: str
    job: str | None
    restart: str | None
    """Slurm's count of the job's restarts."""
    generation: int | None = None

    @classmethod
    def own(cls) -> Self:
        """This process."""
        return cls(
            ProcessMark.own(),
            socket.gethostname(),
            time.strftime("%Y-%m-%d %H:%M:%S"),
            os.environ.get("SLURM_JOB_ID"),
            os.environ.get("SLURM_RESTART_COUNT"),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        generation = f", generation {self.generation}" if self.generation is not None else ""
        return f"pid {self.mark.pid} on {self.host} (since {self.since}{job}{generation})"

    def is_earlier_start(self) -> bool:
        """Whether it is this very Slurm job before it was requeued, which Slurm has taken off its nodes or given up."""
        mine = Owner.own()
        return mine.job is not None and self.job == mine.job and self.restart != mine.restart


_OWNER = TypeAdapter(Owner)


class RunLock:
    """RUN/lock, held by at most one process."""

    def __init__(self, path: Path) -> None:
        """Name the file; `take` takes it."""
        self._path = path
        self._file: IO[str] | None = None
        self._flocked = True
        self._owner = Owner.own()

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return self._file is not None

    def take(self) -> None:
        """Hold the lock from here on.

        Raises:
            RunDirectoryError: another process holds it, or it cannot be written.
        """
        try:
            file = self._path.open("a+", encoding="utf-8")
            self._flocked = self._lock(file)
            if not self._flocked:
                self._take_over(file)
            self._sign(file)
        except OSError as error:
            raise RunDirectoryError.of_system(
                error, f"{self._path}: cannot be locked: {error.strerror}: choose another run.dir"
            ) from None
        self._file = file

    def sign(self, generation: int) -> None:
        """Add the generation to the owner's record."""
        assert self._file is not None
        self._owner = replace(self._owner, generation=generation)
        self._sign(self._file)

    def beat(self) -> None:
        """Show that the owner lives, where the record decides who owns the lock."""
        if self.held and not self._flocked:
            os.utime(self._path)

    def release(self) -> None:
        """Let go of it."""
        if self._file is None:
            return
        if read_owner(self._path) == self._owner:  # else it was taken over, and the record is another's
            self._file.truncate(0)
        self._file.close()
        self._file = None

    def _lock(self, file: IO[str]) -> bool:
        """Whether flock gave the lock; False where the file system has none."""
        began_s = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                self._wait_or_refuse(read_owner(self._path), began_s)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                return False

    def _take_over(self, file: IO[str]) -> None:
        """Without flock: see that the owner is dead, sign, and see that nobody signed after."""
        began_s = time.monotonic()
        while self._path.stat().st_size and self._lives(owner := read_owner(self._path)):
            self._wait_or_refuse(owner, began_s)
        log.warning("%s: no flock on this file system, so the lock is kept by its record and beats", self._path)
        self._sign(file)
        time.sleep(SETTLE_S)
        if (owner := read_owner(self._path)) != self._owner:
            raise self._refusal(owner)

    def _lives(self, owner: Owner | None) -> bool:
        if owner is not None and owner.mark.is_local():
            return owner.mark.is_alive()
        touched_ns, deadline_s = self._path.stat().st_mtime_ns, time.monotonic() + LEASE_S
        while time.monotonic() < deadline_s:
            time.sleep(min(_LOOK_S, LEASE_S))
            if self._path.stat().st_mtime_ns != touched_ns:
                return True
        return False

    def _wait_or_refuse(self, owner: Owner | None, began_s: float) -> None:
        # One that has not signed is about to, or has just let go.
        patience_s = SETTLE_S if owner is None else REQUEUE_WAIT_S if owner.is_earlier_start() else 0.0
        if time.monotonic() >= began_s + patience_s:
            raise self._refusal(owner)
        time.sleep(_LOOK_S)

    def _refusal(self, owner: Owner | None) -> RunDirectoryError:
        name = owner or "an unknown process"
        error = RunDirectoryError(
            f"{self._path.parent}: held by {name}: wait for it, stop it, or choose another run.dir"
        )
        if owner is not None and owner.is_earlier_start():
            error.status = ExitStatus.TRANSIENT  # the job's next start may find its node gone
        return error

    def _sign(self, file: IO[str]) -> None:
        file.truncate(0)
        file.write(json.dumps(asdict(self._owner)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_owner(file: Path) -> Owner | None:
    """The owner that signed a RUN/lock; None where the file is gone, empty, or says something else."""
    try:
        return _OWNER.validate_json(file.read_bytes())  # opened anew: NFS looks at the server then
    except (OSError, ValueError):
        return None


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return ""


def _started(pid: int) -> int | None:
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
