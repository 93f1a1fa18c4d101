"""The source `winter21-gz`: winter21_whole.tar.gz, a compressed tar of class tars, in one pass from front to end."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from data_tools.progress import progress
from data_tools.sources.class_tars import WNID, list_class_tars
from data_tools.sources.listing import Listing
from data_tools.sources.spool import add_tar, is_spooled, mark_spooled, need_room
from data_tools.ustar import BLOCK_BYTES
from vitscale.errors import ShardError

CHUNK_BYTES = 1 << 20


def list_winter21_gz(source: Path, spool: Path, workers: int) -> Listing:
    """Images of the class tars in a compressed tar, once they lie in the spool.

    A pass that was stopped begins at the front again, as gzip asks for, but writes only what is missing.

    Raises:
        ShardError: it is no compressed tar of class tars, is damaged or cut off, or the disk has too little room.
    """
    if not source.is_file():
        raise ShardError(f"{source}: is no file: --source winter21-gz takes winter21_whole.tar.gz")
    size = source.stat().st_size
    identity = f"{source.resolve()} {size}"
    if not is_spooled(spool, identity):
        # JPEGs hardly compress, so the file's size is that of its content.
        present = sum(path.stat().st_size for path in spool.glob("*.tar"))
        need_room(spool, max(0, size - present))
        with source.open("rb") as compressed, gzip.GzipFile(fileobj=compressed) as stream:
            _spool_class_tars(source, cast(BinaryIO, stream), compressed, size, spool)
        mark_spooled(spool, identity)
    return list_class_tars(spool, workers)


def _spool_class_tars(source: Path, stream: BinaryIO, compressed: BinaryIO, size: int, spool: Path) -> None:
    read = 0

    def newly_read(_: tarfile.TarInfo) -> int:
        nonlocal read
        before, read = read, compressed.tell()
        return read - before

    try:
        for member in progress(_members(source, stream), size, "byte", newly_read):
            name = PurePosixPath(member.name).name
            content = _content(source, stream, member)
            if (spool / name).exists() and (spool / name).stat().st_size == member.size:
                for _ in content:
                    pass
            else:
                add_tar(spool, name, content)
            if len(stream.read(-member.size % BLOCK_BYTES)) < -member.size % BLOCK_BYTES:
                raise EOFError("it ends inside a member")
        while stream.read(CHUNK_BYTES):  # the checksum of the whole stands at its very end
            pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ShardError(f"{source}: not a whole gzip file ({error}): download it again") from None


def _members(source: Path, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Headers of the class tars; after each the stream stands at the tar's first byte."""
    while True:
        block = stream.read(BLOCK_BYTES)
        if block == bytes(BLOCK_BYTES):
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ShardError(f"{source}: damaged tar inside ({error}): download it again") from None
        if member.isdir():
            continue
        path = PurePosixPath(member.name)
        if not member.isreg() or path.suffix != ".tar" or not WNID.fullmatch(path.stem):
            raise ShardError(
                f"{source}: member {member.name} is no class tar: --source winter21-gz takes a tar of them"
            )
        yield member


def _content(source: Path, stream: BinaryIO, member: tarfile.TarInfo) -> Iterator[bytes]:
    left = member.size
    while left:
        piece = stream.read(min(left, CHUNK_BYTES))
        if not piece:
            raise ShardError(f"{source}: ends inside {member.name}: download it again")
        left -= len(piece)
        yield piece
