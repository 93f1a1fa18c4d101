import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from vitscale.config import DataSection
from vitscale.data.index import INDEX_SCHEMA, ShardFile, SplitFiles, split_hash, write_dataset_json, write_index

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
        shards.append(ShardFile(name=name, size_bytes=(root / name).stat().st_size))
    columns = dict(zip(INDEX_SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
    table = pa.table(columns, schema=INDEX_SCHEMA)
    sha256 = write_index(root / "train.parquet", table)
    assert sha256 == hashlib.sha256((root / "train.parquet").read_bytes()).hexdigest()
    files = SplitFiles(
        samples=len(images),
        shards=tuple(shards),
        index="train.parquet",
        index_sha256=sha256,
        hash=split_hash(CLASSES, table),
    )
    write_dataset_json(root, 0, "test", CLASSES, {"train": files})
    return root


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    return [jpeg(i) for i in range(45)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Path:
    """45 sound images in 7 shards. Tests only read it."""
    return write_dataset(tmp_path_factory.mktemp("data") / "sound", images)


@pytest.fixture
def dataset_of(tmp_path: Path) -> Callable[[Sequence[bytes]], Path]:
    """Writes the images a test gives as a dataset."""
    return lambda images: write_dataset(tmp_path / "set", images)


@pytest.fixture
def section(dataset: Path) -> DataSection:
    split = {"path": dataset, "split": "train"}
    return DataSection.model_validate({"train": split, "workers": 0, "lanes": 4, "block": 3, "bad_sample_budget": 5})
