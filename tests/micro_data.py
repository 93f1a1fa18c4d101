"""Datasets of small images, written without the builder, and the loader over them."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from vitscale.config import BatchSplit, DataSection
from vitscale.data.augment import Augmentation
from vitscale.data.index import INDEX_SCHEMA, ShardFile, write_dataset_json, write_split
from vitscale.data.loader import TrainLoader
from vitscale.data.mixture import Mixture, Samples
from vitscale.data.recipes import MixtureRecipe
from vitscale.data.split import open_split

CLASSES = ("n00000001", "n00000002", "n00000003")


def jpeg(seed: int, height: int = 20, width: int = 26) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_dataset(root: Path, images: Sequence[bytes], shard_images: int = 7) -> Path:
    """A dataset of one split, train; image i has the label i mod 3."""
    root.mkdir()
    rows = []
    shards = []
    for number, first in enumerate(range(0, len(images), shard_images)):
        name = f"train-{number:06d}.tar"
        with tarfile.open(root / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, data in enumerate(images[first : first + shard_images], start=first):
                info = tarfile.TarInfo(f"image{i}.jpeg")
                info.size = len(data)
                place = (f"image{i}", name, tar.offset + 512, len(data), i % 3, CLASSES[i % 3])
                rows.append((*place, 26, 20, "jpeg", zlib.crc32(data)))
                tar.addfile(info, io.BytesIO(data))
        count = len(images[first : first + shard_images])
        shards.append(ShardFile(name=name, size_bytes=(root / name).stat().st_size, samples=count))
    columns = dict(zip(INDEX_SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
    table = pa.table(columns, schema=INDEX_SCHEMA)
    files = write_split(root, "train", CLASSES, table, shards)
    assert files.index_sha256 == hashlib.sha256((root / "train.parquet").read_bytes()).hexdigest()
    write_dataset_json(root, seed=0, plan="test", classes=CLASSES, splits={"train": files})
    return root


def mixture_of(section: DataSection, seed: int = 5) -> Mixture:
    """What the trainer would make of a section."""
    indexes = tuple(open_split(source.path, source.split) for source in section.sources)
    return Mixture(Samples(indexes), section.weights, seed, section.lanes, section.block, section.augment.repeats)


def train_loader(
    section: DataSection, split: BatchSplit, rank: int = 0, start: int = 0, mixture: Mixture | None = None
) -> TrainLoader:
    """The loader of images of 8 x 8 pixels."""
    mixture = mixture or mixture_of(section)
    augmentation = Augmentation(section.augment, mixture.seed, 8, section.flip, section.mean, section.std)
    return TrainLoader(MixtureRecipe(section, augmentation, split, rank, start, mixture))
