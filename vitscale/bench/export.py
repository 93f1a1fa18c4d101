"""Time and memory of exports from a training checkpoint, each in a process of its own."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from vitscale.bench.fragments import fragments_of_rank
from vitscale.checkpoint import (
    CheckpointStore,
    Manifest,
    parameter_shapes,
    rank_file_name,
    record_file,
    write_fragments,
    write_index,
)
from vitscale.model import TABLE

# What the export itself costs: the interpreter with all imports is the baseline that is taken off.
_MEASURE = """
import json, sys, time
from pathlib import Path
from vitscale.checkpoint import ExportOptions, export_model
from vitscale.telemetry import peak_rss_bytes, reset_peak_rss
held, started = reset_peak_rss(), time.perf_counter()
options = ExportOptions(format=sys.argv[3], precision=sys.argv[4], features_only=sys.argv[5] == "True")
certificate = export_model(Path(sys.argv[1]), Path(sys.argv[2]), options)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "peak_rss_bytes": peak_rss_bytes() - held,
    "size_bytes": sum(file.size_bytes for file in certificate.files),
}))
"""


@dataclass(frozen=True)
class ExportCost:
    """What one export took."""

    format: str
    precision: str
    seconds: float
    """Wall time: verifying the checkpoint's digests, writing, reading back, certifying."""
    peak_rss_bytes: int
    """Peak resident set above the interpreter with its imports."""
    size_bytes: int
    """Of all files written."""


def write_checkpoint(name: str, run_dir: Path, ranks: int, stage: int = 2) -> int:
    """Write a run directory with one checkpoint of a variant as `ranks` ranks under ZeRO would; gives its fp32 bytes.

    Weights and both moments of Adam are random.
    """
    entry = TABLE[name]
    shapes = parameter_shapes(entry.variant)
    store = CheckpointStore(run_dir)
    staging = store.staging(1, 1)
    files = []
    for rank in range(ranks):
        fragments = fragments_of_rank(shapes, rank, ranks, stage, torch.randn)
        files.append(write_fragments(fragments, staging / rank_file_name(rank)))
    files.append(record_file(write_index(staging, ranks)))
    pixels = entry.preprocessing
    data = {"mean": pixels.mean, "std": pixels.std, "val_crop": pixels.crop, "interpolation": pixels.interpolation}
    manifest = Manifest(
        step=1, generation=1, world_size=ranks, optimizer_steps=1, cursor={"position": 0}, config={"data": data},
        model={"name": name, **entry.variant.arguments()}, labels=[],
        shapes={key: list(shape) for key, shape in shapes.items()}, metrics={}, versions={}, saved_at="", files=files,
    )  # fmt: skip
    store.commit(staging, manifest)
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * 4


def measure_export(run_dir: Path, out: Path, format_: str, precision: str, features_only: bool) -> ExportCost:
    """Export in a fresh process; its time and its peak memory."""
    words = [str(run_dir), str(out), format_, precision, str(features_only)]
    done = subprocess.run([sys.executable, "-c", _MEASURE, *words], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return ExportCost(format_, precision, found["seconds"], found["peak_rss_bytes"], found["size_bytes"])
