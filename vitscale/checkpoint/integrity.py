"""Files and what was recorded of them: flushed to the disk, replaced whole, sized, hashed, and compared again."""

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitscale.checkpoint.manifest import FileRecord
from vitscale.errors import CheckpointError

_CHUNK_BYTES = 1 << 20
# Hashing leaves the interpreter lock alone; more threads than this only make a shared disk seek.
_THREADS = 8


def record_file(path: Path) -> FileRecord:
    """Flush a file to the disk and take its size and SHA-256."""
    fsync(path)
    return FileRecord(name=path.name, size_bytes=path.stat().st_size, sha256=sha256_of(path))


def check_file(path: Path, record: FileRecord) -> None:
    """Compare a file with its record.

    Raises:
        CheckpointError: it is missing, cannot be read, has another size or another content.
    """
    if fault := size_fault(path, record) or _content_fault(path, record):
        raise CheckpointError(fault)


def file_faults(directory: Path, records: Sequence[FileRecord]) -> list[str]:
    """A line for each file that is not as it was recorded.

    Sizes are looked at first, so that what is missing or cut short is told without reading the rest. The contents
    are read by several threads, under a progress bar on a terminal.

    Args:
        directory: where the files are.
        records: what was written.
    """
    faults = [fault for record in records if (fault := size_fault(directory / record.name, record))]
    if faults or not records:
        return faults
    total = sum(record.size_bytes for record in records)
    bar = tqdm(total=total, desc=f"checking {directory.name}", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        seen = counter(bar)
        found = pool.map(lambda record: _content_fault(directory / record.name, record, seen), records)
        return [fault for fault in found if fault]


def size_fault(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a file as far as can be told without reading it."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if size != record.size_bytes:
        return f"{path}: {size} bytes where {record.size_bytes} were written"
    return None


def _content_fault(path: Path, record: FileRecord, seen: Callable[[int], Any] = lambda _: None) -> str | None:
    try:
        sha256 = sha256_of(path, seen)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if sha256 != record.sha256:
        return f"{path}: its SHA-256 is not the recorded one, so its content was changed or damaged"
    return None


def sha256_of(path: Path, seen: Callable[[int], Any] = lambda _: None) -> str:
    """Hexadecimal SHA-256 of a file; `seen` is told of the bytes read since its last call."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            seen(count)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, text: str) -> None:
    """Write a file so that a reader finds the old or the new text, never a part, and so that a cut undoes neither.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    # Several ranks may write at once, each in a file of its own.
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync(file.parent)


def counter(bar: Any) -> Callable[[int], None]:
    """A bar that threads may move together."""
    lock = threading.Lock()

    def seen(count: int) -> None:
        with lock:
            bar.update(count)

    return seen
