"""What a start of a run costs: its constants, measured on this machine, and a table of them projected to many nodes."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitscale.bench.checkpoint import drop_cached, line_through
from vitscale.bench.data import empty_cache, machine
from vitscale.bench.export import write_checkpoint
from vitscale.bench.fragments import fragments_of_rank
from vitscale.bench.loaders import in_a_fresh_process
from vitscale.bench.photo_dataset import write_long_index, write_photo_dataset
from vitscale.bench.resume import seconds_to_open
from vitscale.bench.start_constants import CheckpointCost, Constants, ImportCost, IndexCost, MeetingCost
from vitscale.bench.start_paper import Scale, assumptions, table
from vitscale.bench.start_ranks import Meeting, count_start, meetings
from vitscale.checkpoint import INDEX_NAME, CheckpointStore, parameter_shapes, rank_file_name, record_file
from vitscale.checkpoint.index import StoredFile, StoredRun, index_of, read_index
from vitscale.checkpoint.integrity import sha256_of
from vitscale.model import TABLE, create_model

IMPORTED = ("vitscale.cli.train", "deepspeed.runtime.zero.muon.muon_optimizer")
"""What a rank imports; deepspeed.initialize imports the second, and torch's compiler with it."""

_PHOTOS, _SHARD_IMAGES, _DISTINCT = 64, 16, 2
_SAVED_BY = 4
_HEADER_BYTES = 1000  # whatever it is: a number of the index

# Files in memory that other processes have mapped are not forgotten, so it tells how much came from the disk.
_IMPORT = """
import importlib, importlib._bootstrap_external as external, json, os, sys, time
opened, looks = [], 0
def hear(event, details):
    global looks
    if event == "open" and not str(details[0]).startswith(("/proc/", "/sys/", "/dev/")):
        opened.append(str(details[0]))
    elif event in ("os.listdir", "os.scandir"):
        looks += 1
def stat(path, real=external._path_stat):
    global looks
    looks += 1
    return real(path)
external._path_stat = stat
sys.addaudithook(hear)
started_s, started_cpu_s = time.perf_counter(), time.process_time()
for name in sys.argv[1:]:
    importlib.import_module(name)
wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
with open("/proc/self/maps") as maps:
    shared = {line.split()[-1] for line in maps if ".so" in line}
with open("/proc/self/io") as io:
    read_bytes = int(io.read().split("read_bytes: ")[1].split()[0])
specs = [module.__spec__ for module in list(sys.modules.values()) if getattr(module, "__spec__", None)]
loaded = {path for spec in specs if (path := spec.cached or spec.origin) and os.path.isfile(path)}
print(json.dumps({
    "wall_s": wall_s, "cpu_s": cpu_s, "read_bytes": read_bytes, "opens": len(opened) + len(shared - loaded),
    "looks": looks, "files": sorted(loaded | {path for path in shared if os.path.isfile(path)}),
}))
"""


@dataclass(frozen=True)
class StartBench:
    """What is measured, how often, and the run that is projected."""

    folder: Path
    """On the disk that is measured."""
    model: str
    """Variant of the run."""
    nodes: int
    ranks_per_node: int
    samples: int
    """Of the run's dataset."""
    measured_ranks: tuple[int, ...]
    """Numbers of processes that meet on this machine."""
    measured_samples: int
    """Of the index that is converted."""
    measured_model: str
    """Variant that is built, and whose checkpoint is hashed."""
    rounds: int
    say: Callable[[str], None]
    """Takes lines of progress."""


def report_start(bench: StartBench) -> Iterator[str]:
    """Lines of Markdown: the machine, the meetings, and the table of what a start comes to."""
    yield machine()
    bench.say("measuring imports")
    imports = import_cost(IMPORTED, bench.rounds)
    photos = bench.folder / "photos"
    if not photos.exists():
        write_photo_dataset(photos, _PHOTOS, _SHARD_IMAGES, _DISTINCT)
    bench.say("measuring how ranks meet")
    met = in_a_fresh_process(meetings, bench.measured_ranks)
    bench.say("counting what a rank does at a start")
    with empty_cache(bench.folder):
        counts = in_a_fresh_process(count_start, photos, bench.folder / "run")
    bench.say(f"converting an index of {bench.measured_samples} samples")
    index = index_cost(bench, photos)
    bench.say("measuring checkpoints")
    constants = Constants(imports, meeting_cost(met), counts, index, checkpoint_cost(bench))
    yield ""
    yield from _meeting_lines(met)
    yield ""
    parameters = sum(torch.Size(shape).numel() for shape in parameter_shapes(TABLE[bench.model].variant).values())
    scale = Scale(bench.nodes, bench.ranks_per_node, bench.samples, parameters)
    yield (
        f"A start of {bench.model}, {parameters / 1e9:.2f} billion parameters, {bench.samples} samples, on "
        f"{scale.nodes} nodes x {scale.ranks_per_node} = {scale.ranks} ranks, on paper. {assumptions()}."
    )
    yield ""
    yield from table(constants, scale)


