"""What a start costs on many nodes, on paper: from measured constants and two assumed clusters to a table."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vitscale.bench.start_constants import Constants

SHARD_IMAGES = 4096
"""The builder's default."""
ROW_BYTES = 40
"""Of a real index, whose keys, offsets and checksums hardly compress."""
INTERPRETERS = 2
"""That import, a rank: itself, and the server that its loader's workers are forked from."""
CHECK_THREADS = 8
"""That hash a checkpoint's files on rank 0."""
STATE_BYTES = 16
"""A parameter's, in a checkpoint: fp32 weights, Adam's two moments, the moving average."""
WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Scale:
    """The run that is projected."""

    nodes: int
    ranks_per_node: int
    samples: int
    parameters: int

    @property
    def ranks(self) -> int:
        """On all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint."""
        return STATE_BYTES * self.parameters


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines."""

    opens_once: bool
    """Whether a node asks the metadata server once when its processes open a file, or at each open."""
    metadata_per_s: float
    """Opens and stats that the shared file system answers to all nodes together."""
    look_s: float
    """One such, of one process."""
    total_bytes_per_s: float
    """Of the shared file system to all nodes."""
    node_bytes_per_s: float
    """To one of them."""
    hop_s: float
    """A message from one rank to another over TCP, until the other acts on it."""
    core: float
    """Speed of a core over the measured one's."""


BEST = Cluster(True, 100_000, 0.2e-3, 200e9, 10e9, 50e-6, 2.0)
WORST = Cluster(False, 20_000, 1e-3, 50e9, 2e9, 200e-6, 1.0)
"""Published tests of Lustre with one metadata server have 15,000 to 29,000 creations and 400,000 stats a second; an
open lies between."""


@dataclass(frozen=True)
class Part:
    """A part of a start: a row of the table."""

    name: str
    measured: Callable[[Constants], str]
    grows: str
    seconds: Callable[[Constants, Scale, Cluster], float]
    against: str
    counted: bool = True
    """Whether every start has it."""


def gather_rounds(ranks: int) -> int:
    """Messages one after the other until every rank has heard from every other: twice as many know after each."""
    return (ranks - 1).bit_length()


def _import_names(c: Constants, s: Scale, k: Cluster) -> float:
    # Stats and listings are answered from the node's memory when they are asked again.
    openers = s.nodes if k.opens_once else s.ranks * INTERPRETERS
    return (c.imports.opens * openers + c.imports.looks * s.nodes) / k.metadata_per_s


def _meet_eagerly(c: Constants, s: Scale, k: Cluster) -> float:
    return c.counts.groups * c.meeting.eager_s * s.ranks**2 / k.core


def _convert(c: Constants, s: Scale, k: Cluster) -> float:
    # Rank 0's node first, then all others at once.
    reading_s = s.nodes * ROW_BYTES * s.samples / k.total_bytes_per_s
    return 2 * c.index.convert_s * s.samples / k.core + reading_s


def _check(c: Constants, s: Scale, k: Cluster) -> float:
    rate = min(k.node_bytes_per_s, CHECK_THREADS * c.checkpoint.hash_bytes_per_s * k.core)
    return s.state_bytes / rate + s.ranks * k.look_s * (1 + 1 / CHECK_THREADS)


def _places(c: Constants, s: Scale, k: Cluster) -> float:
    reading_s = s.nodes * c.checkpoint.place_bytes / k.total_bytes_per_s
    return c.checkpoint.place_s / k.core + 2 * s.ranks / k.metadata_per_s + reading_s


def _own_state(c: Constants, s: Scale, k: Cluster) -> float:
    reading_s = max(s.state_bytes / k.total_bytes_per_s, s.state_bytes / s.nodes / k.node_bytes_per_s)
    return reading_s + s.ranks / k.metadata_per_s


