"""`vitscale bench`."""

import os
import platform
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

import click
import torch

from vitscale.bench import (
    CHECKPOINT_ROWS,
    OTHERS,
    ROWS,
    STEP_ROWS,
    CheckpointBench,
    DataBench,
    StepBench,
    compare_concurrency,
    compare_decoders,
    compare_engines,
    compare_formats,
    measure_export,
    photographs,
    report,
    report_checkpoint,
    report_step,
    work_folder,
    write_checkpoint,
)
from vitscale.cli.bench_gpu import gpu
from vitscale.cli.bench_start import start
from vitscale.data import turbojpeg
from vitscale.model import TABLE, resolve_variant
from vitscale.ranks import groups as process_group


@click.group(name="bench", short_help="Run a benchmark.")
def command() -> None:
    """Run a benchmark and print its table; docs/benchmarks keeps the results.

    \b
    Example:
      vitscale bench engines --model vit_small_patch16_224 --pairs 20
    """


@command.command()
@click.option("--model", default="vit_tiny_patch16_224", show_default=True, help="Variant to train.")
@click.option("--micro-batch", default=8, show_default=True, type=click.IntRange(min=1), help="Images a step and rank.")
@click.option("--zero-stage", default=2, show_default=True, type=click.IntRange(0, 3))
@click.option("--pairs", default=10, show_default=True, type=click.IntRange(min=1), help="Counted pairs of steps.")
def engines(model: str, micro_batch: int, zero_stage: int, pairs: int) -> None:
    """Step time of the DeepSpeed engine over the plain torch engine.

    \b
    Example:
      vitscale bench engines --zero-stage 1
    """
    ranks = process_group.start()
    try:
        times = compare_engines(ranks, model_name=model, micro_batch=micro_batch, zero_stage=zero_stage, pairs=pairs)
    finally:
        process_group.stop()
    if ranks.is_main:
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.processor() or "CPU"
        click.echo(
            f"{model}, {micro_batch} images x {ranks.world_size} ranks, ZeRO {zero_stage}, {device}, "
            f"torch {torch.__version__}"
        )
        click.echo(f"torch      median {statistics.median(times.torch_s) * 1e3:8.1f} ms a step")
        click.echo(f"deepspeed  median {statistics.median(times.deepspeed_s) * 1e3:8.1f} ms a step")
        low, high = min(times.ratios), max(times.ratios)
        click.echo(f"ratio      median {times.ratio:8.3f}    ({low:.3f} to {high:.3f} over {pairs} alternating pairs)")


@command.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--depth", type=click.IntRange(min=1), help="Blocks at most; all if left out.")
def formats(names: tuple[str, ...], depth: int | None) -> None:
    """Largest difference between each variant and its exports, read by timm and transformers, in float64.

    \b
    Examples:
      vitscale bench formats --depth 2
      vitscale bench formats vit_small_patch16_224 deit_small_distilled_patch16_224
    """
    for name in names:
        resolve_variant(name)  # says which names there are
    click.echo(f"| variant | blocks | {' | '.join(OTHERS)} |\n|---|--:|{'---|' * len(OTHERS)}")
    cells: list[str] = []
    libraries: dict[str, None] = {}
    for found in compare_formats(names or tuple(TABLE), depth):
        cells.append("no" if found.difference is None else f"{found.difference:.1e} {found.compared}")
        if len(cells) == len(OTHERS):
            click.echo(f"| {found.name} | {found.depth} | {' | '.join(cells)} |")
            cells.clear()
        libraries |= {found.library: None} if found.library else {}
    click.echo(f"\ncompared with {'; '.join(libraries)}")


@command.command()
@click.option("--model", default="vit_huge_patch14_224_in21k", show_default=True, help="Variant to export.")
@click.option("--ranks", default=8, show_default=True, type=click.IntRange(min=1), help="Ranks that saved it.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; a temporary folder if left out.")
def export(model: str, ranks: int, folder: Path | None) -> None:
    """Time and peak memory of exporting a training checkpoint, above the interpreter, by format.

    \b
    Example:
      vitscale bench export --model vit_huge_patch14_224_in21k
    """
    headless = resolve_variant(model).representation_size > 0
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        run_dir = Path(work) / "run"
        weights_bytes = write_checkpoint(model, run_dir, ranks)
        click.echo(
            f"{model}: {weights_bytes / 1e9:.2f} GB of fp32 weights, saved by {ranks} ranks, torch {torch.__version__}"
        )
        click.echo("| format | written, GB | seconds | peak RSS above the interpreter, MB | over fp32 bytes |")
        click.echo("|---|--:|--:|--:|--:|")
        for format_, precision in (("vitscale", "fp32"), ("vitscale", "bf16"), *((other, "fp32") for other in OTHERS)):
            features_only = headless and format_ in {"timm", "hf"}
            cost = measure_export(run_dir, Path(work) / f"{format_}-{precision}", format_, precision, features_only)
            click.echo(
                f"| {format_} {precision}{', features' if features_only else ''} | {cost.size_bytes / 1e9:.2f} "
                f"| {cost.seconds:.1f} | {cost.peak_rss_bytes / 1e6:.0f} | {cost.peak_rss_bytes / weights_bytes:.3f} |"
            )


