"""Formats of exported models, each in a module of its own behind one protocol."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vitscale.checkpoint.formats.hf_folder import HfFormat
from vitscale.checkpoint.formats.npz import NpzFormat
from vitscale.checkpoint.formats.npz_links import BIG_VISION, ORIGINAL
from vitscale.checkpoint.formats.own import WEIGHTS_NAME, OwnFormat
from vitscale.checkpoint.formats.protocol import Format, Hints
from vitscale.checkpoint.formats.state_dict import StateDictFormat
from vitscale.checkpoint.formats.timm_folder import TimmFormat
from vitscale.checkpoint.portable import PortableModel
from vitscale.errors import CheckpointError

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        format_.name: format_
        for format_ in (
            OwnFormat(),
            TimmFormat(),
            HfFormat(),
            NpzFormat("npz", ORIGINAL),
            NpzFormat("big_vision", BIG_VISION),
            StateDictFormat(),
        )
    }
)
"""Every format by its word on the command line; `state_dict` is only read."""
WRITTEN = tuple(name for name in FORMATS if name != "state_dict")
"""The formats that can be written."""


def read_portable(path: Path, format_: str | None = None, hints: Hints | None = None) -> PortableModel:
    """The model in a folder or file of any format.

    Args:
        path: a folder that some format wrote, or a file of weights.
        format_: the format; found by looking if not given.
        hints: what the user says about a file that does not say it itself.

    Raises:
        CheckpointError: there is nothing, no format knows it, or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    found = [FORMATS[format_]] if format_ else [known for known in FORMATS.values() if known.recognises(path)]
    if not found:
        raise CheckpointError(
            f"{path}: no exported model: give a folder with weights beside their card.json or config.json, or a file "
            "that ends in .npz, .pth, .pt, .bin or .safetensors"
        )
    return found[0].read(path, hints or Hints())


__all__ = ["FORMATS", "WEIGHTS_NAME", "WRITTEN", "Format", "Hints", "read_portable"]
