"""The format of a built dataset: tar shards, one Parquet index a split, and dataset.json.

    dataset.json                     what belongs together: classes, splits, shards with their sizes
    train.parquet val.parquet        one row a sample: where its bytes are and what they show
    train-000000.tar val-000000.tar  shards by the WebDataset convention

dataset.json is written last, so a folder without it is an unfinished build. This file alone knows the
format: the builders write with it, training reads with it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from vitscale.errors import ShardError

SCHEMA_VERSION = 1
DATASET_FILE = "dataset.json"
VERSION_KEY = b"vitscale.index"

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # unique in the dataset
        pa.field("shard", pa.dictionary(pa.int32(), pa.string()), nullable=False),  # relative to the folder
        pa.field("offset", pa.int64(), nullable=False),  # of the image's first byte in the shard
        pa.field("size", pa.int64(), nullable=False),  # of the image, in bytes
        pa.field("label", pa.int32(), nullable=False),  # place of the wnid among the classes
        pa.field("wnid", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # in pixels; 0 where the image cannot be read
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.dictionary(pa.int32(), pa.string()), nullable=False),  # jpeg, png, webp, ...
        pa.field("crc32", pa.uint32(), nullable=False),  # of the image's bytes
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardFile(_Part):
    """A shard as dataset.json lists it."""

    name: str
    size_bytes: int


class SplitFiles(_Part):
    """A split as dataset.json lists it; `hash` is the identity of its samples, in their order."""

    samples: int
    shards: tuple[ShardFile, ...]
    index: str
    index_sha256: str
    hash: str


class Dataset(_Part):
    """The content of dataset.json. Classes are the wnids in label order; `plan` is the identity of the build."""

    schema_version: int
    seed: int
    plan: str
    classes: tuple[str, ...]
    splits: dict[str, SplitFiles]
    hash: str


@dataclass(frozen=True)
class SplitIndex:
    """The samples of one split, a row each, as columns of length N.

    `shard` holds places in `shards`; `hash` is the identity of the split's samples and classes, whatever
    shards they lie in.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    shards: tuple[str, ...]
    hash: str
    keys: pa.StringArray
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int32]
    crc32: NDArray[np.uint32]

    def __len__(self) -> int:
        """Samples in the split."""
        return len(self.keys)

    def key(self, row: int) -> str:
        """Name of the sample at a row."""
        return str(self.keys[row])

    def shard_path(self, row: int) -> Path:
        """The shard that holds the sample at a row."""
        return self.root / self.shards[int(self.shard[row])]


def read_dataset(path: Path) -> Dataset:
    """Read the dataset.json of a folder.

    Raises:
        ShardError: the folder holds no finished build, or one of another schema version.
    """
    file = path / DATASET_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(f"{file}: not found: give the folder of a finished `vitscale-data build`") from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{file}: cannot be read ({error}): build the dataset again") from None
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise ShardError(
            f"{file}: schema_version is {version}, this vitscale reads {SCHEMA_VERSION}: build the dataset again"
        )
    try:
        return Dataset.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ShardError(f"{file}: {where}: {problem['msg']}: build the dataset again") from None


def open_split(path: Path, split: str) -> SplitIndex:
    """Open one split of a built dataset, after the checks that need no sample to be read.

    Raises:
        ShardError: dataset.json, the index or a shard is missing, damaged or belongs to another dataset.
    """
    dataset = read_dataset(path)
    if split not in dataset.splits:
        raise ShardError(f"{path / DATASET_FILE}: no split {split!r}: it has {', '.join(sorted(dataset.splits))}")
    files = dataset.splits[split]
    _check_shards(path, files.shards)
    table = _read_index(path / files.index, files.index_sha256)
    index = _to_columns(path, split, dataset, table)
    _check_rows(index, path / files.index, files)
    return index


def write_index(path: Path, table: pa.Table) -> str:
    """Write the index of a split (columns of INDEX_SCHEMA, one row a sample) and return its sha256."""
    pq.write_table(table.cast(INDEX_SCHEMA).unify_dictionaries().combine_chunks(), path, compression="zstd")
    return _sha256_of_file(path)


