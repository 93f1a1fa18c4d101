"""Opens one split of a built dataset: its index as columns of numbers that all processes of a node share.

Parquet is what travels. To be read row by row it is turned into an Arrow file, once a node, which every process
maps into its memory: 14 million rows cost none of them more than the pages it touches. The same step puts the
samples into another label space, so one build serves them all.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vitscale.config.cache import CACHE_VARIABLE, cache_folder
from vitscale.data.index import (
    DATASET_FILE,
    Dataset,
    ShardFile,
    check_index_file,
    read_dataset,
    read_index,
    sha256_of_file,
    split_hash,
)
from vitscale.data.labels import label_map, load_label_space
from vitscale.data.shards import open_shards
from vitscale.errors import ShardError

NO_CRC = -1
"""In place of the crc32 of bytes that nobody has read."""

_MAPPED_VERSION = 1
_MAPPED_SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        "shard": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "label": pa.int32(),
        "crc32": pa.int64(),
    }
)


@dataclass(frozen=True)
class SplitIndex:
    """The samples of one split, a row each, as columns of length N.

    `shard` holds places in `shards`; `location` is the folder or URL they are in; `hash` is the identity of the
    split's samples and classes, whatever shards they lie in. The columns lie in the file `mapped`, so a pickled
    index is small and opens the same file.
    """

    root: Path
    split: str
    location: str
    classes: tuple[str, ...]
    shards: tuple[str, ...]
    hash: str
    mapped: Path
    keys: pa.LargeStringArray
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int32]
    crc32: NDArray[np.int64]

    def __len__(self) -> int:
        """Samples in the split."""
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        """What travels to another process: everything but the columns."""
        return _map, (self.root, self.split, self.location, self.classes, self.mapped)

    def key(self, row: int) -> str:
        """Name of the sample at a row."""
        return str(self.keys[row])

    def shard_path(self, row: int) -> str:
        """Path or URL of the shard that holds the sample at a row."""
        return f"{self.location}/{self.shards[int(self.shard[row])]}"


def open_split(path: str | Path, split: str, *, label_space: str | None = None, check_files: bool = True) -> SplitIndex:
    """Open one split of a built dataset, after the checks that need no sample to be read.

    Args:
        path: folder or URL of the dataset.
        split: name of the split in dataset.json.
        label_space: name of the label space to train in; samples of other classes are left out. None keeps the
            classes of the dataset.
        check_files: look whether the index is the right one, and the shards are there, whole; one process need do it.

    Raises:
        ShardError: dataset.json, the index or a shard is missing, damaged or belongs to another dataset, or no
            sample has a class of the label space.
    """
    folder = _fetched(str(path), split) if "://" in str(path) else Path(path)
    dataset = read_dataset(folder)
    if split not in dataset.splits:
        raise ShardError(f"{folder / DATASET_FILE}: no split {split!r}: it has {', '.join(sorted(dataset.splits))}")
    location, files = dataset.shards_at or str(path), dataset.splits[split]
    if check_files:
        check_index_file(folder / files.index, files.index_sha256)
    if check_files and "://" not in location:
        _check_shards(Path(location), files.shards)
    classes = dataset.classes if label_space is None else load_label_space(label_space).wnids
    return _map(folder, split, location, classes, _mapped_file(folder, dataset, split, classes))


def _fetched(url: str, split: str) -> Path:
    """A folder of the cache with dataset.json and the index of a dataset behind a URL; its shards stay there."""
    folder = cache_folder() / "datasets" / hashlib.sha256(url.encode()).hexdigest()[:16]
    shards = open_shards(url)
    try:
        # dataset.json is asked for every time: it tells whether the index in the cache is still the right one.
        _store(folder / DATASET_FILE, shards.read(DATASET_FILE, 0, shards.stat(DATASET_FILE).size_bytes))
        files = read_dataset(folder).splits.get(split)
        if files is not None and not (
            (folder / files.index).is_file() and sha256_of_file(folder / files.index) == files.index_sha256
        ):
            _store(folder / files.index, shards.read(files.index, 0, shards.stat(files.index).size_bytes))
    except OSError as error:
        raise ShardError(
            f"{url}: its index has no place in {folder} ({error}): name a folder with room in {CACHE_VARIABLE}"
        ) from None
    finally:
        shards.close()
    return folder


def _store(file: Path, data: bytes) -> None:
    """Write a small file whole or not at all, whoever else does the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(file)


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


