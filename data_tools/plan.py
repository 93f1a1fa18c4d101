"""Decides which image goes into which shard: a pure function of the source's listing, the seed and the sizes.

Every choice follows from a hash of the seed and the image's key, so it does not depend on the machine,
the number of workers or numpy's generators, and an image keeps its split when other classes are added.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_tools.class_tars import Member
from data_tools.ustar import MAX_NAME_BYTES
from vitscale.data.order import BUILD_SHUFFLE, BUILD_SPLIT, hash64
from vitscale.errors import ShardError

# The longest extension is ".unknown".
MAX_KEY_BYTES = MAX_NAME_BYTES - len(".unknown")


@dataclass(frozen=True)
class Sample:
    """One image to write."""

    key: str
    wnid: str
    label: int
    member: Member


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its name and its samples in order."""

    split: str
    name: str
    samples: tuple[Sample, ...]


def plan_shards(
    listing: Mapping[str, Sequence[Member]], seed: int, val_fraction: float, shard_images: int
) -> list[ShardPlan]:
    """Shards of all splits: a validation part of every class, and everything shuffled over all classes.

    Args:
        listing: images by wnid, wnids in label order.
        seed: seed of split and shuffle.
        val_fraction: part of each class that goes to val, rounded; train keeps at least one image of each
            class unless it is 1.
        shard_images: images a shard; the last one of a split may have fewer.

    Raises:
        ShardError: two images have one key, a key is too long, or the fraction leaves nothing for val.
    """
    samples = _samples(listing)
    key_hashes = np.array([_hash_of_key(sample.key) for sample in samples], dtype=np.uint64)
    labels = np.array([sample.label for sample in samples])
    in_val = _choose_val(labels, hash64(seed, BUILD_SPLIT, key_hashes), val_fraction)
    if val_fraction > 0 and not in_val.any():
        largest = int(np.bincount(labels).max())
        raise ShardError(
            f"--val-fraction {val_fraction} leaves no image for val, the largest class has {largest}: "
            f"use {min(1.0, 0.51 / largest):.2g} or more, or 0"
        )
    shuffled = np.argsort(hash64(seed, BUILD_SHUFFLE, key_hashes), kind="stable")
    plans = []
    for split, chosen in (("train", ~in_val), ("val", in_val)):
        rows = shuffled[chosen[shuffled]]
        for number, first in enumerate(range(0, len(rows), shard_images)):
            shard = tuple(samples[row] for row in rows[first : first + shard_images])
            plans.append(ShardPlan(split, f"{split}-{number:06d}.tar", shard))
    return plans


def plan_hash(plans: Sequence[ShardPlan], settings: str) -> str:
    """Identity of a build: its settings, and every sample with its place in source and shards."""
    digest = hashlib.sha256(settings.encode())
    for plan in plans:
        digest.update(plan.name.encode())
        for sample in plan.samples:
            member = sample.member
            digest.update(f"\n{sample.key} {sample.wnid} {member.name} {member.offset} {member.size}".encode())
    return digest.hexdigest()


def _samples(listing: Mapping[str, Sequence[Member]]) -> list[Sample]:
    """All images with their keys: the file's stem, after its wnid where another file has the same stem."""
    stems = Counter(member.stem for members in listing.values() for member in members)
    samples = []
    sources: dict[str, str] = {}
    for label, (wnid, members) in enumerate(listing.items()):
        for member in members:
            key = member.stem if stems[member.stem] == 1 else f"{wnid}_{member.stem}"
            source = f"{wnid}.tar: {member.name}"
            if key in sources:
                raise ShardError(f"{source}: has the same key {key} as {sources[key]}: rename one of the two")
            if len(key.encode()) > MAX_KEY_BYTES:
                raise ShardError(f"{source}: the name is longer than {MAX_KEY_BYTES} bytes: rename it")
            sources[key] = source
            samples.append(Sample(key, wnid, label, member))
    return samples


def _hash_of_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _choose_val(labels: NDArray[np.int64], keys: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Of each class the images with the smallest keys, the fraction rounded."""
    by_class = np.lexsort((keys, labels))
    counts = np.bincount(labels)
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = counts if fraction == 1 else np.minimum(np.floor(fraction * counts + 0.5).astype(np.int64), counts - 1)
    chosen: NDArray[np.bool_] = rank_in_class < wanted[labels]
    return chosen