def import_cost(modules: Sequence[str], rounds: int) -> ImportCost:
    """What fresh interpreters need to import the modules: the median of some with all files in memory, and one without.

    Raises:
        CalledProcessError: a module cannot be imported.
    """

    def fresh() -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", _IMPORT, *modules], check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # some modules print
        return found

    fresh()  # what was not in memory is now, and compiled
    warm = [fresh() for _ in range(rounds)]
    files = [Path(file) for file in warm[0]["files"]]
    drop_cached(files)
    cold = fresh()
    return ImportCost(
        statistics.median(found["wall_s"] for found in warm),
        statistics.median(found["cpu_s"] for found in warm),
        cold["wall_s"],
        cold["read_bytes"],
        warm[0]["opens"],
        warm[0]["looks"],
        sum(file.stat().st_size for file in files),
    )


def meeting_cost(met: Sequence[Meeting]) -> MeetingCost:
    """Rank 0's time as it grows with the number of ranks n: with n² where all connect to all, else with n log2 n, which
    is how often its store is asked for an address."""
    eager, lazy = ([meeting for meeting in met if meeting.lazy == kind] for kind in (False, True))
    return MeetingCost(
        growth([(m.ranks**2, m.cpu_s) for m in eager]),
        growth([(m.ranks * math.log2(m.ranks), m.cpu_s) for m in lazy]),
        growth([(m.ranks, m.vote_s) for m in lazy]),
    )


def growth(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line through the points, by least squares; 0 where it falls, which is noise."""
    _, slope, _ = line_through(*zip(*points, strict=True))
    return max(0.0, slope)


def index_cost(bench: StartBench, photos: Path) -> IndexCost:
    """Convert a long index and open it again, as a node's ranks do that come after."""
    folder = bench.folder / f"index-{bench.measured_samples}"
    if not folder.exists():
        write_long_index(folder, photos, bench.measured_samples)
    with empty_cache(bench.folder):
        convert_s = seconds_to_open(folder)
        open_s = statistics.median(seconds_to_open(folder, check_files=False) for _ in range(bench.rounds))
    return IndexCost(convert_s / bench.measured_samples, open_s)


def checkpoint_cost(bench: StartBench) -> CheckpointCost:
    """Hash a checkpoint's file, read the index that all ranks of the projection would save, build a model."""
    run_dir = bench.folder / f"saved-{bench.measured_model}"
    store = CheckpointStore(run_dir)
    if not store.tags():
        write_checkpoint(bench.measured_model, run_dir, _SAVED_BY)
    [tag] = store.tags()
    file = store.path(tag) / rank_file_name(0)
    sha256_of(file)  # it is in memory now
    hash_s = _median_s(bench.rounds, lambda: sha256_of(file))
    (bench.folder / INDEX_NAME).write_text(place_index(bench.model, bench.nodes * bench.ranks_per_node))
    record = record_file(bench.folder / INDEX_NAME)
    manifest = store.manifest(tag).model_copy(update={"files": [record]})
    place_s = _median_s(bench.rounds, lambda: read_index(bench.folder, manifest))
    classes = TABLE[bench.measured_model].variant.num_classes
    drawn = create_model(bench.measured_model, num_classes=classes)
    parameters = sum(parameter.numel() for parameter in drawn.parameters())
    draw_s = _median_s(bench.rounds, lambda: create_model(bench.measured_model, num_classes=classes))
    return CheckpointCost(file.stat().st_size / hash_s, record.size_bytes, place_s, draw_s / parameters)


def place_index(model: str, ranks: int) -> str:
    """The text of index.json where so many ranks have saved a variant's state under ZeRO 2."""
    shapes = parameter_shapes(TABLE[model].variant)

    def file(rank: int) -> StoredFile:
        runs, byte = [], 0
        fragments = fragments_of_rank(shapes, rank, ranks, 2, lambda numel: torch.empty(numel, device="meta"))
        for fragment in fragments:
            for value, tensor in fragment.values.items():
                runs.append(StoredRun(fragment.name, fragment.offset, value, tensor.numel(), "F32", byte))
                byte += tensor.nbytes
        return StoredFile(_HEADER_BYTES, runs)

    return index_of(map(file, range(ranks))).model_dump_json() + "\n"


def _median_s(rounds: int, call: Callable[[], object]) -> float:
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def _meeting_lines(met: Sequence[Meeting]) -> Iterator[str]:
    yield "| ranks of a gloo group | connect | rank 0's processor time, s | its open files | a vote, ms |"
    yield "|--:|---|--:|--:|--:|"
    for found in met:
        when = "when they talk" if found.lazy else "all to all"
        yield f"| {found.ranks} | {when} | {found.cpu_s:.2f} | {found.descriptors} | {found.vote_s * 1e3:.1f} |"
