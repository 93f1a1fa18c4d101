"""What folders with a `config.json` have in common, whoever wrote them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitscale.errors import CheckpointError, ConfigError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_OLD_WEIGHTS_NAME = "pytorch_model.bin"


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder: safetensors, or the pickle of older days (which is read without code).

    Raises:
        CheckpointError: there is neither.
    """
    for name in (WEIGHTS_NAME, _OLD_WEIGHTS_NAME):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder}: neither {WEIGHTS_NAME} nor {_OLD_WEIGHTS_NAME} is here (weights in several files: save them as one)"
    )


def read_json(path: Path, kinds: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """A config; `kinds` are the types that some of its values must have where they are given.

    Raises:
        CheckpointError: it is missing, no JSON, or no object, or a value is of another type.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(tree).__name__}")
    for key, kind in (kinds or {}).items():
        if key in tree and not isinstance(tree[key], kind):
            raise CheckpointError(f"{path}: {key} is {json.dumps(tree[key])[:80]}, which is no value for it")
    return tree


@contextmanager
def understanding(where: Path) -> Iterator[None]:
    """Name the config whose values cannot be used.

    Raises:
        CheckpointError: in place of what they raised.
    """
    try:
        yield
    except (ConfigError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: cannot be used: {' '.join(str(error).split())}") from None


def label_list(labels: Sequence[Any] | Mapping[str, Any]) -> tuple[str, ...]:
    """Class names in label order, from a list or from ids to names.

    Raises:
        ValueError: the ids are not 0, 1, 2 and so on, or a name is no text.
    """
    if isinstance(labels, Mapping):
        by_id = {int(key): name for key, name in labels.items()}
        if sorted(by_id) != list(range(len(by_id))):
            raise ValueError(f"the labels' ids run from {min(by_id)} to {max(by_id)}, not from 0 to {len(by_id) - 1}")
        labels = [by_id[index] for index in range(len(by_id))]
    if odd := [name for name in labels if not isinstance(name, str)]:
        raise ValueError(f"label {odd[0]!r} is no text")
    return tuple(labels)


def rgb(values: Sequence[float]) -> tuple[float, float, float]:
    """A mean or deviation of the pixels for three channels; of one or four it is read where all are the same.

    Raises:
        ValueError: they differ.
    """
    red, green, blue = values if len(values) == 3 or len(set(values)) != 1 else [values[0]] * 3
    return float(red), float(green), float(blue)


def size_argument(pair: tuple[int, int]) -> int | list[int]:
    """(height, width) as configs write it: one number for a square."""
    return pair[0] if pair[0] == pair[1] else list(pair)
