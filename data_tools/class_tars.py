"""The source `class-tars`: a folder with one tar of images a class, as ImageNet-21k's winter21 is released."""

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_tools.ustar import BLOCK_BYTES
from vitscale.errors import ShardError

WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Member:
    """An image file in a class tar: where its bytes are."""

    name: str
    offset: int
    size: int

    @property
    def stem(self) -> str:
        """Name without folders and extension. Dots become underscores: WebDataset cuts keys at the first."""
        return PurePosixPath(self.name).stem.replace(".", "_")


def find_class_tars(source: Path) -> dict[str, Path]:
    """Class tars of a folder, by wnid, sorted; the place of a wnid is its label.

    Raises:
        ShardError: no tars, or one whose name is no wnid.
    """
    tars = sorted(source.glob("*.tar"))
    if not tars:
        raise ShardError(f"{source}: holds no class tars: give the folder with n01440764.tar and the like")
    for tar in tars:
        if not WNID.fullmatch(tar.stem):
            raise ShardError(f"{tar}: the name is no wnid: name it n and 8 digits, such as n01440764.tar")
    return {tar.stem: tar for tar in tars}


def scan(tar: Path) -> list[Member]:
    """Image files of a class tar, in its order; no image is read.

    Raises:
        ShardError: the tar is damaged, empty, or has a member that is no plain file under a relative name.
    """
    members = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                if info.isdir():
                    continue
                path = PurePosixPath(info.name)
                if path.is_absolute() or ".." in path.parts:
                    raise ShardError(f"{tar}: member {info.name} points out of the tar: make the tar again without it")
                if not info.isreg():
                    raise ShardError(f"{tar}: member {info.name} is no plain file: make the tar again without it")
                members.append(Member(info.name, info.offset_data, info.size))
            end = archive.offset
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{tar}: not a readable tar ({error}): download it again") from None
    with tar.open("rb") as file:
        file.seek(end)
        # tarfile stops without a word where it meets a damaged header.
        if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise ShardError(f"{tar}: ends without a tar's end mark after {len(members)} members: download it again")
    if not members:
        raise ShardError(f"{tar}: holds no images: remove it, or download it again")
    return members