PARTS = (
    Part(
        "import: names",
        lambda c: f"{c.imports.opens} opens, {c.imports.looks} stats and listings",
        "nodes or ranks",
        _import_names,
        "environment in one image (`--container`) or on the nodes' disks (`--env-setup`): then nothing",
    ),
    Part(
        "import: bytes",
        lambda c: f"{c.imports.size_bytes / 1e6:.0f} MB of modules and shared objects, at most",
        "nodes",
        lambda c, s, k: s.nodes * c.imports.size_bytes / k.total_bytes_per_s,
        "the same; a node's ranks share its page cache",
    ),
    Part(
        "import: running it",
        lambda c: (
            f"{c.imports.warm_s:.1f} s, {c.imports.warm_cpu_s:.1f} s of a core; {c.imports.cold_s:.1f} s with "
            f"{c.imports.cold_bytes / 1e6:.0f} MB from disk"
        ),
        "no",
        lambda c, s, k: c.imports.warm_s / k.core,
        "compiled files travel in the copy of the code; the loader's server imports beside the building of the engine",
    ),
    Part(
        "rendezvous, all connect to all",
        lambda c: f"rank 0: {c.meeting.eager_s * 1e6:.1f} µs n² a group",
        "ranks²",
        _meet_eagerly,
        "torch's default, which is not used",
        counted=False,
    ),
    Part(
        "rendezvous",
        lambda c: f"rank 0: {c.meeting.lazy_s * 1e3:.2f} ms n log2 n a group; {c.counts.groups} groups of all ranks",
        "ranks log2 ranks",
        lambda c, s, k: c.counts.groups * c.meeting.lazy_s * s.ranks * math.log2(s.ranks) / k.core,
        "`TORCH_GLOO_LAZY_INIT=1`, set by itself",
    ),
    Part(
        "votes and the like",
        lambda c: (
            f"{c.counts.gathers} of them at least, {c.meeting.vote_s * 1e6:.0f} µs n each on this machine's cores"
        ),
        "log2 ranks",
        lambda c, s, k: c.counts.gathers * gather_rounds(s.ranks) * k.hop_s,
        "twice as many ranks are heard from in each round; what rank 0 tells all goes along a tree",
    ),
    Part(
        "index: conversion",
        lambda c: f"{c.index.convert_s * 1e6:.2f} s a million rows; {ROW_BYTES} bytes read a row",
        "nodes (bytes)",
        _convert,
        "once a node under a lock, then kept in `VITSCALE_CACHE`: later starts have none of it",
    ),
    Part(
        "index: open",
        lambda c: f"{c.index.open_s * 1e3:.0f} ms, no row is read",
        "ranks (names)",
        lambda c, s, k: c.index.open_s / k.core + s.ranks / k.metadata_per_s,
        "mapped into memory, shared by a node's processes",
    ),
    Part(
        "index: shards there and whole",
        lambda _: f"2 stats a shard of {SHARD_IMAGES} images",
        "once",
        lambda c, s, k: 2 * s.samples / SHARD_IMAGES * k.look_s,
        "rank 0 alone looks",
    ),
    Part(
        "model with its first weights",
        lambda c: f"{c.checkpoint.draw_s * 1e9:.1f} s a billion parameters",
        "no",
        lambda c, s, k: c.checkpoint.draw_s * s.parameters / k.core,
        "each rank draws them from the seed, nothing is sent",
    ),
    Part(
        "checkpoint: sound to the last byte",
        lambda c: f"SHA-256 at {c.checkpoint.hash_bytes_per_s / 1e9:.2f} GB/s a thread, {CHECK_THREADS} threads",
        "once",
        _check,
        "rank 0 alone reads all, and broadcasts the manifest",
    ),
    Part(
        "checkpoint: where what lies",
        lambda c: f"index.json of {c.checkpoint.place_bytes / 1e3:.0f} kB, {c.checkpoint.place_s * 1e3:.0f} ms",
        "ranks (names)",
        _places,
        "one small file instead of the headers of all ranks' files",
    ),
    Part(
        "checkpoint: each rank's own state",
        lambda _: f"{STATE_BYTES} bytes a parameter, over all ranks",
        "ranks (names)",
        _own_state,
        "each rank opens the one or two files that have its part",
    ),
    Part(
        "small files",
        lambda c: f"{c.counts.opens} a rank: config, dataset.json, run directory",
        "ranks (names)",
        lambda c, s, k: c.counts.opens * s.ranks / k.metadata_per_s,
        "rank 0 alone reads and writes the run's records",
    ),
    Part(
        "init.path, where there is one",
        lambda _: f"{WEIGHT_BYTES} bytes a parameter",
        "nodes",
        lambda c, s, k: s.nodes * WEIGHT_BYTES * s.parameters / k.total_bytes_per_s,
        "not read by a run that resumes; a node's ranks share its page cache",
        counted=False,
    ),
)


def table(constants: Constants, scale: Scale) -> Iterator[str]:
    """The rows of PARTS as Markdown, from the best cluster's seconds to the worst's, and what a start comes to."""
    yield f"| part | measured | grows with | {scale.nodes} nodes x {scale.ranks_per_node}, s | against it |"
    yield "|---|---|---|--:|---|"
    for part in PARTS:
        low, high = (part.seconds(constants, scale, cluster) for cluster in (BEST, WORST))
        yield (
            f"| {part.name} | {part.measured(constants)} | {part.grows} | {seconds(low)} to {seconds(high)} "
            f"| {part.against} |"
        )
    yield ""
    counted = [part for part in PARTS if part.counted]
    away = [part for part in counted if part.name not in {"import: names", "import: bytes"}]
    told = []
    for parts in (counted, away):
        low, high = (sum(part.seconds(constants, scale, cluster) for part in parts) for cluster in (BEST, WORST))
        told.append(f"{seconds(low)} to {seconds(high)} s")
    yield f"One after the other: {told[0]}; with the environment on the nodes: {told[1]}"


def assumptions() -> str:
    """What the two ends of the table's seconds stand on, in one line."""
    ends = [
        (
            f"{k.metadata_per_s:,.0f}",
            f"{k.look_s * 1e3:g}",
            f"{k.total_bytes_per_s / 1e9:.0f}",
            f"{k.node_bytes_per_s / 1e9:.0f}",
            f"{k.hop_s * 1e6:.0f}",
            f"{k.core:g}",
        )
        for k in (BEST, WORST)
    ]
    names, look, total, node, hop, core = (" to ".join(pair) for pair in zip(*ends, strict=True))
    return (
        f"Assumed, best to worst: {names} opens or stats a second for all nodes, asked once a node or, for opens, by "
        f"each of {INTERPRETERS} interpreters a rank; {look} ms for one of them; {total} GB/s for all nodes, {node} "
        f"for one; {hop} µs from rank to rank; cores {core} times as fast as this one. NCCL's own bootstrap "
        "needs GPUs and is not in it"
    )


def seconds(value: float) -> str:
    """Seconds as a table has them: two digits below 10."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
