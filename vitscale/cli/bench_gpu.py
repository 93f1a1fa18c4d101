"""`vitscale bench gpu`."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from vitscale.bench.data import machine, work_folder
from vitscale.bench.gpu import Climb, GpuBench
from vitscale.bench.ladder import HEADER, LADDER, RungResult, as_json, table_row
from vitscale.bench.parity import compare_with_cpu
from vitscale.ranks import groups as process_group

MODELS = ("vit_giant_patch14_224", "vit_huge_patch14_224", "vit_gigantic_patch14_224")


@click.command()
@click.option("--models", multiple=True, default=MODELS, show_default=True, help="Variants, the first one in full.")
@click.option("--micro-batch", default=64, show_default=True, type=click.IntRange(min=2), help="Images a step.")
@click.option("--steps", default=10, show_default=True, type=click.IntRange(min=1), help="Counted steps of a rung.")
@click.option(
    "--workers", default=12, show_default=True, type=click.IntRange(min=0), help="Of the whole loop's loader."
)
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder to work in, not to be removed.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for report.md and results.json.")
def gpu(
    models: tuple[str, ...], micro_batch: int, steps: int, workers: int, keep: Path | None, out: Path | None
) -> None:
    """One GPU in 10 minutes: the step of g, H and G from eager torch to all levers, memory, parity, the whole loop.

    Without a GPU all of it runs at micro size, which shows that it will run on one, and nothing else. What is measured
    so far is in the folder `--out` at any time.

    \b
    Example:
      vitscale bench gpu --out docs/benchmarks/gpu
    """
    lines: list[str] = []
    results: list[RungResult] = []

    def tell(line: str) -> None:
        lines.append(line)
        click.echo(line)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (out / "results.json").write_text(as_json(results), encoding="utf-8")

    ranks = process_group.start()
    try:
        with work_folder(keep) as folder:
            memory_bytes = None
            if ranks.device.type == "cuda":
                memory_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
            bench = GpuBench(ranks, folder, micro_batch, steps, workers, _progress, memory_bytes)
            tell(_device(bench))
            tell("\n| beside the CPU in fp32 | logits | gradients |\n|---|--:|--:|")
            for row in compare_with_cpu(ranks.device):
                apart = (f"{row.logits:.1e}", f"{row.gradients:.1e}")
                tell(f"| {row.way} | {' | '.join((row.failed, '') if row.failed else apart)} |")
            for index, model in enumerate(models):
                climb = Climb(bench, model)
                tell(f"\n{model}, {climb.micro_batch} images a step{'' if bench.on_gpu else ', at micro size'}\n")
                tell("\n".join(HEADER))
                for result in _measured(climb, in_full=index == 0):
                    results.append(result)
                    tell(table_row(result))
    finally:
        process_group.stop()


def _measured(climb: Climb, *, in_full: bool) -> Iterator[RungResult]:
    """All rungs and the whole loop, or only the rungs that stay and have no alternatives."""
    if not in_full:
        yield from climb.rungs([rung for rung in LADDER if rung.stays and len(rung.alternatives) == 1])
        return
    yield from climb.rungs()
    yield from climb.whole_loop()


def _progress(text: str) -> None:
    click.echo(text, err=True)


def _device(bench: GpuBench) -> str:
    deepspeed = f"DeepSpeed {importlib.metadata.version('deepspeed')}"
    if not bench.on_gpu:
        return f"No GPU: a rehearsal at micro size on {machine()}, {deepspeed}; none of its figures mean anything"
    name = torch.cuda.get_device_name(bench.ranks.device)
    peak = f"{bench.peak / 1e12:.0f} TFLOP/s in bf16" if bench.peak else "a bf16 rate that is not in the table"
    return f"{name}, {peak}, CUDA {torch.version.cuda}; {machine()}, {deepspeed}"
