"""The figures of a training step in one run, as Markdown: beside timm's, the loop's overhead, collectives, graphs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vitscale.bench.against_timm import compare_with_timm
from vitscale.bench.communication import measure
from vitscale.bench.data import machine
from vitscale.bench.graphs import count_graphs
from vitscale.bench.loop_overhead import measure_loop
from vitscale.bench.photo_dataset import write_photo_dataset
from vitscale.engine.host_memory import keep_freed_memory
from vitscale.ranks.groups import Ranks


@dataclass(frozen=True)
class StepBench:
    """What is measured, where, and how often."""

    folder: Path
    ranks: Ranks
    """A started process group."""
    models: tuple[str, ...]
    """Variants that timm has too."""
    micro_batch: int
    """Images of a pass beside timm."""
    pairs: int
    loop_model: str
    loop_micro_batch: int
    workers: int
    """Loader processes of the trainer."""
    say: Callable[[str], None]
    """Takes lines of progress."""


def report_step(bench: StepBench, rows: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: the machine, then each of the rows of STEP_ROWS. Collective."""
    # Both sides of every comparison get it, as every run on a CPU does.
    keep_freed_memory()
    yield f"{machine()}, {torch.get_num_threads()} threads, fp32, {bench.pairs} alternating pairs"
    for row in rows:
        bench.say(f"measuring {row}")
        yield ""
        yield from STEP_ROWS[row](bench)


def _timm(bench: StepBench) -> Iterator[str]:
    yield from _beside_timm(bench, compiled=False)


def _compiled(bench: StepBench) -> Iterator[str]:
    yield from _beside_timm(bench, compiled=True)


def _beside_timm(bench: StepBench, *, compiled: bool) -> Iterator[str]:
    yield (
        f"Forward and backward of {bench.micro_batch} images, same weights, drop path off; largest difference of the "
        "logits, and of the gradients over each parameter's largest; medians, and the median ratio of the pairs with "
        "its 95 % interval"
    )
    yield ""
    yield "| model | ours / timm | outputs apart by | gradients | ours, ms | timm, ms | ours over timm | by CPU time |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for name in bench.models:
        bench.say(name)
        for row in compare_with_timm(name, bench.micro_batch, bench.pairs, compiled=compiled):
            yield (
                f"| {row.name} | {row.way} | {row.output_difference:.1e} | {row.gradient_difference:.1e} "
                f"| {row.ours_ms:.0f} | {row.timm_ms:.0f} | {row.ratio} | {row.ratio.by_cpu:.3f} |"
            )


def _loop(bench: StepBench) -> Iterator[str]:
    photos = bench.folder / "photos"
    if not (photos / "dataset.json").exists():
        images = max(64, 2 * bench.loop_micro_batch)
        write_photo_dataset(photos, images, shard_images=images // 2)
    found = measure_loop(
        bench.ranks,
        photos,
        bench.folder / "run",
        model_name=bench.loop_model,
        micro_batch=bench.loop_micro_batch,
        workers=bench.workers,
        pairs=bench.pairs,
    )
    yield (
        f"{bench.loop_model}, {bench.loop_micro_batch} images a step, 1 rank, ZeRO stage 0: `vitscale train` on shards "
        f"of photographs ({bench.workers} loader workers), each step followed by a bare one (same model, loss and "
        "AdamW; one batch that is ready; no clipping)"
    )
    yield ""
    yield "| part | bare, ms | trainer, ms |"
    yield "|---|--:|--:|"
    for part, (bare_ms, loop_ms) in found.parts_ms.items():
        yield f"| {part} | {bare_ms:.0f} | {loop_ms:.0f} |"
    rest_ms = found.loop_ms - sum(loop_ms for _, loop_ms in found.parts_ms.values())
    yield f"| batch, telemetry and the rest of the loop | | {rest_ms:.0f} |"
    yield f"| step | {found.bare_ms:.0f} | {found.loop_ms:.0f} |"
    yield ""
    yield f"Trainer over bare: {found.ratio}; by CPU time {found.ratio.by_cpu:.3f}"


def _communication(bench: StepBench) -> Iterator[str]:
    yield f"Collectives of one step and rank, {bench.ranks.world_size} ranks, counted; bytes a parameter"
    yield ""
    yield "| ZeRO | accumulation | precision | payload | on the wire | gathers | blocks |"
    yield "|--:|--:|---|--:|--:|--:|--:|"
    for precision in ("bf16", "fp32"):
        for row in measure(bench.ranks, precision=precision):
            yield (
                f"| {row.zero_stage} | {row.grad_accum} | {row.precision} | {row.payload_bytes_a_parameter:.2f} "
                f"| {row.wire_bytes_a_parameter:.2f} | {row.gathers} | {row.depth} |"
            )


def _graphs(bench: StepBench) -> Iterator[str]:
    yield f"Compiled blocks of a small ViT, {bench.ranks.world_size} ranks, fp32"
    yield ""
    yield "| ZeRO | blocks | graphs | graph breaks | gathers a step |"
    yield "|--:|--:|--:|--:|--:|"
    for stage in (0, 1, 2, 3):
        row = count_graphs(bench.ranks, stage)
        yield f"| {row.zero_stage} | {row.depth} | {row.graphs} | {row.breaks} | {row.gathers} |"


STEP_ROWS: dict[str, Callable[[StepBench], Iterator[str]]] = {
    "timm": _timm,
    "compiled": _compiled,
    "loop": _loop,
    "communication": _communication,
    "graphs": _graphs,
}
"""What can be measured, by name. The first three are for one rank, the others say more of several."""
