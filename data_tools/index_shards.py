"""Makes a dataset of WebDataset shards that exist already: one pass over the headers, the shards stay as they are.

A sample is the members that follow each other under one key. Its image is found by the extension, its class by
KEY.wnid, KEY.cls, KEY.json or KEY.txt. All other members are passed over: they are bytes between two headers, and
nothing in a shard is ever executed.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import braceexpand
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg

from data_tools.progress import progress
from data_tools.shard_classes import CLASS_EXTENSIONS, Told, read_class, resolve_classes
from data_tools.tar_scan import Member, TarScan, split_name
from data_tools.workers import ordered_map
from vitscale.data import checksum
from vitscale.data.decode import MAX_IMAGE_PIXELS, BadSample, probe, sniff
from vitscale.data.index import (
    DATASET_FILE,
    INDEX_SCHEMA,
    ShardFile,
    SplitFiles,
    write_dataset_json,
    write_split,
)
from vitscale.errors import ShardError

IMAGE_EXTENSIONS = ("jpeg", "jpg", "png", "webp", "gif", "bmp", "tif", "tiff", "unknown")

# A class is a word or a number; JSON may hold a caption beside it, and a text member may be a caption.
MAX_CLASS_BYTES = 1 << 16

# Bytes of a JPEG in which its size is looked for, before the whole file is read: much metadata may come first.
JPEG_HEAD_BYTES = 65536
_JPEG = b"\xff\xd8\xff"

MAX_NAMED = 20

_COLUMNS = {
    "key": pa.string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "label": pa.int32(),
    "wnid": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "format": pa.string(),
    "crc32": pa.uint32(),
}


@dataclass(frozen=True)
class IndexReport:
    """What an indexed dataset holds; `unreadable` are the keys of images without a readable header, they stay in."""

    out: Path
    classes: int
    samples: dict[str, int]
    shards: int
    shard_bytes: int
    unreadable: tuple[str, ...]
    crc: bool
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        samples = ", ".join(f"{count} {split}" for split, count in self.samples.items())
        gb = self.shard_bytes / 1e9
        summary = (
            f"{self.out}: {samples} samples of {self.classes} classes in {self.shards} shards, {gb:.2f} GB in "
            f"{self.seconds:.1f} s ({gb / self.seconds:.2f} GB/s)"
        )
        named = ", ".join(self.unreadable[:MAX_NAMED]) + (", ..." if len(self.unreadable) > MAX_NAMED else "")
        bad = f"{len(self.unreadable)} images cannot be read, training replaces them: {named}"
        return [summary, bad] if self.unreadable else [summary]

    def tree(self) -> dict[str, Any]:
        """For machines."""
        return {**vars(self), "out": str(self.out), "gb_per_s": self.shard_bytes / 1e9 / self.seconds}


def find_shards(words: Sequence[str]) -> tuple[Path, ...]:
    """Shards that a command line names: files, folders of tars, names with wildcards or {000..127}.

    Raises:
        ShardError: a word that names no shard, a URL or a pipe.
    """
    shards: list[Path] = []
    for word in words:
        if "://" in word or word.startswith("pipe:"):
            raise ShardError(f"{word}: only files of this machine are indexed: copy the shards here first")
        for name in braceexpand.braceexpand(word):
            path = Path(name)
            if path.is_dir():
                found = sorted(path.glob("*.tar"))
            elif path.exists():
                found = [path]
            else:
                found = sorted(path.parent.glob(path.name))
            if not found:
                raise ShardError(f"{name}: no shard of this name: give tar files, or a folder that holds some")
            shards += found
    return tuple(shards)


def index_shards(
    splits: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    classes: Sequence[str] | None,
    label_space: str | None,
    crc: bool,
    workers: int,
) -> IndexReport:
    """Write the indexes and dataset.json of a dataset whose shards stay where they are.

    Args:
        splits: shards by the name of their split, in their order.
        out: folder to write; it may be that of the shards.
        classes: what the labels mean, in their order; None takes the wnids that the shards tell, or, where they tell
            numbers alone, the names class-00000, class-00001, ...
        label_space: name of the label space that `classes` is, if it is one.
        crc: read every image whole and keep its crc32; otherwise headers alone are read.
        workers: processes.

    Raises:
        ShardError: `out` holds a dataset, a shard is damaged, a sample has no image or no class, its class is not
            among the classes, or a key comes twice.
    """
    started = time.monotonic()
    if (out / DATASET_FILE).exists():
        raise ShardError(f"{out}: holds a dataset already: give another --out, or remove its {DATASET_FILE}")
    paths = [path.resolve() for shards in splits.values() for path in shards]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    names = [path.relative_to(root).as_posix() for path in paths]
    scanned = list(progress(ordered_map(partial(scan_shard, crc=crc), paths, workers), len(paths), "shard"))
    tables = [
        table.append_column("shard", pa.repeat(name, len(table))) for name, table in zip(names, scanned, strict=True)
    ]
    whole = pa.concat_tables(tables).combine_chunks()
    _check_keys(root, whole)
    classes, whole = resolve_classes(root, whole, classes)
    files = [
        ShardFile(name=name, size_bytes=path.stat().st_size, samples=len(table))
        for name, path, table in zip(names, paths, scanned, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    written, row, shard = {}, 0, 0
    for split, shards in splits.items():
        own = tuple(files[shard : shard + len(shards)])
        samples = sum(file.samples for file in own)
        written[split] = _write_split(out, split, own, whole.slice(row, samples), classes)
        row, shard = row + samples, shard + len(shards)
    write_dataset_json(
        out,
        seed=0,
        plan=hashlib.sha256("\n".join(f"{file.name} {file.size_bytes}" for file in files).encode()).hexdigest(),
        classes=classes,
        splits=written,
        label_space=label_space,
        shards_at="" if root == out.resolve() else str(root),
    )
    return IndexReport(
        out=out,
        classes=len(classes),
        samples={split: files.samples for split, files in written.items()},
        shards=len(paths),
        shard_bytes=sum(file.size_bytes for file in files),
        unreadable=tuple(whole.filter(pc.equal(whole["width"], 0))["key"].to_pylist()),
        crc=crc,
        seconds=time.monotonic() - started,
    )


def scan_shard(path: Path, crc: bool) -> pa.Table:
    """Rows of one shard: those of the index without its name, and the classes as the shard tells them.

    Raises:
        ShardError: the shard is damaged or empty, or a sample has no image, two, or no class.
    """
    rows = []
    with TarScan(path) as tar:
        images = _Images(tar, crc)
        for key, image, told, first in walk_samples(tar):
            try:
                label, wnid = read_class(told)
            except ValueError as error:
                raise tar.fault(first, f"sample {key} {error}", "leave the shard out") from None
            rows.append((key, image.offset, image.size, label, wnid, *images.look(image)))
    if not rows:
        raise ShardError(f"{path}: holds no samples: leave it out")
    columns = zip(*rows, strict=True)
    return pa.table({name: pa.array(next(columns), kind) for name, kind in _COLUMNS.items()})


def walk_samples(tar: TarScan) -> Iterator[tuple[str, Member, Told, int]]:
    """Key, image, what tells the class, and offset of every sample.

    Raises:
        ShardError: the shard is damaged, or a sample has not exactly one image.
    """
    prefix, first = "", 0
    images: list[Member] = []
    told: list[tuple[str, bytes]] = []
    for member in tar:
        if not prefix or not member.name.startswith(prefix):
            if images or told:
                yield prefix[:-1], _only(tar, images, prefix, first), tuple(told), first
            prefix, first = f"{split_name(member.name)[0]}.", member.header
            images, told = [], []
        extension = member.name[len(prefix) :].lower()
        if extension in IMAGE_EXTENSIONS:
            images.append(member)
        elif extension in CLASS_EXTENSIONS and member.size <= MAX_CLASS_BYTES:
            whole = len(member.head) == member.size
            told.append((extension, member.head if whole else tar.read(member.offset, member.size)))
    if images or told:
        yield prefix[:-1], _only(tar, images, prefix, first), tuple(told), first


def _only(tar: TarScan, images: Sequence[Member], prefix: str, first: int) -> Member:
    if len(images) != 1:
        text = f"sample {prefix[:-1]} has {len(images)} images in place of one"
        raise tar.fault(first, text, "leave the shard out")
    return images[0]


def _check_keys(root: Path, table: pa.Table) -> None:
    """Training names samples by their keys, and the builders' splits follow from them: they must be unique."""
    if len(pc.unique(table["key"])) == len(table):
        return
    counts = pc.value_counts(table["key"])
    key = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
    first, second = table.filter(pc.equal(table["key"], key)).slice(0, 2).select(["shard", "offset"]).to_pylist()
    raise ShardError(
        f"{root / second['shard']}: offset {second['offset']}: key {key} is taken already, in {first['shard']} at "
        f"offset {first['offset']}: leave one out, or shard them anew with build --source shards"
    )


