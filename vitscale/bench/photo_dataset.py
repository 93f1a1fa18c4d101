"""Datasets to measure loaders on: photographs in shards with an index, and an index as long as ImageNet-21k's.

Shards are laid out as the builder lays them out: KEY.jpg, KEY.cls, KEY.wnid.
"""

import io
import tarfile
import zlib
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitscale.bench.decode import photographs
from vitscale.data.index import (
    INDEX_SCHEMA,
    ShardFile,
    read_dataset,
    write_dataset_json,
    write_split,
)

SPLIT = "train"
CLASSES = tuple(f"n{label:08d}" for label in range(1000))
TAR_BLOCK_BYTES = 512


def write_photo_dataset(
    folder: Path, images: int, shard_images: int, distinct: int = 16, classes: Sequence[str] = CLASSES
) -> Path:
    """A dataset of `images` photographs of 400 x 350 pixels and about 98 KB, some of them alike; gives its folder."""
    photos, *_ = photographs(distinct).values()
    drawn = np.random.default_rng(0).integers(0, len(classes), images).tolist()
    samples = [
        (photo, label, classes[label]) for photo, label in zip(islice(cycle(photos), images), drawn, strict=True)
    ]
    folder.mkdir(parents=True)
    rows: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
    shards = []
    for number, first in enumerate(range(0, images, shard_images)):
        path = folder / f"{SPLIT}-{number:06d}.tar"
        part = samples[first : first + shard_images]
        _write_shard(path, first, part, rows)
        shards.append(ShardFile(name=path.name, size_bytes=path.stat().st_size, samples=len(part)))
    table = pa.table(rows, schema=INDEX_SCHEMA)
    _finish(folder, table, shards, classes, shards_at="")
    return folder


def write_long_index(folder: Path, photos: Path, samples: int) -> Path:
    """A dataset of `samples` rows that all lie in the shards of another one, in turn; gives its folder.

    Keys, labels and length are those of a large dataset, while every row can be read.
    """
    folder.mkdir(parents=True)
    real = pq.read_table(photos / f"{SPLIT}.parquet")
    numbers = np.arange(samples)
    labels = np.random.default_rng(0).integers(0, len(CLASSES), samples, dtype=np.int32)
    wnid = pa.DictionaryArray.from_arrays(pa.array(labels), pa.array(CLASSES))
    keys = pc.binary_join_element_wise(wnid.cast(pa.string()), pa.array(numbers).cast(pa.string()), "_")
    table = real.take(numbers % len(real)).combine_chunks()
    for name, column in (("key", keys), ("label", pa.array(labels)), ("wnid", wnid)):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, INDEX_SCHEMA.field(name), column)
    shards = read_dataset(photos).splits[SPLIT].shards
    _finish(folder, table, shards, CLASSES, shards_at=str(photos))
    return folder


def _write_shard(path: Path, first: int, samples: Sequence[tuple[bytes, int, str]], rows: dict[str, list[Any]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (photo, label, wnid) in enumerate(samples, start=first):
            key = f"{number:08d}"
            place = (key, path.name, tar.offset + TAR_BLOCK_BYTES, len(photo), label, wnid)
            for column, value in zip(rows.values(), (*place, 400, 350, "jpeg", zlib.crc32(photo)), strict=True):
                column.append(value)
            for ending, data in (("jpeg", photo), ("cls", str(label).encode()), ("wnid", wnid.encode())):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _finish(folder: Path, table: pa.Table, shards: Sequence[ShardFile], classes: Sequence[str], shards_at: str) -> None:
    files = write_split(folder, SPLIT, classes, table, shards)
    write_dataset_json(folder, seed=0, plan="bench", classes=classes, splits={SPLIT: files}, shards_at=shards_at)
