"""A folder of tars inside the build's folder, for sources that can only be read from front to end.

A shuffled build reads images in random order; a gzip stream or a column of a Parquet file cannot be read so.
They are copied into the spool once. A tar that is finished is never written again, and the spool goes away when
the dataset is merged.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from vitscale.errors import ShardError

SPOOL_FOLDER = "spool"
_DONE_FILE = "done"


def is_spooled(spool: Path, identity: str) -> bool:
    """Whether the spool holds all of the source of this identity.

    Raises:
        ShardError: it holds another source.
    """
    done = spool / _DONE_FILE
    if not done.exists():
        return False
    if done.read_text(encoding="utf-8") != identity:
        raise ShardError(f"{spool}: holds another source's images: remove the folder, or give another --out")
    return True


def mark_spooled(spool: Path, identity: str) -> None:
    """Say that the spool holds all of the source."""
    _write_whole(spool / _DONE_FILE, [identity.encode()])


def add_tar(spool: Path, name: str, pieces: Iterable[bytes]) -> None:
    """Write a tar, given in pieces, whole or not at all.

    Raises:
        OSError: the disk is full or fails.
    """
    _write_whole(spool / name, pieces)


def need_room(spool: Path, coming_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold: the spool, and the shards that are written from it.

    Raises:
        ShardError: too little room is free.
    """
    spool.mkdir(parents=True, exist_ok=True)
    for stale in spool.glob("*.tmp"):
        stale.unlink()
    free = shutil.disk_usage(spool).free
    if free < 2 * coming_bytes:
        raise ShardError(
            f"{spool}: {free / 1e9:.1f} GB are free, spool and shards take about {2 * coming_bytes / 1e9:.1f} GB: "
            "free some, or give an --out on a larger disk"
        )


def remove_spool(out: Path) -> None:
    """Remove the spool of a build, if there is one."""
    if (out / SPOOL_FOLDER).exists():
        shutil.rmtree(out / SPOOL_FOLDER)


def _write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            for piece in pieces:
                left = memoryview(piece)
                while left:
                    left = left[file.write(left) :]
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
