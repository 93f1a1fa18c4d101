"""The source `image-folder`: a tree ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE.

A class is named by its wnid; in other data by any word without spaces.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from data_tools.sources.listing import (
    OWN_FILE,
    Listing,
    Stretch,
    listing_of,
    need_folder,
    rows_of,
    split_folders,
)
from vitscale.errors import ShardError


def list_image_folder(source: Path, workers: int) -> Listing:
    """All files of the class folders, by class and name.

    Raises:
        ShardError: no class folders, a class name with a space, a class without files, or a link.
    """
    need_folder(source, "image-folder")
    stretches = [
        Stretch(path, OWN_FILE, path.name, split)
        for folder, split in split_folders(source)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    ]
    if not stretches:
        raise ShardError(f"{source}: holds no class folders: give the folder with n01440764/ and the like")
    stretches.sort(key=lambda stretch: (stretch.wnid, stretch.path))
    return listing_of(source, [], stretches, partial(_scan_class, root=source), workers)


def _scan_class(stretch: Stretch, root: Path) -> pa.Table:
    if len(stretch.wnid.split()) != 1:
        raise ShardError(f"{stretch.path}: a class name must be one word: rename the folder")
    images = ((os.path.relpath(path, root), stretch.wnid, 0, size) for path, size in _files(stretch.path))
    table = rows_of(stretch, images)
    if not len(table):
        raise ShardError(f"{stretch.path}: holds no images: remove it")
    return table


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_symlink():
            raise ShardError(f"{entry.path}: is a link, whose target may change: put the file itself there")
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif not entry.name.startswith("."):
            yield entry.path, entry.stat().st_size
