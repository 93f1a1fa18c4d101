"""The format of a built dataset: tar shards, one Parquet index a split, and dataset.json.

    dataset.json                     what belongs together: classes, splits, shards with their sizes
    train.parquet val.parquet        one row a sample: where its bytes are and what they show
    train-000000.tar val-000000.tar  shards by the WebDataset convention: KEY.jpg, KEY.cls, KEY.wnid

dataset.json is written last, so a folder without it is an unfinished build. This file alone knows the
format: the builders write with it, `split` opens with it for training.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from vitscale.errors import ShardError

SCHEMA_VERSION = 2
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
        pa.field("crc32", pa.uint32()),  # of the image's bytes; null where nobody read them
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardFile(_Part):
    """A shard as dataset.json lists it; `sha256` is null where nobody read it whole."""

    name: str
    size_bytes: int
    samples: int
    sha256: str | None = None


class SplitFiles(_Part):
    """A split as dataset.json lists it; `hash` is the identity of its samples, in their order."""

    samples: int
    shards: tuple[ShardFile, ...]
    index: str
    index_sha256: str
    hash: str


class Dataset(_Part):
    """The content of dataset.json.

    Classes are the wnids in label order, those of `label_space` if it has a name; `plan` is the identity of the
    build; `shards_at` is the folder or URL of the shards where they do not lie beside the index.
    """

    schema_version: int
    seed: int
    plan: str
    label_space: str | None = None
    classes: tuple[str, ...]
    shards_at: str = ""
    splits: dict[str, SplitFiles]
    hash: str


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


def read_index(path: Path, dataset: Dataset, split: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a split's index, once its file is known to be the one that dataset.json means.

    Raises:
        ShardError: the index is missing, damaged, or contradicts dataset.json.
    """
    files = dataset.splits[split]
    file = path / files.index
    check_index_file(file, files.index_sha256)
    if not pq.read_schema(file).equals(INDEX_SCHEMA, check_metadata=True):
        raise ShardError(f"{file}: its columns are not those of schema {SCHEMA_VERSION}: build the dataset again")
    table = pq.read_table(file, columns=list(columns)).combine_chunks()
    if len(table) != files.samples or len(table) == 0:
        raise ShardError(f"{file}: {len(table)} samples, {DATASET_FILE} says {files.samples}: build the dataset again")
    return table


def check_index_file(file: Path, sha256: str) -> None:
    """Make sure that an index is the one that dataset.json means.

    Raises:
        ShardError: it is missing, damaged, or of another dataset.
    """
    if not file.is_file():
        raise ShardError(f"{file}: index is missing: copy it again or build the dataset again")
    if sha256_of_file(file) != sha256:
        raise ShardError(
            f"{file}: index of another dataset, or damaged (its sha256 is not the one in {DATASET_FILE}): "
            "copy the whole folder again"
        )


def write_index(path: Path, table: pa.Table) -> str:
    """Write the index of a split (columns of INDEX_SCHEMA, one row a sample) and return its sha256."""
    pq.write_table(table.cast(INDEX_SCHEMA).unify_dictionaries().combine_chunks(), path, compression="zstd")
    return sha256_of_file(path)


def write_split(
    folder: Path, split: str, classes: Sequence[str], table: pa.Table, shards: Sequence[ShardFile]
) -> SplitFiles:
    """Write the index of a split beside its dataset.json, and return what that lists of it."""
    index = f"{split}.parquet"
    return SplitFiles(
        samples=len(table),
        shards=tuple(shards),
        index=index,
        index_sha256=write_index(folder / index, table),
        hash=split_hash(classes, table),
    )


def split_hash(classes: Sequence[str], table: pa.Table) -> str:
    """Identity of a split: classes, and every sample's key, label, size and crc32, in their order."""
    digest = hashlib.sha256("\n".join(classes).encode())
    for chunk in filter(len, table["key"].chunks):
        digest.update(pc.binary_join(pa.ListArray.from_arrays([0, len(chunk)], chunk), "\n")[0].as_buffer())
        digest.update(b"\n")
    for column in ("label", "size", "crc32"):
        digest.update(pc.fill_null(table[column], 0).to_numpy().astype("<i8"))
    return digest.hexdigest()


def write_dataset_json(
    path: Path,
    *,
    seed: int,
    plan: str,
    classes: Sequence[str],
    splits: dict[str, SplitFiles],
    label_space: str | None = None,
    shards_at: str = "",
) -> None:
    """Write dataset.json, whole or not at all; it makes the folder a finished build."""
    identity = hashlib.sha256("\n".join(f"{name} {splits[name].hash}" for name in sorted(splits)).encode())
    dataset = Dataset(
        schema_version=SCHEMA_VERSION,
        seed=seed,
        plan=plan,
        label_space=label_space,
        classes=tuple(classes),
        shards_at=shards_at,
        splits=splits,
        hash=identity.hexdigest(),
    )
    temporary = path / f"{DATASET_FILE}.tmp"
    temporary.write_text(dataset.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(path / DATASET_FILE)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
