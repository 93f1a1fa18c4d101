"""Samples of a dataset to look at: chosen by a seed, read from their shards, and made small."""

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile

from vitscale.data.decode import BadSample, decode, probe
from vitscale.data.index import Dataset
from vitscale.data.labels import class_name
from vitscale.errors import ShardError

THUMBNAIL_PX = 224

_COLUMNS = ("key", "shard", "offset", "size", "wnid", "width", "height", "format", "crc32")


@dataclass(frozen=True)
class Picture:
    """A sample to show. Without an image, `fault` tells why there is none."""

    key: str
    shard: str
    offset: int
    wnid: str
    width_px: int
    height_px: int
    size_bytes: int
    image: Image.Image | None
    fault: str = ""

    @property
    def name(self) -> str:
        """What its class is called."""
        return class_name(self.wnid)


def choose(rows: NDArray[np.int64], number: int, seed: int) -> NDArray[np.int64]:
    """Some of the rows, or all if there are no more, in ascending order; the same for the same seed."""
    chosen = np.random.default_rng(seed).choice(rows, min(number, len(rows)), replace=False, shuffle=False)
    return np.sort(chosen)


def read_pictures(folder: Path, dataset: Dataset, split: str, rows: NDArray[np.int64]) -> list[Picture]:
    """Read samples of a split by their rows in its index, ascending.

    Raises:
        ShardError: the shards are not on this machine, or one is missing.
    """
    if "://" in dataset.shards_at:
        raise ShardError(f"{folder}: its shards are at {dataset.shards_at}: copy them here to look at samples")
    root = Path(dataset.shards_at or folder)
    return [_read(root, sample) for sample in _index_rows(folder / dataset.splits[split].index, rows)]


def thumbnail(data: bytes) -> Image.Image:
    """An image within THUMBNAIL_PX; small ones are enlarged by a whole number, so that each pixel can be seen.

    Raises:
        BadSample: it cannot be decoded.
    """
    return _shrink(Image.fromarray(decode(data).permute(1, 2, 0).numpy()))


def salvage(data: bytes) -> Image.Image | None:
    """Thumbnail of what can be decoded of a damaged image; None if nothing can."""
    try:
        image_format, _, _ = probe(data)  # which refuses decompression bombs
        if image_format == "jpeg":
            return _shrink(Image.fromarray(simplejpeg.decode_jpeg(data, strict=False)))
        return _shrink(_decode_part(data))
    except (BadSample, OSError, SyntaxError, ValueError):
        return None


def _index_rows(index: Path, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Rows of an index, of which only the row groups that hold them are read, one by one."""
    file = pq.ParquetFile(index)
    found: list[dict[str, Any]] = []
    first = 0
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        inside = rows[(rows >= first) & (rows < end)] - first
        if len(inside):
            found += file.read_row_group(group, columns=list(_COLUMNS)).take(pa.array(inside)).to_pylist()
        first = end
    return found


def _read(root: Path, sample: dict[str, Any]) -> Picture:
    path = root / sample["shard"]
    try:
        with path.open("rb") as shard:
            shard.seek(sample["offset"])
            data = shard.read(sample["size"])
    except FileNotFoundError:
        raise ShardError(f"{path}: shard is missing: copy it again or build the dataset again") from None
    image, fault = None, ""
    try:
        if len(data) < sample["size"]:
            raise BadSample("its shard ends too early")
        if sample["crc32"] not in (None, zlib.crc32(data)):
            raise BadSample("its crc32 is not the one in the index")
        image = thumbnail(data)
    except BadSample as error:
        fault = str(error)
    return Picture(
        key=sample["key"],
        shard=sample["shard"],
        offset=sample["offset"],
        wnid=sample["wnid"],
        width_px=sample["width"],
        height_px=sample["height"],
        size_bytes=sample["size"],
        image=image,
        fault=fault,
    )


def _shrink(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    factor = THUMBNAIL_PX // max(image.size)
    if factor >= 2:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return image


def _decode_part(data: bytes) -> Image.Image:
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # Pillow knows no other way to ask for it
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
