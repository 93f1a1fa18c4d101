"""Checks a built dataset sample by sample."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.workers import ordered_map
from vitscale.data.decode import BadSample, decode
from vitscale.data.index import SplitIndex, open_split, read_dataset
from vitscale.errors import ShardError


@dataclass(frozen=True)
class ShardCheck:
    """The samples of one shard: keys, and their offset, size and crc32 as rows of an int64 array [3, n]."""

    shard: Path
    keys: tuple[str, ...]
    places: np.ndarray[tuple[int, int], np.dtype[np.int64]]


def verify(directory: Path, decode_images: bool, workers: int) -> tuple[int, list[str]]:
    """Number of samples read, and one line a fault.

    Raises:
        ShardError: there is no finished build in the directory.
    """
    samples, faults = 0, []
    for split in read_dataset(directory).splits:
        try:
            index = open_split(directory, split)
        except ShardError as error:
            faults.append(str(error))
            continue
        samples += len(index)
        results = ordered_map(partial(_check_shard, decode_images=decode_images), _shard_checks(index), workers)
        for found in tqdm(results, total=len(index.shards), unit="shard", disable=None):
            faults += found
    return samples, faults


def _shard_checks(index: SplitIndex) -> Iterator[ShardCheck]:
    for number, name in enumerate(index.shards):
        rows = np.flatnonzero(index.shard == number)
        rows = rows[np.argsort(index.offset[rows])]
        places = np.stack([index.offset[rows], index.size[rows], index.crc32[rows].astype(np.int64)])
        yield ShardCheck(index.root / name, tuple(index.keys.take(rows).to_pylist()), places)


def _check_shard(check: ShardCheck, decode_images: bool) -> list[str]:
    faults = []
    with check.shard.open("rb") as file:
        for key, offset, size, crc32 in zip(check.keys, *check.places.tolist(), strict=True):
            file.seek(offset)
            data = file.read(size)
            if zlib.crc32(data) != crc32:
                faults.append(f"{check.shard}: sample {key}: its crc32 is not the one in the index")
            elif decode_images:
                try:
                    decode(data)
                except BadSample as error:
                    faults.append(f"{check.shard}: sample {key}: {error}")
    return faults
