"""Decides which image goes into which shard: a pure function of the source's listing, the seed and the sizes.

Every choice follows from a hash of the seed and the image's key, so it does not depend on the machine,
the number of workers or numpy's generators, and an image keeps its split when other classes are added.
Everything is done by columns: 14 million images take about a minute and no Python object each.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_tools.sources.listing import VAL, Listing, source_name
from data_tools.ustar import BLOCK_BYTES, MAX_FILE_BYTES, MAX_NAME_BYTES
from vitscale.data.labels import label_map
from vitscale.data.order import BUILD_SHUFFLE, BUILD_SPLIT, hash64
from vitscale.errors import ShardError

# The longest extension is ".unknown".
MAX_KEY_BYTES = MAX_NAME_BYTES - len(".unknown")

# What a sample takes in a shard beside its image: its header, and two members of one block with theirs.
SAMPLE_BLOCKS = 5

PLAN_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),  # in the source
        pa.field("file", pa.int32(), nullable=False),  # place in the plan's files, or OWN_FILE
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)

_HASHED_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Division:
    """How images are divided: a part of each class by seed, those in a list, or as the source tells; and how many
    images or bytes make a shard.

    `val_list` holds keys or names of images; with it, or with `split_from_source`, `val_fraction` is 0.
    """

    seed: int
    val_fraction: float
    val_list: Sequence[str] | None
    split_from_source: bool
    shard_images: int
    shard_bytes: int | None


@dataclass(frozen=True)
class ShardRows:
    """One shard: its name, and the rows of `Layout.table` that it holds, in order."""

    name: str
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """All images of a build (columns of PLAN_SCHEMA), their shards, and how many images have no class, by wnid."""

    table: pa.Table
    shards: tuple[ShardRows, ...]
    outside: dict[str, int]


def lay_out(listing: Listing, classes: Sequence[str], division: Division) -> Layout:
    """Put every image that has one of the classes into a shard: split, and shuffled over all classes.

    Args:
        listing: the source's images.
        classes: wnids in label order.
        division: see there. By a fraction, train keeps at least one image of each class unless it is 1.

    Raises:
        ShardError: no image has a class, two images have one key, a key is too long, or val would be empty.
    """
    wnids = listing.table["wnid"].combine_chunks()
    codes = wnids.indices.to_numpy()
    labels = label_map(wnids.dictionary.to_pylist(), classes)[codes]
    counts = np.bincount(codes[labels < 0], minlength=len(wnids.dictionary))
    outside = {str(wnids.dictionary[code]): int(counts[code]) for code in np.flatnonzero(counts)}
    images = listing.table
    if outside:
        images, labels = images.filter(pa.array(labels >= 0)), labels[labels >= 0]
    if not len(images):
        raise ShardError(f"{listing.root}: no image has one of the {len(classes)} classes: give other --classes")
    _check_sizes(listing, images)
    keys, hashes = _unique_keys(listing, images)
    in_val = _choose_val(images, labels, hashes, division)
    table = pa.table(
        [keys, pa.array(labels), *(images[name].combine_chunks() for name in PLAN_SCHEMA.names[2:])],
        schema=PLAN_SCHEMA,
    )
    shuffled = np.argsort(hash64(division.seed, BUILD_SHUFFLE, hashes), kind="stable")
    sizes = table["size"].to_numpy()
    shards = []
    for split, chosen in (("train", ~in_val), ("val", in_val)):
        rows = shuffled[chosen[shuffled]]
        cut = _cut(sizes[rows], division)
        shards += [ShardRows(f"{split}-{number:06d}.tar", part) for number, part in enumerate(np.split(rows, cut))]
    return Layout(table, tuple(shard for shard in shards if len(shard.rows)), outside)


def _check_sizes(listing: Listing, images: pa.Table) -> None:
    sizes = images["size"].to_numpy()
    largest = int(np.argmax(sizes))
    if sizes[largest] > MAX_FILE_BYTES:
        raise ShardError(
            f"{listing.root / _source_of(listing, images, largest)}: has {sizes[largest]} bytes, more than a shard's "
            "entry holds: remove it"
        )


def _unique_keys(listing: Listing, images: pa.Table) -> tuple[pa.StringArray, NDArray[np.uint64]]:
    """Keys and their hashes: the file's stem, after its class where another file has the same stem.

    Dots become underscores: WebDataset cuts keys at the first.
    """
    stems = pc.replace_substring_regex(images["name"], r"^.*/", "")
    stems = pc.replace_substring(pc.replace_substring_regex(stems, r"(.)\.[^.]+$", r"\1"), ".", "_").combine_chunks()
    hashes = _hash_keys(stems)
    repeated = _repeated(hashes)
    keys = stems
    if repeated.any():
        wnids = images["wnid"].combine_chunks().cast(pa.string())
        keys = pc.if_else(pa.array(repeated), pc.binary_join_element_wise(wnids, stems, "_"), stems)
        hashes[repeated] = _hash_keys(keys.filter(pa.array(repeated)))
        again = np.flatnonzero(_repeated(hashes))
        if len(again):
            key = keys[int(again[0])].as_py()
            first, second = (
                _source_of(listing, images, int(row)) for row in again[hashes[again] == hashes[again[0]]][:2]
            )
            raise ShardError(f"{second}: has the same key {key} as {first}: rename one of the two")
    lengths = pc.binary_length(keys).to_numpy()
    longest = int(np.argmax(lengths))
    if lengths[longest] > MAX_KEY_BYTES:
        where = _source_of(listing, images, longest)
        raise ShardError(f"{where}: the name is longer than {MAX_KEY_BYTES} bytes: rename it")
    return keys, hashes


def _source_of(listing: Listing, images: pa.Table, row: int) -> str:
    file = images["file"][row].as_py()
    return source_name(listing.files[file] if listing.files else "", file, images["name"][row].as_py())


def _hash_keys(keys: pa.StringArray) -> NDArray[np.uint64]:
    digests = []
    for first in range(0, len(keys), _HASHED_AT_ONCE):
        some = keys.slice(first, _HASHED_AT_ONCE).cast(pa.binary()).to_pylist()
        digests.append(b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in some))
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which hashes occur more than once."""
    order = np.argsort(hashes)
    as_before = hashes[order[1:]] == hashes[order[:-1]]
    repeated = np.zeros(len(hashes), dtype=np.bool_)
    repeated[order[1:][as_before]] = True
    repeated[order[:-1][as_before]] = True
    return repeated


