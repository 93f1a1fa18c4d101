"""Finds images that are in another set already, such as the one that a model will be evaluated on.

A copy of the same bytes is found by its SHA-256; a copy that was resized, encoded anew or slightly changed by a
perceptual hash: the signs of the lowest frequencies of the image, as 64 bits (C. Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1). Crops, flips and rotations are not found.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_tools.prepare import unpack
from data_tools.progress import progress
from data_tools.tar_scan import scan_tar
from data_tools.workers import ordered_map
from vitscale.data.decode import BadSample, decode, sniff
from vitscale.data.index import DATASET_FILE, read_dataset
from vitscale.errors import ShardError

HASH_BITS = 64
SIDE_PX = 32
FREQUENCIES = 8

# Images with less contrast than this, in grey levels, have no lowest frequencies to speak of: their hash would be
# noise, and one white page would match the next.
LEAST_CONTRAST = 3.0

IMAGES_A_JOB = 256

_SCHEMA = pa.schema({"name": pa.string(), "sha256": pa.binary(32), "hash": pa.uint64()})
_DISTANCE_KEY = b"vitscale.distance"

# Rows 1 to 8 of the DCT-II: row 0 is the mean, which tells the light and not the picture.
_DCT = np.cos(np.pi / SIDE_PX * np.outer(np.arange(1, FREQUENCIES + 1), np.arange(SIDE_PX) + 0.5))
_BIT_COUNTS = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)


class LeakageFilter:
    """The images of a reference set, ready to be looked up.

    Args:
        names: what each is called, for the reason of a rejection.
        digests: SHA-256 of each.
        hashes: perceptual hash of each; None where it has none.
        distance: number of bits in which the hashes of near copies may differ, from 0 to 16.
    """

    def __init__(
        self, names: Sequence[str], digests: Sequence[bytes], hashes: Sequence[int | None], distance: int
    ) -> None:
        self.distance = distance
        self._table = pa.table([list(names), list(digests), pa.array(hashes, pa.uint64())], schema=_SCHEMA)
        self._names = names
        self._row_of_digest = dict(zip(digests, range(len(digests)), strict=True))
        self._hashed = np.array([row for row, value in enumerate(hashes) if value is not None], dtype=np.int64)
        self._near = NearHashes(np.array([value for value in hashes if value is not None], dtype=np.uint64), distance)

    def __len__(self) -> int:
        """Images in the reference set."""
        return len(self._names)

    @classmethod
    def build(cls, reference: Path, *, distance: int = 4, workers: int = 1) -> Self:
        """Read a reference set: a dataset, a tar, or a folder with images or tars anywhere in it.

        Files that are no images are passed over.

        Raises:
            ShardError: nothing is there, or no images, or a tar is damaged.
        """
        jobs = list(_jobs(reference))
        found = [
            row
            for rows in progress(ordered_map(_fingerprint_all, jobs, workers), len(jobs), "reference part")
            for row in rows
        ]
        if not found:
            raise ShardError(f"{reference}: holds no images: give a folder of images, tars or a dataset")
        return cls([row.name for row in found], [row.digest for row in found], [row.hash for row in found], distance)

    def save(self, file: Path) -> None:
        """Write the reference set's hashes to a Parquet file; the same set gives the same bytes."""
        stored = self._table.replace_schema_metadata({_DISTANCE_KEY: str(self.distance)})
        pq.write_table(stored, file, compression="zstd")

    @staticmethod
    @functools.cache
    def load(file: Path) -> "LeakageFilter":
        """Read a saved filter, once a process.

        Raises:
            ShardError: the file is missing or damaged.
        """
        try:
            table = pq.read_table(file)
            names, digests, hashes = (table[name].to_pylist() for name in _SCHEMA.names)
            return LeakageFilter(names, digests, hashes, int(table.schema.metadata[_DISTANCE_KEY]))
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{file}: cannot be read ({error}): plan the build again") from None

    def match(self, data: bytes) -> str | None:
        """Why an image must be left out; None if it is not in the reference set, or is no image at all."""
        try:
            data = unpack(data)
        except BadSample:
            return None
        row = self._row_of_digest.get(hashlib.sha256(data).digest())
        if row is not None:
            return f"leak: the same file as {self._names[row]}"
        value = perceptual_hash(data) if len(self._hashed) else None
        if value is None:
            return None
        place, distance = self._near.nearest(value)
        if place is None:
            return None
        return f"leak: looks like {self._names[self._hashed[place]]} ({distance} of {HASH_BITS} bits differ)"


