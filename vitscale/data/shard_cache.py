"""Keeps copies of remote shards on the node's disk, for all of its processes.

A read that finds no copy goes to the server at once and never waits for a whole shard; beside it a thread brings the
shard in, one at a time in each process. Training reads every shard of a dataset again and again in random order:
with too little room, each copy would be thrown out before it is of use. So a copy in use stays, and what does not
fit is read from the server.

Locks are flocks, which end with their process; there is no other state than the files. A copy is written into
NAME.tmp, under a lock, and renamed when it is whole.
"""

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from vitscale.data.shard_bytes import ShardBytes, ShardStat, Transfers, checked_name
from vitscale.errors import ShardError

log = logging.getLogger(__name__)

OWN_FOLDER = "vitscale-shards"
LOCK_FILE = ".lock"
UNFINISHED = ".tmp"
PART_BYTES = 16 << 20
# A copy read within this time is in use. An epoch of ImageNet-21k comes back to each shard every few minutes.
IN_USE_S = 900.0
# After the folder was found full of copies in use, it is looked through again this much later.
FULL_PAUSE_S = 60.0
# A request under way cannot be broken off; the thread is left to it, and ends with the process at the latest.
CLOSING_S = 2.0


class CachedShards:
    """Shards of `origin`, copied into a folder that holds up to `limit_bytes` of them.

    Its `transfers` count what the copies gave, those of `origin` what came over the network. A folder that is full,
    cannot be written or cannot lock is said once in the log, and the run goes on without new copies.
    """

    def __init__(self, origin: ShardBytes, folder: Path, limit_bytes: int, in_use_s: float = IN_USE_S) -> None:
        """Touch nothing yet."""
        self.origin = origin
        self.location = origin.location
        self.transfers = Transfers()
        # A folder of its own: what others keep in `folder` is not for this cache to count or remove.
        self._cache = folder / OWN_FOLDER
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._in_use_s = in_use_s
        self._stats: dict[str, ShardStat] = {}
        self._copying = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._gave_up = False
        self._full_until = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        """Threads stay in their process."""
        return CachedShards, (self.origin, self._folder, self._limit_bytes, self._in_use_s)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a shard, from `offset` on, from the copy or the origin; raises as the origin does."""
        checked_name(self.location, shard)
        data = self._read_copy(shard, offset, size)
        if data is not None:
            self.transfers.requests += 1
            self.transfers.read_bytes += size
            return data
        self._start_copy(shard)
        return self.origin.read(shard, offset, size)

    def stat(self, shard: str) -> ShardStat:
        """Size and version of a shard at the origin, asked once; raises as the origin does."""
        if shard not in self._stats:
            self._stats[shard] = self.origin.stat(shard)
        return self._stats[shard]

    def close(self) -> None:
        """Break off the copy that is under way."""
        self._closed = True
        self.origin.close()
        if self._thread is not None:
            self._thread.join(CLOSING_S)

    def copy(self, shard: str) -> bool:
        """Bring a shard into the folder; False where it is there, another process brings it, or there is no room.

        Raises:
            ShardError: the origin does not give it.
            OSError: the folder cannot take it.
        """
        path, size = self._path(shard), self.stat(shard).size_bytes
        self._cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}{UNFINISHED}")
        with _claimed(unfinished) as file:
            if file is None or path.exists():
                return False
            if not self._reserve(file, size):
                self._full_until = time.monotonic() + FULL_PAUSE_S
                return False
            for start in range(0, size, PART_BYTES):
                if self._closed:
                    return False
                file.write(self.origin.read(shard, start, min(PART_BYTES, size - start)))
            file.flush()
            os.fsync(file.fileno())
            with self._alone():
                unfinished.replace(path)
        return True

    def _path(self, shard: str) -> Path:
        """Where the copy of a shard is: another one for another version, so that no old bytes are read."""
        identity = f"{self.location}\n{shard}\n{self.stat(shard)}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return self._cache / f"{digest}-{PurePosixPath(shard).name}"

    def _read_copy(self, shard: str, offset: int, size: int) -> bytes | None:
        path, whole_bytes = self._path(shard), self.stat(shard).size_bytes
        try:
            with path.open("rb", buffering=0) as file:
                if not _lock(file, fcntl.LOCK_SH):  # it is being removed
                    return None
                if os.fstat(file.fileno()).st_size != whole_bytes:
                    path.unlink()
                    return None
                os.utime(file.fileno())  # when it was last of use
                data = os.pread(file.fileno(), size, offset)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error)
            return None
        return data if len(data) == size else None

    def _start_copy(self, shard: str) -> None:
        """Copy a shard in a thread, unless one is being copied: a later read will ask again."""
        if self._gave_up or self._closed or time.monotonic() < self._full_until:
            return
        if self._copying.acquire(blocking=False):
            self._thread = threading.Thread(target=self._copy_beside, args=(shard,), name="shard-copy", daemon=True)
            self._thread.start()

    def _copy_beside(self, shard: str) -> None:
        try:
            self.copy(shard)
        except ShardError:
            pass  # whoever reads the shard meets the same, and is told
        except OSError as error:
            self._give_up(error)
        finally:
            self._copying.release()

    def _give_up(self, error: OSError) -> None:
        if not self._gave_up:
            self._gave_up = True
            log.warning(
                "%s: no more shards are copied there (%s): they are read from %s",
                self._cache,
                error.strerror,
                self.location,
            )

    def _reserve(self, file: BinaryIO, size: int) -> bool:
        """Take `size` bytes of the folder for a file, so that a full disk is met before anything is downloaded."""
        with self._alone():
            if not size or not self._make_room(size):
                return False
            os.posix_fallocate(file.fileno(), 0, size)
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from counting what is in the folder, and from changing it."""
        with (self._cache / LOCK_FILE).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> bool:
        """Remove what killed processes left and, as far as needed, the copies that were not read for longest."""
        if size > self._limit_bytes:
            return False
        found = []
        for path in self._cache.iterdir():
            # A reader may remove a damaged copy at any time.
            with suppress(FileNotFoundError):
                found.append((path, path.stat()))
        held_bytes = sum(status.st_size for _, status in found)
        unused_since = time.time() - self._in_use_s
        for path, status in sorted(found, key=lambda pair: pair[1].st_mtime):
            excess = held_bytes + size > self._limit_bytes and status.st_mtime <= unused_since
            if (excess or path.suffix == UNFINISHED) and path.name != LOCK_FILE and _remove_unless_locked(path):
                held_bytes -= status.st_size
        return held_bytes + size <= self._limit_bytes


@contextmanager
def _claimed(path: Path) -> Iterator[BinaryIO | None]:
    """An empty file that this process alone writes; None while another one does. It is removed, unless renamed."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
        # Between open and lock the one who wrote it may have renamed it.
        if not _lock(file, fcntl.LOCK_EX) or not _is_at(file, path):
            yield None
            return
        file.truncate(0)
        try:
            yield file
        finally:
            if _is_at(file, path):
                path.unlink()


def _lock(file: BinaryIO | FileIO, how: int) -> bool:
    """Lock a file until it is closed; False where another process, or thread, holds it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unless_locked(path: Path) -> bool:
    try:
        with path.open("rb", buffering=0) as file:
            if not _lock(file, fcntl.LOCK_EX):
                return False
            path.unlink()
    except FileNotFoundError:
        pass  # another process was faster
    return True
