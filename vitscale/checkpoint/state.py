"""Training state on disk: each rank writes the fragments it owns, any rank of any layout reads what it needs.

A rank's file is one safetensors file. A tensor's key is `<parameter name>|<offset>|<value>`: the run of the
flattened parameter that starts at `offset`, and which value it is (the fp32 `master` weights or one of the
optimizer's moments). Which file holds what is read from the checkpoint's index; of the files only those with
something wanted are opened, each once, and read from front to back. Nothing is mapped into memory: a network file
system serves mapped pages one by one.
"""

import functools
import itertools
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vitscale.checkpoint.containers import SAFETENSORS_NAMES
from vitscale.checkpoint.index import rank_file_name, read_index
from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.portable import LazyWeights
from vitscale.engine import AVERAGE, MASTER, Fragment
from vitscale.errors import CheckpointError

log = logging.getLogger(__name__)

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_HOST_BUFFER_BYTES = 16 << 20


def read_fragments(fragments: Sequence[Fragment], directory: Path, manifest: Manifest) -> None:
    """Fill the fragments from a checkpoint that any number of ranks wrote, at any ZeRO stage.

    Only the pieces that overlap the fragments are read. Where the checkpoint was saved without the weights' moving
    average, an average starts as its weights.

    Raises:
        CheckpointError: an element is in no file, a file is damaged, or the checkpoint is of another model.
    """
    stored = _StoredState(directory, manifest)
    average = AVERAGE if stored.holds(AVERAGE) else MASTER
    if average == MASTER and any(AVERAGE in fragment.values for fragment in fragments):
        log.warning("%s holds no moving average of the weights: it starts as the weights", directory)
    pieces: list[_Piece] = []
    for fragment in fragments:
        for key, target in fragment.values.items():
            pieces += stored.find(fragment.name, average if key == AVERAGE else key, fragment.offset, target)
    stored.read(pieces)


def stored_weights(directory: Path, manifest: Manifest, value: str = MASTER) -> LazyWeights:
    """The fp32 weights of a checkpoint by parameter name, each put together when it is asked for, without any engine.

    Args:
        directory: of the tag.
        manifest: its manifest.
        value: which of the stored values, such as the weights themselves or their moving average.

    Raises:
        CheckpointError: the checkpoint holds no such value; when a tensor is asked for, that an element of it
            is in no file.
    """
    stored = _StoredState(directory, manifest)
    if not stored.holds(value):
        raise CheckpointError(f"{directory}: holds no {value} weights: use --weights raw")

    def whole(name: str) -> Tensor:
        tensor = torch.empty(manifest.shapes[name], dtype=torch.float32)
        stored.read(stored.find(name, value, 0, tensor.view(-1)))
        return tensor

    return LazyWeights({name: functools.partial(whole, name) for name in manifest.shapes})


class _Piece(NamedTuple):
    """What is wanted of one tensor of one file."""

    rank: int
    """That wrote the file."""
    byte: int
    """Of the file."""
    dtype: torch.dtype
    """In the file."""
    target: Tensor
    """Where it goes: [elements]."""


class _StoredState:
    """The values of a checkpoint, found by its index and read file by file."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._index = read_index(directory, manifest)

    def holds(self, value: str) -> bool:
        """Whether any parameter has this value."""
        return any(value in by_value for by_value in self._index.values.values())

    def find(self, name: str, value: str, offset: int, target: Tensor) -> list[_Piece]:
        """The places of elements [offset, offset + len(target)) of one parameter's value."""
        pieces: list[_Piece] = []
        end, filled = offset + target.numel(), 0
        strides = self._index.values.get(name, {}).get(value, [])
        first = max(0, bisect_right(strides, offset, key=lambda stride: stride.offset) - 1)
        for stride in itertools.takewhile(lambda stride: stride.offset < end, strides[first:]):
            dtype = _DTYPES[stride.dtype]
            # Elements counted from the stride's first.
            low, high = max(offset, stride.offset) - stride.offset, min(end, stride.end) - stride.offset
            for number in range(low // stride.numel, -(-high // stride.numel)):
                run = number * stride.numel
                start, stop = max(low, run), min(high, run + stride.numel)
                rank = stride.rank + number
                byte = self._index.data_starts[rank] + stride.byte + (start - run) * dtype.itemsize
                moved = stride.offset - offset
                pieces.append(_Piece(rank, byte, dtype, target[start + moved : stop + moved]))
                filled += stop - start
        if filled != target.numel():
            raise CheckpointError(
                f"{self._directory}: holds {filled} of the {target.numel()} elements wanted of {name} ({value}): "
                "it is of another model"
            )
        return pieces

    def read(self, pieces: Iterable[_Piece]) -> None:
        """Fill the targets; every file is opened once and read in the order of its bytes."""
        ordered = sorted(pieces, key=lambda piece: (piece.rank, piece.byte))
        pinned = any(piece.target.is_cuda for piece in ordered)
        buffer = torch.empty(_HOST_BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
        for rank, of_file in itertools.groupby(ordered, key=lambda piece: piece.rank):
            path = self._directory / rank_file_name(rank)
            try:
                with FileIO(path) as file:
                    for piece in of_file:
                        _fill(piece, file, buffer)
            except OSError as error:
                raise CheckpointError.of_system(error, f"{path}: cannot be read: {error.strerror}") from None


def _fill(piece: _Piece, file: FileIO, buffer: Tensor) -> None:
    """Read straight into the target where it can take the file's bytes, else through the buffer."""
    target = piece.target.detach()
    if target.is_cpu and target.dtype == piece.dtype and target.is_contiguous():
        _read_bytes(file, piece.byte, target.view(torch.uint8))
        return
    size_bytes, byte = piece.dtype.itemsize, piece.byte
    for part in torch.split(target, len(buffer) // size_bytes):
        staged = buffer[: part.numel() * size_bytes]
        _read_bytes(file, byte, staged)
        part.copy_(staged.view(piece.dtype))
        byte += len(staged)


def _read_bytes(file: FileIO, byte: int, target: Tensor) -> None:
    into = target.numpy().data
    while into:  # one call gives 2 GiB at most
        count = os.preadv(file.fileno(), [into], byte)
        if not count:
            raise CheckpointError(f"{file.name}: ends at byte {byte}, in the midst of the state: it is damaged")
        into, byte = into[count:], byte + count
