"""Files of weights without a config, read only: DeiT, DINO, MIIL and timm's own `.pth`, or safetensors alike."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vitscale.checkpoint.containers import TensorFile, open_tensors
from vitscale.checkpoint.formats.inference import variant_of_state_dict
from vitscale.checkpoint.integrity import sha256_of
from vitscale.checkpoint.portable import Hints, Origin, PortableModel, Shapes, own_names, parameter_shapes, read_linked
from vitscale.errors import CheckpointError
from vitscale.model import TABLE

SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}
# Data-parallel wrappers, and the backbone beside DINO's projection head.
_PREFIX = re.compile(r"^(?:module\.)?(?:backbone\.|model\.)?")
_DINO_HEAD = re.compile(r"^(?:module\.)?head\.(?:mlp|last_layer)\b")
# DeiT III and CaiT name LayerScale's factors so.
_GAMMA = re.compile(r"\.gamma_([12])$")


class StateDictReader:
    """See `Reader`."""

    name = "state_dict"

    def recognises(self, path: Path) -> bool:
        """A file by its ending."""
        return path.suffix in SUFFIXES

    def read(self, path: Path, hints: Hints) -> PortableModel:
        """See `Reader`. `hints.name` must be given: no tensor tells the heads and the pixels."""
        return undescribed(open_tensors(path), Origin(path.name, sha256_of(path)), hints)


def undescribed(
    file: TensorFile, origin: Origin, hints: Hints, trained: Mapping[str, Any] | None = None
) -> PortableModel:
    """The model of tensors with timm's names, of which nothing but `hints` says what they are.

    Raises:
        CheckpointError: `hints` names no variant, or the tensors are of another one.
    """
    renamed, where = Renamed(file), str(file.path)
    variant = variant_of_state_dict(renamed.shapes, where, hints)
    assert hints.name is not None  # without it the line above raises
    mend = f"it was taken for {hints.name}: say what it is with --model"
    weights = read_linked(renamed, renamed.shapes, where, own_names(variant), parameter_shapes(variant), mend)
    pixels = TABLE[hints.name].preprocessing
    return PortableModel(hints.name, variant, weights, pixels, origin, hints.labels, trained or {})


class Renamed(Mapping[str, Tensor]):
    """A file's tensors under timm's names of today."""

    def __init__(self, file: TensorFile) -> None:
        """Raises CheckpointError where two tensors would have one name."""
        self._file = file
        self._keys: dict[str, str] = {}
        for key in file:
            name = _today(key)
            if name in self._keys:
                raise CheckpointError(f"{file.path}: {self._keys[name]} and {key} would both be {name}: keep one")
            if not _DINO_HEAD.match(key):
                self._keys[name] = key
        self.shapes: Shapes = {name: self._shape(name) for name in self._keys}

    def __getitem__(self, name: str) -> Tensor:
        # A stem that cut patches by hand and multiplied them by a matrix: the same numbers as a convolution.
        return self._file[self._keys[name]].reshape(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._file.shapes[self._keys[name]]
        if name != "patch_embed.proj.weight" or len(shape) != 2:
            return shape
        side = math.isqrt(shape[1] // 3)
        return (shape[0], 3, side, side) if 3 * side * side == shape[1] else shape


def _today(key: str) -> str:
    return _GAMMA.sub(r".ls\1.gamma", _PREFIX.sub("", key))