class NearHashes:
    """64-bit hashes, ready to be searched for all within a distance.

    Cut into one part more than bits may differ, two near hashes agree in at least one part: only hashes that do are
    compared (M. Norouzi et al., "Fast Search in Hamming Space with Multi-Index Hashing", 2012). Nothing is missed.
    """

    def __init__(self, hashes: NDArray[np.uint64], distance: int) -> None:
        self.hashes = hashes
        self.distance = distance
        edges = [HASH_BITS * part // (distance + 1) for part in range(distance + 2)]
        self._parts = [(np.uint64(low), np.uint64((1 << high - low) - 1)) for low, high in pairwise(edges)]
        self._orders = [np.argsort(self._part(hashes, part), kind="stable") for part in self._parts]
        self._sorted = [self._part(hashes, part)[order] for part, order in zip(self._parts, self._orders, strict=True)]

    def nearest(self, value: int) -> tuple[int | None, int]:
        """Place of the nearest hash within the distance (the first of several), and its distance; None if none is."""
        wanted = np.array([value], dtype=np.uint64)
        candidates = []
        for part, order, values in zip(self._parts, self._orders, self._sorted, strict=True):
            own = self._part(wanted, part)[0]
            candidates.append(order[np.searchsorted(values, own) : np.searchsorted(values, own, side="right")])
        places = np.concatenate(candidates)
        if len(places) == 0:
            return None, HASH_BITS
        distances = _BIT_COUNTS[(self.hashes[places] ^ wanted).view(np.uint16).reshape(-1, 4)].sum(axis=1)
        best = int(distances.min())
        return (int(places[distances == best].min()), best) if best <= self.distance else (None, HASH_BITS)

    @staticmethod
    def _part(hashes: NDArray[np.uint64], part: tuple[np.uint64, np.uint64]) -> NDArray[np.uint64]:
        low, mask = part
        return hashes >> low & mask


def perceptual_hash(data: bytes) -> int | None:
    """The 64 bits of an image's lowest frequencies; None if it cannot be read, or shows next to nothing."""
    try:
        grey = _grey(data)
    except BadSample:
        return None
    small = np.asarray(Image.fromarray(grey).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR), dtype=np.float64)
    if small.std() < LEAST_CONTRAST:
        return None
    coefficients = (_DCT @ small @ _DCT.T).ravel()
    return int.from_bytes(np.packbits(coefficients > np.median(coefficients)).tobytes(), "big")


def _grey(data: bytes) -> NDArray[np.uint8]:
    """Grey image [H, W]; a JPEG is shrunk while it is decoded, to twice the side that is needed or more."""
    if sniff(data) == "jpeg":
        try:
            least = 2 * SIDE_PX
            pixels = simplejpeg.decode_jpeg(data, "GRAY", min_height=least, min_width=least, strict=False)
            return np.asarray(pixels[:, :, 0])
        except ValueError:
            pass  # a rare kind of JPEG, or a bad one: decode tells
    image = Image.fromarray(np.ascontiguousarray(decode(data).permute(1, 2, 0).numpy()))
    return np.asarray(image.convert("L"))


@dataclass(frozen=True)
class _Place:
    """Where an image of the reference set lies; a file of its own has no offset."""

    name: str
    file: Path
    offset: int = 0
    size: int = -1


@dataclass(frozen=True)
class _Fingerprint:
    name: str
    digest: bytes
    hash: int | None


def _jobs(reference: Path) -> Iterator[list[_Place]]:
    places = _places(reference)
    while job := list(islice(places, IMAGES_A_JOB)):
        yield job


def _places(reference: Path) -> Iterator[_Place]:
    if not reference.exists():
        raise ShardError(f"{reference}: not found: give a folder of images, tars or a dataset")
    if (reference / DATASET_FILE).exists():
        dataset = read_dataset(reference)
        folder = Path(dataset.shards_at or reference)
        files = [folder / shard.name for split in dataset.splits.values() for shard in split.shards]
    else:
        files = sorted(path for path in reference.rglob("*") if path.is_file()) if reference.is_dir() else [reference]
    for file in files:
        if file.suffix == ".tar":
            for member in scan_tar(file):
                yield _Place(f"{file.name}/{member.name}", file, member.offset, member.size)
        else:
            yield _Place(str(file.relative_to(reference)) if file != reference else file.name, file)


def _fingerprint_all(job: Sequence[_Place]) -> list[_Fingerprint]:
    found = []
    for place in job:
        try:
            with place.file.open("rb") as file:
                file.seek(place.offset)
                data = unpack(file.read(place.size))
        except BadSample:
            continue
        except OSError as error:
            raise ShardError(f"{place.file}: cannot be read ({error.strerror}): copy it again") from None
        if sniff(data) is not None:
            found.append(_Fingerprint(place.name, hashlib.sha256(data).digest(), perceptual_hash(data)))
    return found
