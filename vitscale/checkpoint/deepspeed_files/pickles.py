"""DeepSpeed's torch pickles: what they hold without their tensors, and a tensor, or a run of it, when it is needed.

torch's unpickler is limited to tensors and plain containers. The few classes that DeepSpeed pickles beside them are
read as stand-ins without any code of their own, so neither DeepSpeed nor anything that a file names is imported.
"""

import logging
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.checkpoint.containers import one_line, printable, reason
from vitscale.errors import CheckpointError

log = logging.getLogger(__name__)


class _Inert:
    """Stands for what is of no use here: takes whatever it is made of, and keeps nothing."""

    def __new__(cls, *_: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Address:
    """Stands for DeepSpeed's fragment_address: `start` and `numel` of a run in a flat tensor."""


# Beside DeepSpeed's own: what training scripts keep in `client_state`, arguments and states of random generators.
_INERT_NAMES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "_codecs.encode",
)
_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Address, "deepspeed.utils.tensor_fragment.fragment_address"),
    *((_Inert, name) for name in _INERT_NAMES),
]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file."""

    path: Path
    start_byte: int
    """Of its first element in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            CheckpointError: the file ends before it does.
        """
        empty = 0 in self.shape
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self._elements(0, 0 if empty else extent).as_strided(self.shape, self.stride)

    def run(self, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flat tensor.

        Raises:
            ValueError: it is not flat, or has no such elements.
            CheckpointError: the file ends before they do.
        """
        if self.stride != (1,) or not 0 <= start <= start + numel <= self.shape[0]:
            raise ValueError(f"elements {start} to {start + numel} of a tensor of shape {list(self.shape)}")
        return self._elements(start, numel)

    def _elements(self, start: int, numel: int) -> Tensor:
        tensor = torch.empty(numel, dtype=self.dtype)
        data = tensor.view(torch.uint8).numpy().data  # as bytes, since NumPy has no bf16
        with self.path.open("rb") as file:
            file.seek(self.start_byte + start * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{self.path}: truncated: the file ends within a tensor that it lists")
        return tensor


def read_pickle(path: Path, unsafe: bool = False) -> Any:
    """What a file holds, with a `StoredTensor` in the place of each tensor.

    Args:
        path: a file that `torch.save` wrote.
        unsafe: whether to execute a pickle that cannot be read otherwise, which is then said.

    Raises:
        CheckpointError: the file is missing or damaged, or holds what only executing it could read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing: the save was cut off, or not all files were copied")
    try:
        _check(path)
        return _stored(_load(path, unsafe), path)
    except CheckpointError:
        raise
    except Exception as error:  # damage ends in zlib.error, AssertionError, struct.error, and what else there may be
        raise CheckpointError(
            f"{path}: truncated or damaged, no readable torch checkpoint ({one_line(error)}): copy the file anew"
        ) from None


def _check(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:  # a tensor is read from where it lies in the file
                raise CheckpointError(
                    f"{path}: {printable(entry.filename)} is compressed, which torch.save never does: copy the file "
                    "anew from where it was saved"
                )
        if bad := archive.testzip():  # torch and DeepSpeed do not look at the checksums
            raise CheckpointError(f"{path}: damaged: {printable(bad)} is not what its CRC-32 says: copy the file anew")


def _load(path: Path, unsafe: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        if not unsafe:
            raise CheckpointError(
                f"{path}: holds more than tensors, which only executing it could read: refused ({reason(error)}): "
                "give --unsafe-pickle if you trust whoever wrote it"
            ) from None
    log.warning("--unsafe-pickle: executing %s, which can do whatever this account can", path)
    return torch.load(path, map_location="meta", weights_only=False)


def _stored(tree: Any, path: Path) -> Any:
    """A tree of containers with its tensors replaced."""
    if isinstance(tree, Tensor):
        storage: Any = tree.untyped_storage()
        # Where torch found the storage in the file; it says so where it does not read it.
        start_byte = storage._checkpoint_offset + tree.storage_offset() * tree.dtype.itemsize
        return StoredTensor(path, start_byte, tree.dtype, tuple(tree.shape), tuple(tree.stride()))
    if isinstance(tree, dict):
        return {key: _stored(value, path) for key, value in tree.items()}
    if type(tree) in (list, tuple):  # not a torch.Size
        return [_stored(value, path) for value in tree]
    return tree