@command.command()
@click.option(
    "--interpolation",
    type=click.Choice(["bilinear", "bicubic"]),
    default="bilinear",
    show_default=True,
    help="All ways'.",
)
@click.option("--images", default=8, show_default=True, type=click.IntRange(min=1), help="Images of each kind.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1), help="Counted rounds.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=2), help="Threads, and processes.")
def decode(interpolation: Literal["bilinear", "bicubic"], images: int, rounds: int, workers: int) -> None:
    """Images a second and core from JPEG to a random crop of 224 px, beside Pillow and cv2.

    \b
    Example:
      vitscale bench decode --interpolation bicubic
    """
    files = photographs(images)
    library = turbojpeg.find()
    click.echo(
        f"{platform.processor() or platform.machine()}, {images} images of each kind, {rounds} rounds, "
        f"{interpolation}, TurboJPEG 3: {library.path if library else 'not found'}; in brackets: over the first row"
    )
    cells: dict[str, list[str]] = {}
    ratios: dict[str, list[float]] = {}
    for rate in compare_decoders(files, interpolation, rounds):
        cells.setdefault(rate.way, []).append(f"{rate.images_per_s:.0f} ({rate.ratio:.2f})")
        ratios.setdefault(rate.way, []).append(rate.ratio)
    click.echo(f"| images/s a core | {' | '.join(files)} | median |\n|---|{'--:|' * (len(files) + 1)}")
    for way, row in cells.items():
        click.echo(f"| {way} | {' | '.join(row)} | {statistics.median(ratios[way]):.2f} |")
    kind = next(iter(files))
    together = compare_concurrency(files[kind], interpolation, workers, rounds)
    click.echo(f"\n{kind}, images/s: " + ", ".join(f"{name} {found:.0f}" for name, found in together.items()))


@command.command()
@click.option("--rows", multiple=True, type=click.Choice(list(ROWS)), help="What to measure; all if left out.")
@click.option("--images", default=2000, show_default=True, type=click.IntRange(min=64), help="Photographs.")
@click.option("--samples", default=14_197_122, show_default=True, type=click.IntRange(min=8192), help="A long index's.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1), help="Of every loader.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Counted rounds.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(min=0), help="A loader's turn.")
@click.option("--batches", default=200, show_default=True, type=click.IntRange(min=40), help="That memory is watched.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder to work in, not to be removed.")
def data(
    rows: tuple[str, ...], images: int, samples: int, workers: int, rounds: int, seconds: float, batches: int,
    keep: Path | None,
) -> None:  # fmt: skip
    """Figures of the data plane: batches a second beside other loaders, resume, memory, order, mixing, reads.

    \b
    Examples:
      vitscale bench data --keep /scratch/bench
      vitscale bench data --rows order --rows mixing
    """
    with work_folder(keep) as folder:
        say = partial(click.echo, err=True)
        bench = DataBench(folder, images, 250, samples, workers, rounds, seconds, batches, say)
        for line in report(bench, rows or tuple(ROWS)):
            click.echo(line)


@command.command()
@click.option("--rows", multiple=True, type=click.Choice(list(STEP_ROWS)), help="What to measure; all if left out.")
@click.option(
    "--models",
    multiple=True,
    default=("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"),
    show_default=True,
    help="Variants to run beside timm's.",
)
@click.option("--micro-batch", default=8, show_default=True, type=click.IntRange(min=1), help="Images, beside timm.")
@click.option("--pairs", default=12, show_default=True, type=click.IntRange(min=1), help="Counted pairs.")
@click.option("--loop-model", default="vit_base_patch16_224", show_default=True, help="Variant to train.")
@click.option("--loop-batch", default=16, show_default=True, type=click.IntRange(min=2), help="Images of its step.")
@click.option("--workers", default=0, show_default=True, type=click.IntRange(min=0), help="Loader processes.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch; one a core if left out.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder to work in, not to be removed.")
def step(
    rows: tuple[str, ...], models: tuple[str, ...], micro_batch: int, pairs: int, loop_model: str, loop_batch: int,
    workers: int, threads: int | None, keep: Path | None,
) -> None:  # fmt: skip
    """Figures of a training step: beside timm's, the loop's overhead, collectives and graphs by ZeRO stage.

    \b
    Examples:
      vitscale bench step --rows timm --models vit_tiny_patch16_224
      torchrun --nproc-per-node 2 -m vitscale bench step --rows communication --rows graphs
    """
    for name in (*models, loop_model):
        resolve_variant(name)  # says which names there are
    ranks = process_group.start()
    try:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
        with work_folder(keep) as folder:
            say = partial(click.echo, err=True) if ranks.is_main else lambda _: None
            bench = StepBench(folder, ranks, models, micro_batch, pairs, loop_model, loop_batch, workers, say)
            for line in report_step(bench, rows or tuple(STEP_ROWS)):
                if ranks.is_main:
                    click.echo(line)
    finally:
        process_group.stop()


@command.command()
@click.option(
    "--rows", multiple=True, type=click.Choice(list(CHECKPOINT_ROWS)), help="What to measure; all if left out."
)
@click.option("--model", default="vit_base_patch16_224", show_default=True, help="Variant whose state is saved.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Counted rounds.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder to work in, not to be removed.")
def checkpoint(rows: tuple[str, ...], model: str, rounds: int, keep: Path | None) -> None:
    """Figures of checkpoints: loads by other numbers of ranks, saves beside the disk's rate, what a save stalls.

    The disk is that of --keep, or of the system's folder for temporary files.

    \b
    Examples:
      vitscale bench checkpoint --model vit_large_patch16_224 --keep /scratch/bench
      vitscale bench checkpoint --rows stall --rounds 10
    """
    resolve_variant(model)  # says which names there are
    ranks = process_group.start()
    try:
        with work_folder(keep) as folder:
            bench = CheckpointBench(folder, ranks, model, rounds, partial(click.echo, err=True))
            for line in report_checkpoint(bench, rows or tuple(CHECKPOINT_ROWS)):
                click.echo(line)
    finally:
        process_group.stop()


command.add_command(gpu)
command.add_command(start)
