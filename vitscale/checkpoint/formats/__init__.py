"""Formats of exported models, each in a module of its own behind one protocol."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vitscale.checkpoint.card import CARD_NAME
from vitscale.checkpoint.formats.deepspeed_folder import DeepSpeedReader
from vitscale.checkpoint.formats.folder_config import CONFIG_NAME, WEIGHTS_NAME
from vitscale.checkpoint.formats.hf_folder import HfFormat
from vitscale.checkpoint.formats.npz import ARRAYS_NAME, NpzFormat
from vitscale.checkpoint.formats.npz_links import BIG_VISION, ORIGINAL
from vitscale.checkpoint.formats.own import OwnFormat
from vitscale.checkpoint.formats.protocol import Format, Reader
from vitscale.checkpoint.formats.state_dict import StateDictReader
from vitscale.checkpoint.formats.timm_folder import TimmFormat
from vitscale.checkpoint.portable import Hints, PortableModel
from vitscale.errors import CheckpointError

_FORMATS: tuple[Format, ...] = (
    OwnFormat(),
    TimmFormat(),
    HfFormat(),
    NpzFormat("npz", ORIGINAL),
    NpzFormat("big_vision", BIG_VISION),
)
FORMATS: Mapping[str, Format] = MappingProxyType({format_.name: format_ for format_ in _FORMATS})
"""The formats that are written and read, by their words on the command line."""
_READ_ONLY: tuple[Reader, ...] = (StateDictReader(), DeepSpeedReader())
READERS: Mapping[str, Reader] = MappingProxyType({**FORMATS, **{reader.name: reader for reader in _READ_ONLY}})
"""Those that are only read, too."""


def format_of(path: Path) -> str | None:
    """Name of the format that knows a folder or file; None where none does.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return next((name for name, reader in READERS.items() if reader.recognises(path)), None)
    except OSError as error:
        raise _unreadable(path, error) from None


def read_portable(path: Path, format_: str | None = None, hints: Hints | None = None) -> PortableModel:
    """The model in a folder or file of any format.

    Args:
        path: a folder that some format wrote, or a file of weights. The file of such a folder stands for the folder.
        format_: the format; found by looking if not given.
        hints: what the user says about a file that does not say it itself.

    Raises:
        CheckpointError: there is nothing, no format knows it, or it is damaged.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if path.name in {WEIGHTS_NAME, ARRAYS_NAME} and _is_described(path.parent):
            path = path.parent
        found = format_ or format_of(path)
        if found is None:
            raise CheckpointError(
                f"{path}: no exported model: give a folder with card.json or config.json (`vitscale export` makes one "
                "of a run), one that DeepSpeed saved to, or a file that ends in .npz, .pth, .pt, .bin or .safetensors"
            )
        return READERS[found].read(path, hints or Hints())
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror or error}")


def _is_described(folder: Path) -> bool:
    """Whether a card or config says what the weights in a folder are."""
    return any((folder / name).is_file() for name in (CARD_NAME, CONFIG_NAME))


__all__ = ["FORMATS", "READERS", "Format", "Hints", "Reader", "format_of", "read_portable"]
