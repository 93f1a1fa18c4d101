"""Checks a dataset down to every byte: the tars against the index, the images against their checksums, and each other.

A fault is one line that names the file and the sample; the check goes on to the next sample, or, where a tar cannot
be walked any further, to the next shard.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.fragment import fragment_path, read_fragment, read_proof
from data_tools.index_shards import walk_samples
from data_tools.prepare import check_image
from data_tools.progress import progress
from data_tools.shard_classes import Told, read_class
from data_tools.tar_scan import Member, TarScan
from data_tools.workers import ordered_map
from vitscale.data import checksum
from vitscale.data.decode import BadSample, probe
from vitscale.data.index import DATASET_FILE, INDEX_SCHEMA, Dataset, ShardFile, read_dataset, read_index
from vitscale.errors import ShardError

# A shard that the builder wrote holds image, label and wnid of each sample, and nothing else.
OWN_MEMBERS = 3

MAX_NAMED = 20


@dataclass(frozen=True)
class ShardCheck:
    """A shard to check: where it is, what dataset.json says of it, and its rows of the index."""

    path: Path
    file: ShardFile
    rows: pa.Table


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and the faults, a line each."""

    directory: Path
    samples: int
    shards: int
    image_bytes: int
    decoded: bool
    without_checksum: int
    faults: tuple[str, ...]
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        state = f"{len(self.faults)} faults" if self.faults else "sound"
        how = "structure, checksums and every image decoded" if self.decoded else "structure and checksums"
        missing = f"; {self.without_checksum} samples have no checksum in the index" if self.without_checksum else ""
        summary = (
            f"{self.directory}: {self.samples} samples in {self.shards} shards: {state} ({how}, {self.seconds:.1f} s, "
            f"{self.samples / self.seconds:.0f} images/s, {self.image_bytes / 1e6 / self.seconds:.0f} MB/s{missing})"
        )
        return [*self.faults, summary]

    def tree(self) -> dict[str, Any]:
        """For machines."""
        rates = {"images_per_s": self.samples / self.seconds, "image_bytes_per_s": self.image_bytes / self.seconds}
        return {**vars(self), "directory": str(self.directory), "faults": list(self.faults), **rates}


def verify(directory: Path, *, decode_images: bool, workers: int) -> VerifyReport:
    """Check a dataset, built or indexed.

    Args:
        directory: its folder.
        decode_images: find out whether every image can be decoded, too.
        workers: processes.

    Raises:
        ShardError: there is no finished dataset in the folder.
    """
    started = time.monotonic()
    dataset = read_dataset(directory)
    faults: list[str] = []
    checks: list[ShardCheck] = []
    for split in dataset.splits:
        try:
            checks += _shard_checks(directory, dataset, split)
        except ShardError as error:
            faults.append(str(error))
    found = ordered_map(partial(check_shard, decode_images=decode_images), checks, workers)
    for shard_faults in progress(found, len(checks), "shard"):
        faults += shard_faults
    return VerifyReport(
        directory=directory,
        samples=sum(len(check.rows) for check in checks),
        shards=len(checks),
        image_bytes=sum(int(check.rows["size"].to_numpy().sum()) for check in checks),
        decoded=decode_images,
        without_checksum=sum(check.rows["crc32"].null_count for check in checks),
        faults=tuple(faults),
        seconds=time.monotonic() - started,
    )


def _shard_checks(directory: Path, dataset: Dataset, split: str) -> Iterator[ShardCheck]:
    files = dataset.splits[split]
    table = read_index(directory, dataset, split, INDEX_SCHEMA.names)
    shard = table["shard"].combine_chunks()
    names = shard.dictionary.to_pylist()
    codes = shard.indices.to_numpy()
    unknown = sorted(set(names) - {file.name for file in files.shards})
    if unknown:
        raise ShardError(f"{directory / files.index}: shard {unknown[0]} is not in {DATASET_FILE}: build it again")
    root = Path(dataset.shards_at or directory)
    for file in files.shards:
        rows = table.filter(pa.array(codes == names.index(file.name))) if file.name in names else table.slice(0, 0)
        yield ShardCheck(root / file.name, file, rows)


