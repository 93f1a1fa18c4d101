"""Builds a dataset from class tars: scan, plan, write the shards, then the indexes, then dataset.json.

The output is the same byte for byte, whatever the number of workers.
"""

import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from tqdm import tqdm

from data_tools.class_tars import find_class_tars, scan
from data_tools.plan import Sample, ShardPlan, plan_hash, plan_shards
from data_tools.ustar import BLOCK_BYTES, END_OF_TAR, MAX_FILE_BYTES, entry
from data_tools.workers import ordered_map
from vitscale.data.decode import BadSample, decode, probe, sniff
from vitscale.data.index import (
    DATASET_FILE,
    INDEX_SCHEMA,
    ShardFile,
    SplitFiles,
    read_dataset,
    split_hash,
    write_dataset_json,
    write_index,
)
from vitscale.errors import ShardError

OnBad = Literal["fail", "drop", "keep"]
Check = Literal["decode", "header"]

# Files a build writes; an unfinished one is cleared of them, any other file makes the folder someone else's.
SHARD_FILES = ("train-*.tar", "val-*.tar", "train-*.tar.tmp", "val-*.tar.tmp")
OWN_FILES = (*SHARD_FILES, "train.parquet", "val.parquet", f"{DATASET_FILE}.tmp")

MAX_NAMED = 20


@dataclass(frozen=True)
class BuildSettings:
    """What makes two builds of one source differ."""

    seed: int
    val_fraction: float
    shard_images: int
    on_bad: OnBad
    check: Check


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read: class tar and member, and the reason."""

    source: str
    reason: str


@dataclass(frozen=True)
class WrittenShard:
    """What a worker hands back: the shard's file, its rows of the index, and the bad images it met."""

    split: str
    file: ShardFile
    rows: pa.Table
    bad: tuple[BadImage, ...]


def build(source: Path, out: Path, settings: BuildSettings, workers: int) -> list[str]:
    """Build `out` from the class tars in `source`; returns the lines to tell.

    Raises:
        ShardError: the source is damaged, has bad images under on_bad=fail, or `out` cannot take the build.
    """
    started = time.monotonic()
    tars = find_class_tars(source)
    listing = dict(zip(tars, _progress(ordered_map(scan, tars.values(), workers), len(tars), "class"), strict=True))
    plans = plan_shards(listing, settings.seed, settings.val_fraction, settings.shard_images)
    plan = plan_hash(plans, repr(astuple(settings)))
    if (out / DATASET_FILE).exists():
        if read_dataset(out).plan == plan:
            return [f"{out}: this build is finished already"]
        raise ShardError(f"{out}: holds another finished build: give another --out, or remove the folder")
    try:
        _clear_unfinished(out)
        write = partial(_write_shard, source=source, out=out, settings=settings)
        shards = list(_progress(ordered_map(write, plans, workers), len(plans), "shard"))
        bad = [image for shard in shards for image in shard.bad]
        if bad and settings.on_bad == "fail":
            raise ShardError(
                f"{source / bad[0].source}: {bad[0].reason}; {len(bad)} bad images in all: "
                "leave them out with --on-bad drop, or keep them with --on-bad keep"
            )
        _finish(out, list(tars), shards, settings, plan)
    except OSError as error:
        raise ShardError(
            f"{out}: cannot be built ({error}): check the folders and the disk, then run it again"
        ) from None
    return [
        *_name_bad(bad, settings.on_bad),
        _summary(len(tars), shards, len(bad), settings, time.monotonic() - started),
    ]


