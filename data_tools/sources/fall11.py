"""The source `fall11`: fall11_whole.tar, a tar of class tars, read in place by offset; nothing is extracted."""

from pathlib import Path, PurePosixPath

from data_tools.sources.class_tars import WNID, scan_class_tar
from data_tools.sources.listing import Listing, Stretch, listing_of
from data_tools.tar_scan import scan_tar
from vitscale.errors import ShardError


def list_fall11(source: Path, workers: int) -> Listing:
    """Images of the class tars inside one tar.

    Raises:
        ShardError: it is no tar of class tars, or it or one of those is damaged or empty.
    """
    if not source.is_file():
        raise ShardError(f"{source}: is no file: --source fall11 takes fall11_whole.tar")
    stretches = []
    for member in scan_tar(source):
        path = PurePosixPath(member.name)
        if path.suffix != ".tar" or not WNID.fullmatch(path.stem):
            raise ShardError(
                f"{source}: member {member.name} is no class tar: --source fall11 takes a tar of class tars"
            )
        stretches.append(Stretch(source, 0, path.stem, start=member.offset, end=member.offset + member.size))
    if not stretches:
        raise ShardError(f"{source}: holds no class tars: download it again")
    stretches.sort(key=lambda stretch: stretch.wnid)
    return listing_of(source.parent, [source], stretches, scan_class_tar, workers)
