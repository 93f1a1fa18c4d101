"""A copy of the training state in host memory, from which it is written while training goes on.

The copy has the layout of the file: header, then all bytes of all tensors, so that writing is one sequential stream.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vitscale.checkpoint.containers import SAFETENSORS_NAMES, safetensors_header
from vitscale.checkpoint.manifest import FileRecord
from vitscale.engine import Fragment

_CHUNK_BYTES = 16 << 20
"""Small enough that hashing it overlaps with the writing of the one before, large enough for a striped file system."""


class _Piece(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int
    start: int
    """Byte in the buffer."""

    @property
    def end(self) -> int:
        return self.start + self.numel * self.dtype.itemsize


class Snapshot:
    """The state that this rank saves, as it was when it was taken last; its memory is used again each time."""

    def __init__(self) -> None:
        """Hold nothing yet; the first `take` allocates."""
        self._pieces: tuple[_Piece, ...] = ()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return self._buffer.numel()

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copy what this rank is to save; when it returns, training may go on.

        Args:
            fragments: of the engine, always with the same layout.
        """
        values = {
            f"{fragment.name}|{fragment.offset}|{key}": value
            for fragment in fragments
            if fragment.saved_here
            for key, value in fragment.values.items()
        }
        if not self._pieces:
            self._allocate(values)
        assert values.keys() == {piece.key for piece in self._pieces}, "an engine's layout does not change"
        devices = {value.device for value in values.values() if value.is_cuda}
        for piece in self._pieces:
            here = self._buffer[piece.start : piece.end].view(piece.dtype)
            here.copy_(values[piece.key], non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)

    def write(self, path: Path) -> FileRecord:
        """Write the copy as a safetensors file and flush it to the disk.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        digest = hashlib.sha256()
        try:
            # Hashing and writing both let go of the interpreter, so they overlap each other and the training.
            with ThreadPoolExecutor(1) as hasher, path.open("wb", buffering=0) as file:
                for chunk in self._chunks():
                    hasher.submit(digest.update, chunk)
                    written = 0
                    while written < len(chunk):
                        written += file.write(chunk[written:])
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)  # a full disk has room again for what else the run has to say
            raise
        return FileRecord(name=path.name, size_bytes=path.stat().st_size, sha256=digest.hexdigest())

    def _allocate(self, values: dict[str, Tensor]) -> None:
        pieces, end = [], 0
        # Wide elements first: every piece then starts at a multiple of its element's size, without gaps.
        for key, value in sorted(values.items(), key=lambda item: -item[1].element_size()):
            pieces.append(_Piece(key, value.dtype, value.numel(), end))
            end = pieces[-1].end
        self._pieces = tuple(pieces)
        self._buffer = torch.empty(end, dtype=torch.uint8)
        if end and any(value.is_cuda for value in values.values()):
            # Pinned, the copy runs at the bus's full rate; torch's own pinned memory comes in powers of two.
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(runtime.cudaHostRegister(self._buffer.data_ptr(), end, 0))

    def _chunks(self) -> Iterable[memoryview]:
        table = {
            piece.key: {
                "dtype": SAFETENSORS_NAMES[piece.dtype],
                "shape": [piece.numel],
                "data_offsets": [piece.start, piece.end],
            }
            for piece in self._pieces
        }
        yield memoryview(safetensors_header(table))
        data = self._buffer.numpy().data
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]


def write_fragments(fragments: Iterable[Fragment], path: Path) -> FileRecord:
    """Write what this rank is to save of the fragments."""
    snapshot = Snapshot()
    snapshot.take(fragments)
    return snapshot.write(path)