def check_shard(check: ShardCheck, decode_images: bool) -> list[str]:
    """Faults of one shard, a line each."""
    path = check.path
    if not path.is_file():
        return [f"{path}: shard is missing: copy it again"]
    faults = []
    if path.stat().st_size != check.file.size_bytes:
        faults.append(f"{path}: has {path.stat().st_size} bytes, {DATASET_FILE} says {check.file.size_bytes}")
    if len(check.rows) != check.file.samples:
        faults.append(f"{path}: the index has {len(check.rows)} samples, {DATASET_FILE} says {check.file.samples}")
    own = fragment_path(path).exists()
    if own:
        faults += _fragment_faults(check)
    rows = {row["key"]: row for row in check.rows.to_pylist()}
    try:
        with TarScan(path) as tar:
            reader = _SampleReader(tar, own, decode_images)
            for key, image, told, _ in walk_samples(tar):
                row = rows.pop(key, None)
                reasons = ["is not in the index"] if row is None else reader.reasons(row, image, told)
                faults += [f"{path}: sample {key}: {reason}" for reason in reasons]
            if own and tar.members != OWN_MEMBERS * check.file.samples:
                faults.append(f"{path}: has {tar.members} members, {OWN_MEMBERS} a sample would be right")
    except ShardError as error:
        return [*faults, f"{error} (what follows in this shard is not checked)"]
    faults += [f"{path}: sample {key}: is in the index, not in the shard" for key in list(rows)[:MAX_NAMED]]
    if len(rows) > MAX_NAMED:
        faults.append(f"{path}: {len(rows) - MAX_NAMED} more samples are in the index, not in the shard")
    return faults


def _fragment_faults(check: ShardCheck) -> list[str]:
    """What the shard's own index says otherwise than the merged one."""
    fragment = fragment_path(check.path)
    proof = read_proof(check.path)
    if proof is None:
        return [f"{fragment}: damaged: copy it again"]
    faults = []
    if proof.size_bytes != check.file.size_bytes or check.file.sha256 not in (None, proof.sha256):
        faults.append(f"{fragment}: size or SHA-256 of its shard are not those in {DATASET_FILE}: copy both again")
    try:
        if read_fragment(check.path).to_pylist() != check.rows.to_pylist():
            faults.append(f"{fragment}: its rows are not those of the split's index: copy both again")
    except ShardError as error:
        faults.append(str(error))
    return faults


class _SampleReader:
    """Compares the samples of a shard with their rows of the index."""

    def __init__(self, tar: TarScan, own: bool, decode_images: bool) -> None:
        self._tar = tar
        self._own = own
        self._decode_images = decode_images

    def reasons(self, row: dict[str, Any], image: Member, told: Told) -> list[str]:
        """What is wrong with a sample."""
        if (image.offset, image.size) != (row["offset"], row["size"]):
            return ["its image is not where the index says"]
        return self._class_faults(row, told) + self._image_faults(row, image)

    def _class_faults(self, row: dict[str, Any], told: Told) -> list[str]:
        try:
            label, wnid = read_class(told)
        except ValueError as error:
            return [str(error)]
        faults = []
        if label != row["label"] and (self._own or label >= 0):
            faults.append(f"its label is {label} in the shard, {row['label']} in the index")
        if wnid != row["wnid"] and (self._own or wnid):
            faults.append(f"its class is {wnid or 'missing'} in the shard, {row['wnid']} in the index")
        return faults

    def _image_faults(self, row: dict[str, Any], image: Member) -> list[str]:
        data = self._tar.read(image.offset, image.size)
        if row["crc32"] is not None and checksum.crc32(data) != row["crc32"]:
            return ["its crc32 is not the one in the index"]
        if row["width"] == 0:
            return []  # it was kept although it cannot be read, and the index says so
        try:
            found = probe(data)
            if self._decode_images:
                check_image(data)
        except BadSample as error:
            return [str(error)]
        stored = row["format"], row["width"], row["height"]
        return [] if found == stored else [f"is {found} (format, width, height), the index says {stored}"]