def _map(root: Path, split: str, location: str, classes: tuple[str, ...], mapped: Path) -> SplitIndex:
    table = pa.ipc.open_file(pa.memory_map(str(mapped))).read_all().combine_chunks()
    stored = json.loads(table.schema.metadata[b"split"])
    column = {name: table[name].chunk(0) for name in table.column_names}
    return SplitIndex(
        root=root,
        split=split,
        location=location,
        classes=classes,
        shards=tuple(stored["shards"]),
        hash=stored["hash"],
        mapped=mapped,
        keys=column.pop("key"),
        **{name: values.to_numpy(zero_copy_only=True) for name, values in column.items()},
    )


def _mapped_file(path: Path, dataset: Dataset, split: str, classes: tuple[str, ...]) -> Path:
    """The Arrow file of a split in some classes; made if it is not in the cache yet, by one process of the node."""
    # Everything that the conversion depends on, so a file of this name is right without another look.
    ingredients = [_MAPPED_VERSION, dataset.splits[split].model_dump(), dataset.classes, classes]
    name = f"{hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:32]}.arrow"
    fault = None
    # A home that is full or read-only must not stop a run.
    for folder in (cache_folder() / "index", Path(tempfile.gettempdir()) / f"vitscale-{os.getuid()}" / "index"):
        file = folder / name
        if file.exists():
            return file
        try:
            with _locked(folder, name):
                if not file.exists():
                    _write_mapped(file, _convert(path, dataset, split, classes))
                    pa.default_memory_pool().release_unused()  # a gigabyte for 14 million samples
                return file
        except OSError as error:
            fault = error
    raise ShardError(
        f"{path}: no place for the index as an Arrow file ({fault}): name a folder with room in {CACHE_VARIABLE}"
    )


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Keep other processes from making the same file; a killed process leaves no lock behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_mapped(file: Path, table: pa.Table) -> None:
    temporary = file.with_suffix(".tmp")
    with pa.ipc.new_file(str(temporary), table.schema) as writer:
        writer.write_table(table, max_chunksize=len(table))
    with temporary.open("rb+") as written:
        os.fsync(written.fileno())
    temporary.replace(file)


def _convert(path: Path, dataset: Dataset, split: str, classes: tuple[str, ...]) -> pa.Table:
    """The columns that training reads, of the samples that have one of the classes."""
    table = read_index(path, dataset, split, ("key", "shard", "offset", "size", "label", "crc32"))
    _check_rows(path, dataset, split, table)
    if classes != dataset.classes:
        labels = label_map(dataset.classes, classes)[table["label"].to_numpy()]
        table = table.set_column(4, "label", pa.array(labels)).filter(pa.array(labels >= 0)).combine_chunks()
        if len(table) == 0:
            raise ShardError(
                f"{path}: no sample of split {split} has a class of the label space: take the one it was built in"
            )
    shard = table["shard"].combine_chunks()
    stored = {"shards": shard.dictionary.to_pylist(), "hash": split_hash(classes, table)}
    columns = [
        table["key"].cast(pa.large_string()),
        shard.indices,
        table["offset"],
        table["size"],
        table["label"],
        pc.fill_null(table["crc32"].cast(pa.int64()), NO_CRC),
    ]
    schema = _MAPPED_SCHEMA.with_metadata({"split": json.dumps(stored)})
    return pa.table(columns, schema=schema).combine_chunks()


def _check_rows(path: Path, dataset: Dataset, split: str, table: pa.Table) -> None:
    """Rows that dataset.json contradicts would be read as other samples' bytes or train another class."""
    files = dataset.splits[split]
    file = path / files.index
    sizes = {shard.name: shard.size_bytes for shard in files.shards}
    shard = table["shard"].combine_chunks()
    names = shard.dictionary.to_pylist()
    unknown = sorted(set(names) - set(sizes))
    if unknown:
        raise ShardError(f"{file}: shard {unknown[0]} is not in {DATASET_FILE}: build the dataset again")
    ends = np.array([sizes[name] for name in names], dtype=np.int64)[shard.indices.to_numpy()]
    offset = table["offset"].to_numpy()
    if (offset < 0).any() or (offset + table["size"].to_numpy() > ends).any():
        raise ShardError(f"{file}: a sample lies beyond the end of its shard: build the dataset again")
    label = table["label"].to_numpy()
    if label.min() < 0 or label.max() >= len(dataset.classes):
        raise ShardError(
            f"{file}: a label is outside the {len(dataset.classes)} classes of {DATASET_FILE}: build the dataset again"
        )