def _write_split(
    out: Path, split: str, shards: tuple[ShardFile, ...], table: pa.Table, classes: Sequence[str]
) -> SplitFiles:
    table = pa.table([table[field.name].cast(field.type) for field in INDEX_SCHEMA], schema=INDEX_SCHEMA)
    return write_split(out, split, classes, table, shards)


class _Images:
    """Looks at the images of a shard, whole or at their heads, in one buffer that is used again and again."""

    def __init__(self, tar: TarScan, crc: bool) -> None:
        self._tar = tar
        self._crc = crc
        self._buffer = memoryview(bytearray(1 << 18))

    def look(self, image: Member) -> tuple[int, int, str, int | None]:
        """Width and height in pixels (0 where they cannot be read), format and crc32 of an image."""
        crc32 = None
        if self._crc:
            if image.size > len(self._buffer):
                self._buffer = memoryview(bytearray(2 * image.size))
            data = self._buffer[: image.size]
            self._tar.read_into(image.offset, data)
            crc32 = checksum.crc32(data)
        if image.head.startswith(_JPEG):
            try:  # the usual case, without the detours of `probe`
                height, width, _, _ = simplejpeg.decode_jpeg_header(image.head)
                if height * width <= MAX_IMAGE_PIXELS:
                    return width, height, "jpeg", crc32
            except (ValueError, KeyError):
                pass
        for size in (len(image.head), JPEG_HEAD_BYTES, image.size):
            head = image.head if size == len(image.head) else self._tar.read(image.offset, min(size, image.size))
            # Other formats than JPEG may say their size at the end of the file.
            if len(head) == image.size or head.startswith(_JPEG):
                try:
                    image_format, width, height = probe(head)
                    return width, height, image_format, crc32
                except BadSample:
                    continue
        return 0, 0, sniff(head) or "unknown", crc32