def _clear_unfinished(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    left = list(out.iterdir())
    foreign = [path.name for path in left if not any(path.match(pattern) for pattern in OWN_FILES)]
    if foreign:
        raise ShardError(f"{out}: holds {min(foreign)}, which no build writes: give an empty or new folder as --out")
    for path in left:
        path.unlink()


def _write_shard(plan: ShardPlan, source: Path, out: Path, settings: BuildSettings) -> WrittenShard:
    """Write one shard under a temporary name, make it durable, then give it its name."""
    rows: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
    bad = []
    temporary = out / f"{plan.name}.tmp"
    position = 0
    with temporary.open("wb", buffering=1 << 20) as file:
        for sample in plan.samples:
            data = _read_member(source / f"{sample.wnid}.tar", sample)
            try:
                image_format, width, height = _test(data, settings.check)
            except BadSample as error:
                bad.append(BadImage(f"{sample.wnid}.tar: {sample.member.name}", str(error)))
                if settings.on_bad != "keep":
                    continue
                image_format, width, height = sniff(data) or "unknown", 0, 0
            image = entry(f"{sample.key}.{image_format}", data)
            label = entry(f"{sample.key}.cls", str(sample.label).encode())
            file.write(b"".join((*image, *label)))
            place = (sample.key, plan.name, position + BLOCK_BYTES, len(data), sample.label, sample.wnid)
            content = (width, height, image_format, zlib.crc32(data))
            for column, value in zip(rows.values(), (*place, *content), strict=True):
                column.append(value)
            position += sum(map(len, image)) + sum(map(len, label))
        file.write(END_OF_TAR)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(out / plan.name)
    table = pa.table(rows, schema=INDEX_SCHEMA)
    return WrittenShard(plan.split, ShardFile(name=plan.name, size_bytes=position + len(END_OF_TAR)), table, tuple(bad))


def _read_member(tar: Path, sample: Sample) -> bytes:
    member = sample.member
    if member.size > MAX_FILE_BYTES:
        raise ShardError(f"{tar}: {member.name} has {member.size} bytes, more than a shard's entry holds: remove it")
    with tar.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), member.size, member.offset)
    if len(data) != member.size:
        raise ShardError(f"{tar}: ends inside {member.name}: it changed while it was read; run the build again")
    return data


def _test(data: bytes, check: Check) -> tuple[str, int, int]:
    if check == "decode":
        decode(data)
    return probe(data)


def _finish(
    out: Path, classes: Sequence[str], shards: Sequence[WrittenShard], settings: BuildSettings, plan: str
) -> None:
    """Write the indexes and, last of all, dataset.json. A shard or split that lost all its images is left out."""
    splits = {}
    for split in ("train", "val"):
        own = [shard for shard in shards if shard.split == split]
        written = [shard for shard in own if len(shard.rows)]
        for shard in own:
            if not len(shard.rows):
                (out / shard.file.name).unlink()
        if not written:
            continue
        table = pa.concat_tables([shard.rows for shard in written])
        sha256 = write_index(out / f"{split}.parquet", table)
        splits[split] = SplitFiles(
            samples=len(table),
            shards=tuple(shard.file for shard in written),
            index=f"{split}.parquet",
            index_sha256=sha256,
            hash=split_hash(classes, table),
        )
    if not splits:
        raise ShardError(f"{out}: every image is bad, nothing is left to build: check the source")
    write_dataset_json(out, settings.seed, plan, classes, splits)


def _progress(results: Iterator[Any], total: int, unit: str) -> Iterator[Any]:
    return iter(tqdm(results, total=total, unit=unit, disable=None))  # None: only on a terminal


def _name_bad(bad: Sequence[BadImage], on_bad: OnBad) -> list[str]:
    done = "kept" if on_bad == "keep" else "left out"
    lines = [f"{done}: {image.source}: {image.reason}" for image in bad[:MAX_NAMED]]
    return lines + ([f"{done}: {len(bad) - MAX_NAMED} more"] if len(bad) > MAX_NAMED else [])


def _summary(classes: int, shards: Sequence[WrittenShard], bad: int, settings: BuildSettings, seconds: float) -> str:
    written = [shard for shard in shards if len(shard.rows)]
    images = sum(len(shard.rows) for shard in written)
    written_bytes = sum(shard.file.size_bytes for shard in written)
    rejected = f"{bad} bad images {'kept' if settings.on_bad == 'keep' else 'left out'}"
    return (
        f"{classes} classes, {images} images, {len(written)} shards, {written_bytes / 1e6:.1f} MB, {rejected}, "
        f"{seconds:.1f} s ({images / seconds:.0f} images/s)"
    )
