"""Where every run of every value lies in the files of a checkpoint, in one small file.

Without it each rank of a load would have to open the file of every rank that saved. It is JSON:

    {"data_starts": [1320, ...],                              bytes before the tensors, by rank
     "values": {"norm.bias": {"master": [[0, 704, "F32", 0, 81920, 2], ...]}}}

What stands for a value is a list of strides, because ZeRO cuts parameters evenly: that of the example is 2 runs of
704 elements, the first of which starts at element 0 of the parameter and lies in the file of rank 0, 81,920 bytes
behind the start of its tensors; the second follows it in the parameter and lies at the same place of the next file.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vitscale.checkpoint.containers import SAFETENSORS_NAMES
from vitscale.checkpoint.integrity import check_file
from vitscale.checkpoint.manifest import Manifest
from vitscale.errors import CheckpointError

INDEX_NAME = "index.json"
_LARGEST = 1 << 62  # of bytes and elements; what is larger comes from damage, and no system call takes it
_LONGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit


class StoredRun(NamedTuple):
    """One tensor of a rank's file: elements [offset, offset + numel) of one value of a parameter."""

    name: str
    """Of the parameter."""
    offset: int
    value: str
    """Such as `master`."""
    numel: int
    dtype: str
    """By safetensors' names, such as F32."""
    byte: int
    """Of its first element, counted from the start of the file's tensors."""


class StoredFile(NamedTuple):
    """What a rank wrote."""

    data_start: int
    """Bytes of the file before its tensors."""
    runs: list[StoredRun]


class Stride(NamedTuple):
    """Runs of equal length that follow each other in a parameter, at the same place of the files of following ranks."""

    offset: int
    """Of the first run in the flattened parameter."""
    numel: int
    """Of each run."""
    dtype: str
    rank: int
    """That wrote the first run."""
    byte: int
    """Of each run, from the start of its file's tensors."""
    runs: int

    @property
    def end(self) -> int:
        """The element behind the last run."""
        return self.offset + self.numel * self.runs

    def continued_by(self, run: StoredRun, rank: int) -> bool:
        """Whether a run is the next of this stride."""
        expected = (self.end, self.numel, self.dtype, self.rank + self.runs, self.byte)
        return expected == (run.offset, run.numel, run.dtype, rank, run.byte)


class Index(BaseModel):
    """The places of all runs of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_starts: list[int]
    """Bytes before the tensors of each rank's file."""
    values: dict[str, dict[str, list[Stride]]]
    """Parameter name -> value -> its strides by offset."""

    @model_validator(mode="after")
    def _lies_in_the_files(self) -> Self:
        ranks = len(self.data_starts)
        known = all(0 <= start < _LARGEST for start in self.data_starts)
        for stride in (s for by_value in self.values.values() for strides in by_value.values() for s in strides):
            known &= stride.dtype in SAFETENSORS_NAMES.values() and stride.numel > 0 and stride.runs > 0
            known &= stride.rank >= 0 and stride.rank + stride.runs <= ranks
            known &= 0 <= stride.offset < _LARGEST and 0 <= stride.byte < _LARGEST
            if not known:
                raise ValueError(f"{tuple(stride)} is no place in the files of {ranks} ranks")
        return self


def rank_file_name(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def index_of(files: Iterable[StoredFile]) -> Index:
    """The index of what each rank wrote, by rank."""
    data_starts: list[int] = []
    values: dict[str, dict[str, list[Stride]]] = {}
    for rank, file in enumerate(files):
        data_starts.append(file.data_start)
        for run in file.runs:
            strides = values.setdefault(run.name, {}).setdefault(run.value, [])
            if strides and strides[-1].continued_by(run, rank):
                strides[-1] = strides[-1]._replace(runs=strides[-1].runs + 1)
            elif run.numel:
                strides.append(Stride(run.offset, run.numel, run.dtype, rank, run.byte, 1))
    for by_value in values.values():
        for strides in by_value.values():
            strides.sort()
    return Index(data_starts=data_starts, values=values)


def write_index(directory: Path, world_size: int) -> Path:
    """Write the index of a directory in which every rank's file is complete.

    Raises:
        CheckpointError: a file is missing or none of ours.
        OSError: the index cannot be written.
    """
    path = directory / INDEX_NAME
    path.write_text(index_of(_files(directory, world_size)).model_dump_json() + "\n", encoding="utf-8")
    return path


def read_index(directory: Path, manifest: Manifest) -> Index:
    """The index of a checkpoint; where it was saved without one, it is made from the headers of all its files.

    Raises:
        CheckpointError: the index, or a file's header, is missing or damaged.
    """
    record = next((record for record in manifest.files if record.name == INDEX_NAME), None)
    if record is None:
        return index_of(_files(directory, manifest.world_size))
    path = directory / INDEX_NAME
    check_file(path, record)
    try:
        return Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(f"{path}: not a readable index: {place}{first['msg']}") from None


def read_header(path: Path) -> StoredFile:
    """What a rank's file holds, by its header alone.

    Raises:
        CheckpointError: it is missing, or not a safetensors file of training state.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return StoredFile(8 + length, [_run(key, entry) for key, entry in header.items() if key != "__metadata__"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file of training state: {error}") from None


def _run(key: str, entry: dict[str, Any]) -> StoredRun:
    name, offset, value = key.split("|")
    (numel,), dtype = entry["shape"], entry["dtype"]
    if dtype not in SAFETENSORS_NAMES.values():
        raise ValueError(f"{key} is of type {dtype}")
    run = StoredRun(name, int(offset), value, int(numel), dtype, int(entry["data_offsets"][0]))
    if not all(0 <= number < _LARGEST for number in (run.offset, run.numel, run.byte)):
        raise ValueError(f"{key} lies nowhere in it")
    return run


def _files(directory: Path, world_size: int) -> Iterator[StoredFile]:
    return (read_header(directory / rank_file_name(rank)) for rank in range(world_size))
