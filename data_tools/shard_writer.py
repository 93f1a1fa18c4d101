"""Writes one shard of a plan: reads its images, prepares them, and puts them into a tar, then its fragment.

The steps are made so that a build may be killed between any two: the shard under a temporary name, its bytes
on the disk, its name, then the fragment. Whatever has no fragment is written again, with the same bytes.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from data_tools.fragment import Reject, ShardProof, fragment_path, is_finished, write_fragment
from data_tools.leakage import LeakageFilter
from data_tools.plan_file import LEAKAGE_FILE, Plan, read_plan, read_rows
from data_tools.prepare import Prepared, prepare
from data_tools.sources.listing import OWN_FILE, source_name
from data_tools.ustar import BLOCK_BYTES, END_OF_TAR, entry
from vitscale.data.checksum import crc32
from vitscale.data.decode import BadSample, sniff
from vitscale.data.index import INDEX_SCHEMA
from vitscale.errors import ShardError

# Some readers look for .jpg and not for .jpeg.
ENDINGS = {"jpeg": "jpg"}

OnBad = Literal["fail", "drop", "keep"]

# Pieces are gathered to writes of this size at least.
WRITE_BYTES = 1 << 20
# writev takes 1,024 at most; a sample has nine.
MAX_PIECES = 1000


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: its place among the plan's shards, and the folder with the plan."""

    out: Path
    shard: int


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard; `written` is false where it was finished before."""

    planned: int
    images: int
    size_bytes: int
    rejects: tuple[Reject, ...]
    written: bool


def write_shard(job: ShardJob, on_bad: OnBad, recheck: bool) -> ShardReport:
    """Write one shard and its fragment, if they are not there already.

    With on_bad=fail a shard with bad images is left unwritten; the report names them.

    Raises:
        ShardError: a source file changed since it was planned.
        OSError: the disk is full or fails.
    """
    plan = read_plan(job.out)
    assert plan is not None
    planned = plan.shards[job.shard]
    path = job.out / planned.name
    proof = is_finished(path, plan.identity, on_bad, recheck)
    if proof is not None:
        left_out = sum(not (reject.bad and on_bad == "keep") for reject in proof.rejects)
        return ShardReport(planned.samples, planned.samples - left_out, proof.size_bytes, proof.rejects, False)
    fragment_path(path).unlink(missing_ok=True)  # it speaks of a shard that is about to change
    # The process number keeps a builder that was killed, but whose worker still writes, out of the way.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            tar = _Tar(file, planned.name)
            rejects = _add_samples(tar, plan, job, on_bad)
            size_bytes, sha256 = tar.finish()
        bad = any(reject.bad for reject in rejects)
        if bad and on_bad == "fail":
            return ShardReport(planned.samples, 0, 0, tuple(rejects), True)
        if tar.samples:
            temporary.replace(path)
        else:
            size_bytes = 0
            path.unlink(missing_ok=True)
        proof = ShardProof(
            plan=plan.identity,
            size_bytes=size_bytes,
            sha256=sha256,
            on_bad=on_bad if bad else "",
            rejects=tuple(rejects),
        )
        write_fragment(path, tar.rows(), proof)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
    return ShardReport(planned.samples, tar.samples, size_bytes, proof.rejects, True)


class _Tar:
    """A shard being written, and its rows of the index."""

    def __init__(self, file: FileIO, name: str) -> None:
        self.samples = 0
        self._name = name
        self._columns: dict[str, list[Any]] = {column: [] for column in INDEX_SCHEMA.names}
        self._file = file
        self._digest = hashlib.sha256()
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._position = 0

    def add(self, key: str, label: int, wnid: str, image: Prepared) -> None:
        """Add a sample: its image, its label and its wnid, as three members."""
        offset = self._position + BLOCK_BYTES
        self._put(entry(f"{key}.{ENDINGS.get(image.format, image.format)}", image.data))
        self._put(entry(f"{key}.cls", str(label).encode()))
        self._put(entry(f"{key}.wnid", wnid.encode()))
        row = (key, self._name, offset, len(image.data), label, wnid)
        content = (image.width, image.height, image.format, crc32(image.data))
        for column, value in zip(self._columns.values(), (*row, *content), strict=True):
            column.append(value)
        self.samples += 1
        if self._waiting_bytes >= WRITE_BYTES or len(self._pieces) > MAX_PIECES:
            self._write()

    def finish(self) -> tuple[int, str]:
        """End the tar and put it on the disk; its size and SHA-256."""
        self._put((END_OF_TAR,))
        self._write()
        os.fsync(self._file.fileno())
        return self._position, self._digest.hexdigest()

    def rows(self) -> pa.Table:
        """Rows of INDEX_SCHEMA."""
        return pa.table(
            [pa.array(self._columns[field.name], _plain(field.type)).cast(field.type) for field in INDEX_SCHEMA],
            schema=INDEX_SCHEMA,
        )

    def _put(self, pieces: Sequence[bytes]) -> None:
        self._pieces += pieces
        size = sum(map(len, pieces))
        self._waiting_bytes += size
        self._position += size

    def _write(self) -> None:
        for piece in self._pieces:
            self._digest.update(piece)
        written = os.writev(self._file.fileno(), self._pieces)
        if written < self._waiting_bytes:  # the disk fills up: the next write says so
            left = memoryview(b"".join(self._pieces))[written:]
            while left:
                left = left[self._file.write(left) :]
        self._pieces, self._waiting_bytes = [], 0


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _add_samples(tar: _Tar, plan: Plan, job: ShardJob, on_bad: OnBad) -> list[Reject]:
    """Add the planned samples to a tar, and tell which are left out, or kept though bad."""
    leakage = LeakageFilter.load(job.out / LEAKAGE_FILE) if plan.settings.leakage else None
    rejects = []

    def reject(row: dict[str, Any], reason: str, bad: bool) -> None:
        file = row["file"]
        source = source_name(plan.files[file].name if plan.files else "", file, row["name"])
        wnid = plan.classes[row["label"]]
        rejects.append(Reject(key=row["key"], source=source, wnid=wnid, reason=reason, bad=bad))

    root = job.out / plan.root
    for row in read_rows(job.out, job.shard):
        data = read_image(root, plan, row)
        leaked = leakage.match(data) if leakage else None
        if leaked:
            reject(row, leaked, bad=False)
            continue
        try:
            image = prepare(data, plan.settings.preparation)
        except BadSample as error:
            reject(row, str(error), bad=True)
            if on_bad != "keep":
                continue
            image = Prepared(data, sniff(data) or "unknown", 0, 0)
        tar.add(row["key"], row["label"], plan.classes[row["label"]], image)
    return rejects


def read_image(root: Path, plan: Plan, row: dict[str, Any]) -> bytes:
    """Bytes of a planned image.

    Args:
        root: folder of the plan's files.
        plan: the plan.
        row: the image's row of PLAN_SCHEMA.

    Raises:
        ShardError: the source changed since it was planned.
    """
    # pathlib would take as long as the reading.
    path = f"{root}/{row['name'] if row['file'] == OWN_FILE else plan.files[row['file']].name}"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(descriptor, row["size"], row["offset"])
    finally:
        os.close(descriptor)
    if len(data) != row["size"]:
        raise ShardError(
            f"{path}: ends inside {row['name']}: it changed since it was planned: remove the build and plan again"
        )
    return data
