"""The source `shards`: WebDataset shards that exist already, to be shuffled, split or prepared anew.

A sample is the members that share a key. Its class is told by KEY.wnid, KEY.cls, KEY.json or KEY.txt. Members of any
other kind are passed over; nothing in a shard is ever executed.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from data_tools.index_shards import walk_samples
from data_tools.shard_classes import read_class
from data_tools.sources.listing import Listing, Stretch, listing_of, need_folder, rows_of, split_of
from data_tools.tar_scan import TarScan
from vitscale.errors import ShardError


def list_shards(source: Path, classes: tuple[str, ...] | None, workers: int) -> Listing:
    """Images of all tars of a folder, those named train-* and val-* with their split.

    Args:
        source: the folder.
        classes: wnids behind numeric labels, where the shards hold no wnids.
        workers: processes.

    Raises:
        ShardError: no tars, a damaged one, or a sample without exactly one image and a class.
    """
    need_folder(source, "shards")
    tars = sorted(source.rglob("*.tar"))
    if not tars:
        raise ShardError(f"{source}: holds no tars: give the folder with the shards")
    stretches = [
        Stretch(tar, place, split=split_of(tar.stem) or split_of(tar.parent.name)) for place, tar in enumerate(tars)
    ]
    return listing_of(source, tars, stretches, partial(_scan_shard, classes=classes), workers)


def _scan_shard(stretch: Stretch, classes: Sequence[str] | None) -> pa.Table:
    with TarScan(stretch.path) as tar:
        return rows_of(stretch, _samples(tar, classes))


def _samples(tar: TarScan, classes: Sequence[str] | None) -> Iterator[tuple[str, str, int, int]]:
    for key, image, told, first in walk_samples(tar):
        try:
            label, wnid = read_class(told)
        except ValueError as error:
            raise tar.fault(first, f"sample {key} {error}", "leave the shard out") from None
        if not wnid:
            names = f"{len(classes)} classes are known" if classes else "no wnid"
            if classes is None or label >= len(classes):
                fault = f"sample {key} has the label {label}, and {names}"
                raise tar.fault(first, fault, "give the list of wnids with --source-classes")
            wnid = classes[label]
        yield image.name, wnid, image.offset, image.size
