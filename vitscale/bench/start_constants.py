"""What is measured of a start on one machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImportCost:
    """Of an interpreter that imports what a rank does."""

    warm_s: float
    warm_cpu_s: float
    cold_s: float
    """After the system was asked to forget the files; what is in use elsewhere it keeps."""
    cold_bytes: int
    """That then came from the disk."""
    opens: int
    looks: int
    """Stats and listings of folders."""
    size_bytes: int
    """Of all modules and shared objects."""


@dataclass(frozen=True)
class MeetingCost:
    """Processor time of rank 0 until a group of n ranks has had its first collectives."""

    eager_s: float
    """Times n squared: every rank connects to every other."""
    lazy_s: float
    """Times n log2 n: ranks connect when they first talk, each to so many others."""
    vote_s: float
    """Of the clock, times n: a vote of n ranks that share this machine's cores."""


@dataclass(frozen=True)
class StartCounts:
    """What a rank other than rank 0 does when a run goes on from a checkpoint."""

    groups: int
    """Process groups of all ranks."""
    gathers: int
    """Of something small from all ranks, such as a vote."""
    opens: int
    """Files of config, dataset and run directory, without shards and checkpoints."""


@dataclass(frozen=True)
class IndexCost:
    """Of a dataset's index."""

    convert_s: float
    """From Parquet to Arrow, a row."""
    open_s: float
    """Once it is converted."""


@dataclass(frozen=True)
class CheckpointCost:
    """Of a checkpoint, and of the model that it is read into."""

    hash_bytes_per_s: float
    """By one thread, of a file in memory."""
    place_bytes: int
    """Of index.json as all ranks of the projection would save it."""
    place_s: float
    """To check and parse that."""
    draw_s: float
    """A parameter: to make the model with its first weights."""


@dataclass(frozen=True)
class Constants:
    """All that is measured."""

    imports: ImportCost
    meeting: MeetingCost
    counts: StartCounts
    index: IndexCost
    checkpoint: CheckpointCost