def split_hash(classes: Sequence[str], table: pa.Table) -> str:
    """Identity of a split: classes, and every sample's key, label, size and crc32, in their order."""
    digest = hashlib.sha256("\n".join(classes).encode())
    digest.update("\n".join(table["key"].to_pylist()).encode())
    for column in ("label", "size", "crc32"):
        digest.update(table[column].to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def write_dataset_json(path: Path, seed: int, plan: str, classes: Sequence[str], splits: dict[str, SplitFiles]) -> None:
    """Write dataset.json, whole or not at all; it makes the folder a finished build."""
    identity = hashlib.sha256("\n".join(f"{name} {splits[name].hash}" for name in sorted(splits)).encode())
    dataset = Dataset(
        schema_version=SCHEMA_VERSION,
        seed=seed,
        plan=plan,
        classes=tuple(classes),
        splits=splits,
        hash=identity.hexdigest(),
    )
    temporary = path / f"{DATASET_FILE}.tmp"
    temporary.write_text(dataset.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(path / DATASET_FILE)


def _check_shards(root: Path, shards: Sequence[ShardFile]) -> None:
    for shard in shards:
        file = root / shard.name
        if not file.is_file():
            raise ShardError(f"{file}: shard is missing: copy it again or build the dataset again")
        size_bytes = file.stat().st_size
        if size_bytes != shard.size_bytes:
            raise ShardError(
                f"{file}: shard has {size_bytes} bytes, {DATASET_FILE} says {shard.size_bytes}: "
                "copy it again or build the dataset again"
            )


def _read_index(file: Path, sha256: str) -> pa.Table:
    if not file.is_file():
        raise ShardError(f"{file}: index is missing: copy it again or build the dataset again")
    if _sha256_of_file(file) != sha256:
        raise ShardError(
            f"{file}: index of another dataset, or damaged (its sha256 is not the one in {DATASET_FILE}): "
            "copy the whole folder again"
        )
    table = pq.read_table(file)
    if not table.schema.equals(INDEX_SCHEMA, check_metadata=True):
        raise ShardError(f"{file}: its columns are not those of schema {SCHEMA_VERSION}: build the dataset again")
    return table


def _to_columns(root: Path, split: str, dataset: Dataset, table: pa.Table) -> SplitIndex:
    files = dataset.splits[split]
    shard = table["shard"].combine_chunks()
    return SplitIndex(
        root=root,
        split=split,
        classes=dataset.classes,
        shards=tuple(shard.dictionary.to_pylist()),
        hash=files.hash,
        keys=table["key"].combine_chunks(),
        shard=shard.indices.to_numpy(),
        offset=table["offset"].to_numpy(),
        size=table["size"].to_numpy(),
        label=table["label"].to_numpy(),
        crc32=table["crc32"].to_numpy(),
    )


def _check_rows(index: SplitIndex, file: Path, files: SplitFiles) -> None:
    """Rows that dataset.json contradicts would be read as other samples' bytes or train another class."""
    sizes = {shard.name: shard.size_bytes for shard in files.shards}
    if len(index) != files.samples or len(index) == 0:
        raise ShardError(f"{file}: {len(index)} samples, {DATASET_FILE} says {files.samples}: build the dataset again")
    unknown = sorted(set(index.shards) - set(sizes))
    if unknown:
        raise ShardError(f"{file}: shard {unknown[0]} is not in {DATASET_FILE}: build the dataset again")
    shard_sizes = np.array([sizes[name] for name in index.shards], dtype=np.int64)
    if (index.offset < 0).any() or (index.offset + index.size > shard_sizes[index.shard]).any():
        raise ShardError(f"{file}: a sample lies beyond the end of its shard: build the dataset again")
    if index.label.min() < 0 or index.label.max() >= len(index.classes):
        raise ShardError(
            f"{file}: a label is outside the {len(index.classes)} classes of {DATASET_FILE}: build the dataset again"
        )


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
