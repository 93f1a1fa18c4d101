"""Training state on disk: each rank writes the fragments it owns, any rank of any layout reads what it needs.

A rank's file is one safetensors file. A tensor's key is `<parameter name>|<offset>|<value>`: the run of the
flattened parameter that starts at `offset`, and which value it is (the fp32 `master` weights or one of the
optimizer's moments).
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.portable import LazyWeights
from vitscale.engine import AVERAGE, MASTER, Fragment
from vitscale.errors import CheckpointError

log = logging.getLogger(__name__)


class _Run(NamedTuple):
    offset: int
    numel: int
    file: Path
    key: str


def rank_file_name(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def write_fragments(fragments: Sequence[Fragment], path: Path) -> None:
    """Write the fragments that this rank is to save."""
    tensors = {
        f"{fragment.name}|{fragment.offset}|{key}": value.cpu().contiguous()
        for fragment in fragments
        if fragment.saved_here
        for key, value in fragment.values.items()
    }
    save_file(tensors, path)


def read_fragments(fragments: Sequence[Fragment], directory: Path, manifest: Manifest) -> None:
    """Fill the fragments from a checkpoint that any number of ranks wrote, at any ZeRO stage.

    Only the pieces that overlap the fragments are read. Where the checkpoint was saved without the weights' moving
    average, an average starts as its weights.

    Raises:
        CheckpointError: an element is in no file, or the checkpoint is of another model.
    """
    runs = _index_runs(directory, manifest)
    average = AVERAGE if any(value == AVERAGE for _, value in runs) else MASTER
    if average == MASTER and any(AVERAGE in fragment.values for fragment in fragments):
        log.warning("%s holds no moving average of the weights: it starts as the weights", directory)
    for fragment in fragments:
        for key, value in fragment.values.items():
            stored = average if key == AVERAGE else key
            _fill(value, fragment.offset, runs[fragment.name, stored], f"{fragment.name} ({stored})", directory)


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
    runs = _index_runs(directory, manifest)
    if all((name, value) not in runs for name in manifest.shapes):
        raise CheckpointError(f"{directory}: holds no {value} weights: use --weights raw")

    def whole(name: str) -> Tensor:
        shape = manifest.shapes[name]
        flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        _fill(flat, 0, runs[name, value], f"{name} ({value})", directory)
        return flat.view(shape)

    return LazyWeights({name: functools.partial(whole, name) for name in manifest.shapes})


def _index_runs(directory: Path, manifest: Manifest) -> dict[tuple[str, str], list[_Run]]:
    runs: dict[tuple[str, str], list[_Run]] = defaultdict(list)
    for rank in range(manifest.world_size):
        file = directory / rank_file_name(rank)
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                name, offset, value = key.split("|")
                runs[name, value].append(_Run(int(offset), tensors.get_slice(key).get_shape()[0], file, key))
    return runs


def _fill(target: Tensor, offset: int, runs: Sequence[_Run], what: str, directory: Path) -> None:
    """Copy elements [offset, offset + len(target)) of a parameter's value from the runs that hold them."""
    end = offset + target.numel()
    filled = 0
    for run in runs:
        start, stop = max(offset, run.offset), min(end, run.offset + run.numel)
        if start < stop:
            with _open(run.file) as tensors:
                piece = tensors.get_slice(run.key)[start - run.offset : stop - run.offset]
            target[start - offset : stop - offset].copy_(piece)
            filled += stop - start
    if filled != target.numel():
        raise CheckpointError(
            f"{directory}: holds {filled} of the {target.numel()} elements wanted of {what}: it is of another model"
        )


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
