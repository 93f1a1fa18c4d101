"""Files that hold named tensors: safetensors, NumPy's npz and torch's pickles, read and written one tensor at a time.

Nothing from outside is ever executed: safetensors has no code, npz is read without pickles, and torch's
unpickler is limited to tensors. Writing holds one tensor in memory, whatever the size of the file.
"""

import argparse
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from vitscale.errors import CheckpointError

Precision = Literal["fp32", "bf16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_HEADER_ALIGNMENT = 8
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# Training scripts keep their arguments beside the weights (DeiT, DINO, MAE): a class with nothing but attributes.
_HARMLESS_CLASSES: list[Any] = [argparse.Namespace]


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one file by key, each read when it is asked for."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        """`shapes` lists the keys; `read` gives one tensor."""
        self.path = path
        self.shapes = shapes
        self._read = read

    def __getitem__(self, key: str) -> Tensor:
        """One tensor in its own dtype.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            tensor = self._read(key)
            if tensor.dtype not in _FLOATS or tensor.layout != torch.strided:
                raise ValueError(f"it is {tensor.dtype}, {tensor.layout}: weights are dense floats")
            return tensor
        except Exception as error:  # of any kind: see `_open_npz`
            raise CheckpointError(f"{self.path}: {printable(key)} cannot be read: {one_line(error)}") from None

    def __iter__(self) -> Iterator[str]:
        """The keys, in the file's order."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.shapes)


def open_tensors(path: Path) -> TensorFile:
    """Open a file of tensors by its ending: .safetensors, .npz, or a torch pickle (.pth, .pt, .bin).

    Raises:
        CheckpointError: it is missing, truncated, no such file, or holds what is not a tensor.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix == ".npz":
        return _open_npz(path)
    if path.suffix in {".pth", ".pt", ".bin"}:
        return _open_pickle(path)
    raise CheckpointError(f"{path}: weights are read from .safetensors, .npz, .pth, .pt and .bin, not {path.suffix!r}")


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, tuple[int, ...], Callable[[], Tensor]]], precision: Precision
) -> None:
    """Write (key, shape, maker) triples as safetensors; each maker is called when its tensor is written."""
    planned = list(tensors)
    dtype = DTYPES[precision]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # torch's layout; transformers asks for it
    end = 0
    for key, shape, _ in planned:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    with path.open("wb") as file:
        file.write(safetensors_header(header))
        for key, shape, make in tqdm(planned, desc=path.name, unit="tensor", disable=None, leave=False):
            tensor = make().to(dtype).contiguous()
            assert tuple(tensor.shape) == tuple(shape), f"{key}: {tuple(tensor.shape)} is not {shape}"
            # A view as bytes: NumPy has no bf16. Scalars have no last dimension to view.
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def safetensors_header(table: Mapping[str, Any]) -> bytes:
    """What stands before the data of a safetensors file: the table as JSON, and before it its length in bytes.

    Args:
        table: `dtype`, `shape` and `data_offsets` of each key; texts by their names as `__metadata__`.
    """
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_npz(path: Path, arrays: Iterable[tuple[str, Callable[[], Tensor]]]) -> None:
    """Write (key, maker) pairs as an uncompressed fp32 npz, which `numpy.load` reads."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key, make in tqdm(list(arrays), desc=path.name, unit="array", disable=None, leave=False):
            entry = zipfile.ZipInfo(f"{key}.npy")  # without a time, so that equal weights are equal files
            with archive.open(entry, "w", force_zip64=True) as file:
                npy.write_array(file, make().float().contiguous().numpy(), allow_pickle=False)


def _open_safetensors(path: Path) -> TensorFile:
    try:
        with _mapped(path) as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {one_line(error)}") from None

    def read(key: str) -> Tensor:
        with _mapped(path) as file:
            return file.get_tensor(key)  # type: ignore[no-any-return]

    return TensorFile(path, shapes, read)


def _mapped(path: Path) -> Any:
    """The file, mapped anew for each tensor: the pages of a mapping that stays would count as memory to its end."""
    return safe_open(path, framework="pt")


def _open_npz(path: Path) -> TensorFile:
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        archive = zipfile.ZipFile(path)
        for entry in archive.namelist():
            if not entry.endswith(".npy"):
                continue  # a text beside the arrays
            key = entry.removesuffix(".npy")
            with archive.open(entry) as file:
                shape, dtype = _npy_header(file)
            if dtype.hasobject:
                raise CheckpointError(
                    f"{path}: {printable(key)} is an array of Python objects, which only executing a pickle could "
                    "read: refused"
                )
            shapes[key] = shape
    except CheckpointError:
        raise
    except Exception as error:  # damage ends in zlib.error, SyntaxError, TokenError, and what else there may be
        raise CheckpointError(f"{path}: not a readable npz file: {one_line(error)}") from None

    def read(key: str) -> Tensor:
        with archive.open(f"{key}.npy") as file:
            array = npy.read_array(file, allow_pickle=False)
        if array.dtype == np.dtype("V2"):  # how JAX's bf16 arrives in NumPy
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"its dtype is {array.dtype}, not a number")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

    return TensorFile(path, shapes, read)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _open_pickle(path: Path) -> TensorFile:
    try:
        with torch.serialization.safe_globals(_HARMLESS_CLASSES):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, which only executing it could read: refused ({reason(error)}): "
            "have it saved as a state dict alone, or as safetensors"
        ) from None
    except Exception as error:  # damage ends in AssertionError, IndexError, struct.error, and what else there may be
        raise CheckpointError(f"{path}: not a readable torch checkpoint: {reason(error)}") from None
    tensors = _state_dict_in(tree)
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no state dict: its tensors by name were expected, at the top or as 'model'"
        )
    return TensorFile(path, {key: tuple(value.shape) for key, value in tensors.items()}, tensors.__getitem__)


def _state_dict_in(tree: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint: at the top, or under DeiT's and MAE's `model`, timm's `state_dict` or DINO's
    `teacher`."""
    if not isinstance(tree, Mapping):
        return {}
    for key in ("model", "state_dict", "teacher"):
        if isinstance(tree.get(key), Mapping):
            return _state_dict_in(tree[key])
    return {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}


def printable(text: str) -> str:
    """Text out of a file for a message: on one line, and nothing that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return printable(str(error)) or type(error).__name__


def reason(error: BaseException) -> str:
    """Why torch's unpickler refused a file, without its long advice on how to read it all the same."""
    text = str(error)
    said = text.partition("WeightsUnpickler error:")[2] or text.rpartition("from a trusted source.")[2]
    said = said.strip() or type(error).__name__
    return printable(said.splitlines()[0].partition(". Please ")[0])
