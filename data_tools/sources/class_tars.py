"""The source `class-tars`: a folder with one tar of images a class, as ImageNet-21k's winter21 is released.

Copies with the folders imagenet21k_train, imagenet21k_val and imagenet21k_small_classes are read too; those
folders tell the split to whoever asks for it.
"""

import re
from pathlib import Path

import pyarrow as pa

from data_tools.sources.listing import Listing, Stretch, listing_of, need_folder, rows_of, split_folders
from data_tools.tar_scan import scan_tar
from vitscale.errors import ShardError

WNID = re.compile(r"n\d{8}")


def list_class_tars(source: Path, workers: int) -> Listing:
    """Images of a folder of class tars, by wnid; no image is read.

    Raises:
        ShardError: no tars, one whose name is no wnid, or a damaged or empty one.
    """
    need_folder(source, "class-tars")
    tars = [(tar, split) for folder, split in split_folders(source) for tar in folder.glob("*.tar")]
    if not tars:
        raise ShardError(f"{source}: holds no class tars: give the folder with n01440764.tar and the like")
    for tar, _ in tars:
        if not WNID.fullmatch(tar.stem):
            raise ShardError(f"{tar}: the name is no wnid: name it n and 8 digits, such as n01440764.tar")
    tars.sort(key=lambda found: (found[0].stem, found[0]))
    stretches = [Stretch(tar, place, tar.stem, split) for place, (tar, split) in enumerate(tars)]
    return listing_of(source, [tar for tar, _ in tars], stretches, scan_class_tar, workers)


def scan_class_tar(stretch: Stretch) -> pa.Table:
    """Images of one class tar, which may lie inside another tar, in its order.

    Raises:
        ShardError: the tar is damaged, empty, or has a member that is no plain file under a relative name.
    """
    members = scan_tar(stretch.path, stretch.start, stretch.end)
    table = rows_of(stretch, ((member.name, stretch.wnid, member.offset, member.size) for member in members))
    if not len(table):
        raise ShardError(f"{stretch.path}: {stretch.wnid} holds no images: remove it, or download it again")
    return table
