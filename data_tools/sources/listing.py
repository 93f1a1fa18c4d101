"""What a source is to the builder: a table of images with the place of each one's bytes.

Every source ends as byte ranges of plain files, so planning and writing know one way to read.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data_tools.progress import progress
from data_tools.workers import ordered_map
from vitscale.errors import ShardError

# In the columns `file` and `split`: the image is a file of its own; the source does not tell a split.
OWN_FILE = -1
NO_SPLIT, TRAIN, VAL = range(3)

# How published copies call the folders and files of a split. Small classes are part of the training set.
SPLIT_NAMES = {
    "train": TRAIN,
    "imagenet21k_train": TRAIN,
    "imagenet21k_small_classes": TRAIN,
    "val": VAL,
    "valid": VAL,
    "validation": VAL,
    "imagenet21k_val": VAL,
}

LISTING_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),  # of the image in the source; its stem becomes the key
        pa.field("wnid", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("split", pa.int8(), nullable=False),  # NO_SPLIT, TRAIN or VAL
        pa.field("file", pa.int32(), nullable=False),  # place in the listing's files, or OWN_FILE
        pa.field("offset", pa.int64(), nullable=False),  # of the image's first byte in the file
        pa.field("size", pa.int64(), nullable=False),  # in bytes
    ]
)


@dataclass(frozen=True)
class Stretch:
    """A stretch of a file that one process lists: the tar of a class, or a whole shard.

    `file` is the place of the path among the listing's files; `wnid` is empty where the images tell it themselves.
    """

    path: Path
    file: int
    wnid: str = ""
    split: int = NO_SPLIT
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Listing:
    """All images of a source: `table` has a row of LISTING_SCHEMA each; paths are relative to `root`."""

    root: Path
    files: tuple[str, ...]
    table: pa.Table


def listing_of(
    root: Path,
    files: Sequence[Path],
    stretches: Sequence[Stretch],
    scan: Callable[[Stretch], pa.Table],
    workers: int,
) -> Listing:
    """Scan the stretches of a source's files in `workers` processes and join what they hold, in their order.

    Raises:
        ShardError: as `scan` does.
    """
    tables = list(progress(ordered_map(scan, stretches, workers), len(stretches), "file"))
    names = tuple(os.path.relpath(file, root) for file in files)
    return Listing(root, names, pa.concat_tables(tables).unify_dictionaries())


def rows_of(stretch: Stretch, images: Iterable[tuple[str, str, int, int]]) -> pa.Table:
    """The images of a stretch, given as (name, wnid, offset, size), as rows of a listing."""
    rows = list(images)
    names, wnids, offsets, sizes = zip(*rows, strict=True) if rows else ((), (), (), ())
    return pa.table(
        [
            pa.array(names, pa.string()),
            pa.array(wnids, pa.string()).dictionary_encode(),
            pa.array([stretch.split] * len(rows), pa.int8()),
            pa.array([stretch.file] * len(rows), pa.int32()),
            pa.array(offsets, pa.int64()),
            pa.array(sizes, pa.int64()),
        ],
        schema=LISTING_SCHEMA,
    )


def source_name(path: str, file: int, name: str) -> str:
    """How messages call an image: `n01440764.tar: n01440764_18.JPEG`, or its path alone where it is its own file."""
    return name if file == OWN_FILE else f"{path}: {name}"


def split_of(name: str) -> int:
    """The split that a folder or a file of this name holds: `val`, `imagenet21k_train`, `train-000007.tar`."""
    return SPLIT_NAMES.get(name, SPLIT_NAMES.get(name.partition("-")[0], NO_SPLIT))


def split_folders(root: Path) -> list[tuple[Path, int]]:
    """Folders of a source that hold classes, with their splits: itself, unless all its folders are those of splits.

    One of many may be a class that is called like a split: CIFAR-100 has the class `train`.
    """
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if folders and all(path.name in SPLIT_NAMES for path in folders):
        return [(path, SPLIT_NAMES[path.name]) for path in folders]
    return [(root, NO_SPLIT)]


def need_folder(path: Path, kind: str) -> None:
    """Refuse a source that is no folder.

    Raises:
        ShardError: it is not there, or a file.
    """
    if not path.is_dir():
        raise ShardError(f"{path}: is no folder: --source {kind} takes the folder that holds the images")