def _choose_val(
    images: pa.Table, labels: NDArray[np.int32], hashes: NDArray[np.uint64], division: Division
) -> NDArray[np.bool_]:
    """Which images go to val."""
    if division.val_list is not None:
        in_val = np.isin(hashes, _hash_keys(pa.array(sorted(_listed_keys(division.val_list)), pa.string())))
        if not in_val.any():
            raise ShardError("--val-list: names no image of the source: give keys, or names such as n01440764/x.JPEG")
    elif division.split_from_source:
        in_val = images["split"].to_numpy() == VAL
        if not in_val.any():
            raise ShardError("--split-from-source: the source has no val folder or file: give --val-fraction")
    else:
        in_val = _smallest_of_class(labels, hash64(division.seed, BUILD_SPLIT, hashes), division.val_fraction)
        if division.val_fraction > 0 and not in_val.any():
            largest = int(np.bincount(labels).max())
            raise ShardError(
                f"--val-fraction {division.val_fraction} leaves no image for val, the largest class has {largest}: "
                f"use {min(1.0, 0.51 / largest):.2g} or more, or 0"
            )
    return in_val


def _listed_keys(lines: Iterable[str]) -> set[str]:
    """Keys that the lines of a list may mean: each begins with a key, or with a path whose stem is the key."""
    paths = [PurePosixPath(line.split()[0]) for line in lines if line.strip()]
    stems = [(path.parent.name, path.stem.replace(".", "_")) for path in paths]
    return {stem for _, stem in stems} | {f"{folder}_{stem}" for folder, stem in stems if folder}


def _smallest_of_class(labels: NDArray[np.int32], keys: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Of each class the images with the smallest keys, the fraction rounded."""
    by_class = np.lexsort((keys, labels))
    counts = np.bincount(labels)
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = counts if fraction == 1 else np.minimum(np.floor(fraction * counts + 0.5).astype(np.int64), counts - 1)
    chosen: NDArray[np.bool_] = rank_in_class < wanted[labels]
    return chosen


def _cut(sizes: NDArray[np.int64], division: Division) -> NDArray[np.int64]:
    """Where a split's images, of these sizes, are cut into shards."""
    if division.shard_bytes is None:
        return np.arange(division.shard_images, len(sizes), division.shard_images)
    taken = np.cumsum(-(-sizes // BLOCK_BYTES) + SAMPLE_BLOCKS) * BLOCK_BYTES
    # An image whose end passes another multiple of the size begins a shard.
    return np.flatnonzero(np.diff(taken // division.shard_bytes)) + 1
