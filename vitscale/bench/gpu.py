"""One GPU's ladder: images a second, MFU and memory of a model's training step, from eager torch to all levers.

Every rung adds one lever to what came before it, at the real size, on a batch that lies ready; the last row is the
whole loop on shards of photographs. Without a GPU the same code runs at micro size, to see that it will work on one.
"""

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitscale.bench.photo_dataset import CLASSES, SPLIT, write_photo_dataset
from vitscale.config import BatchSplit, Config, merge_trees
from vitscale.engine import TrainEngine, create_engine, resolve_precision
from vitscale.errors import ConfigError
from vitscale.losses import Targets, classification_loss
from vitscale.model import train_flops
from vitscale.optim import build_optimizer
from vitscale.ranks import Ranks
from vitscale.telemetry import peak_flops, tags
from vitscale.train.build import build_model, draw_blueprint, executed_flops
from vitscale.train.footprint import planned_step_bytes
from vitscale.train.loop import Trainer
from vitscale.train.run_directory import RunDirectory
from vitscale.train.stop import StopRequest

IN21K_CLASSES = 21_843
MICRO = {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "img_size": 56}
"""What makes a model small enough to rehearse on a CPU."""


@dataclass(frozen=True)
class Rung:
    """One lever; of several `alternatives` the fastest stays."""

    name: str
    alternatives: tuple[Mapping[str, Any], ...]
    stays: bool = True
    """Whether the rungs above it keep it."""


def _rung(name: str, stays: bool = True, **sections: Mapping[str, Any]) -> Rung:
    return Rung(name, (sections,), stays)


LADDER: tuple[Rung, ...] = (
    _rung("eager, class token, unfused AdamW", model={"pool": "token"}, optim={"fused": False}),
    _rung("each block compiled", engine={"compile": True}),
    _rung("256 tokens: mean pooling, no class token", model={"pool": "avg"}),
    Rung(
        "best attention kernel",
        tuple({"engine": {"attention": kernel}} for kernel in ("auto", "cudnn", "flash", "efficient")),
    ),
    _rung("fused AdamW", optim={"fused": None}),
    _rung("head padded to 64", model={"head_multiple": 64}),
    _rung("drop path 0.4 as mask", stays=False, model={"drop_path_rate": 0.4}),
    _rung("drop path 0.4 as subset", stays=False, model={"drop_path_rate": 0.4, "drop_path_mode": "subset"}),
    _rung("selective recomputation", stays=False, engine={"activation_checkpointing": "selective"}),
    _rung("full recomputation", stays=False, engine={"activation_checkpointing": "full"}),
    _rung("float8 products", stays=False, engine={"fp8": True}),
)


@dataclass(frozen=True)
class RungResult:
    """What a rung comes to; None for what the device does not tell."""

    model: str
    rung: str
    micro_batch: int
    images_per_s: float | None = None
    mfu: float | None = None
    executed_mfu: float | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    loss: float | None = None
    failed: str = ""
    """Why it could not run."""


@dataclass(frozen=True)
class GpuBench:
    """What is measured, and how often."""

    ranks: Ranks
    """A started process group of one."""
    folder: Path
    """For shards and run directories."""
    micro_batch: int
    steps: int
    """Counted steps of each rung."""
    workers: int
    say: Callable[[str], None]

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU; without one, models are made small."""
        return self.ranks.device.type == "cuda"

    @property
    def peak(self) -> float | None:
        """Dense bf16 rate of the GPU in FLOP/s, where it is known."""
        return peak_flops(torch.cuda.get_device_name(self.ranks.device)) if self.on_gpu else None


def climb(bench: GpuBench, model_name: str, rungs: Iterable[Rung] = LADDER) -> Iterator[RungResult]:
    """Measure the rungs from the bottom; what cannot run says why and is left out of those above it."""
    tree = _base_tree(bench, model_name)
    for rung in rungs:
        tried = [(change, _measured(bench, rung, merge_trees(tree, change))) for change in rung.alternatives]
        for change, result in tried:
            if len(tried) > 1:
                ((section, keys),) = change.items()
                result = replace(result, rung=f"{rung.name}: {section}.{'='.join(map(str, *keys.items()))}")
            yield result
        ran = [(change, result) for change, result in tried if not result.failed]
        if ran and rung.stays:
            tree = merge_trees(tree, max(ran, key=lambda pair: pair[1].images_per_s or 0.0)[0])


def whole_loop(bench: GpuBench, model_name: str) -> RungResult:
    """The trainer with data, telemetry and guard on shards of photographs, with the levers that stay."""
    photos = bench.folder / "photos"
    if not (photos / "dataset.json").exists():
        write_photo_dataset(photos, images=max(2048 if bench.on_gpu else 64, 2 * bench.micro_batch), shard_images=64)
    tree = _base_tree(bench, model_name)
    for rung in LADDER:
        if rung.stays:
            tree = merge_trees(tree, rung.alternatives[0])
    steps = 4 * bench.steps
    run_dir = bench.folder / f"run-{model_name}"
    changes = {
        "run": {"dir": str(run_dir)},
        "model": {"num_classes": len(CLASSES)},
        "data": {"train": {"path": str(photos), "split": SPLIT}, "workers": bench.workers},
        "schedule": {"length": steps},
        "log": {"every_steps": bench.steps},
        "checkpoint": {"every_steps": 10 * steps},
        "engine": {"compile": bench.on_gpu},
    }
    config = Config.model_validate(merge_trees(tree, changes))
    directory = RunDirectory.open(config, bench.ranks)
    trainer = Trainer(draw_blueprint(config, bench.ranks), bench.ranks, StopRequest(), directory)
    with suppress(_MeasuredError):
        trainer.save = _stop_here  # type: ignore[method-assign]
        trainer.run()
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = next(json.loads(line) for line in reversed(lines) if tags.TRAIN_LOSS in line)
    return RungResult(
        model_name,
        f"the whole loop on photographs, {bench.workers} workers",
        bench.micro_batch,
        images_per_s=last[tags.PERF_IMAGES_PER_S],
        mfu=last.get(tags.PERF_MFU),
        executed_mfu=last.get(tags.PERF_EXECUTED_MFU),
        peak_bytes=last.get(tags.MACHINE_DEVICE_PEAK_BYTES),
        loss=last[tags.TRAIN_LOSS],
    )


HEADER = (
    "| rung | images/s | MFU | executed MFU | peak, GB | planned, GB | peak / planned |",
    "|---|--:|--:|--:|--:|--:|--:|",
)


def table_row(result: RungResult) -> str:
    """A row under `HEADER`."""
    if result.failed:
        return f"| {result.rung} | {result.failed} | | | | | |"
    peak, planned = result.peak_bytes, result.planned_bytes
    cells = [
        f"{result.images_per_s:.1f}",
        *("" if share is None else f"{share:.1%}" for share in (result.mfu, result.executed_mfu)),
        *("" if held is None else f"{held / 1e9:.1f}" for held in (peak, planned)),
        f"{peak / planned:.3f}" if peak and planned else "",
    ]
    return f"| {result.rung} | {' | '.join(cells)} |"


def as_json(results: Sequence[RungResult]) -> str:
    """All results as JSON."""
    return json.dumps([asdict(result) for result in results], indent=1) + "\n"


class _MeasuredError(Exception):
    """All steps are counted; nobody needs the run's last checkpoint."""


def _stop_here() -> None:
    raise _MeasuredError


def _base_tree(bench: GpuBench, model_name: str) -> dict[str, Any]:
    """Config of the lowest rung; the data is never read but by the whole loop."""
    return {
        "model": {"name": model_name, "num_classes": IN21K_CLASSES, "representation_size": 0}
        | ({} if bench.on_gpu else MICRO),
        "data": {"train": {"path": "photographs", "split": SPLIT}, "lanes": 64, "block": 1},
        "batch": {"global_batch": bench.micro_batch, "micro_batch": bench.micro_batch},
        "optim": {"peak_lr": 1e-4, "weight_decay": 0.03},
        "schedule": {"length": 1000},
        "loss": {"kind": "sigmoid"},
        "engine": {"zero_stage": 1, "precision": "bf16" if bench.on_gpu else "fp32"},
        "log": {"pictures": 0},
    }


def _measured(bench: GpuBench, rung: Rung, tree: Mapping[str, Any]) -> RungResult:
    result = RungResult(tree["model"]["name"], rung.name, bench.micro_batch)
    bench.say(f"{result.model}: {rung.name}")
    try:
        config = Config.model_validate(tree)
        found = _time_steps(bench, config)
    except (ConfigError, ValueError) as error:
        return replace(result, failed=str(error).splitlines()[-1])
    except torch.OutOfMemoryError:
        return replace(result, failed="out of memory")
    finally:
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return replace(result, **found)


def _time_steps(bench: GpuBench, config: Config) -> dict[str, Any]:
    ranks, micro_batch = bench.ranks, bench.micro_batch
    split = BatchSplit(micro_batch, micro_batch, 1, 1)
    torch.manual_seed(0)
    with ranks.device:  # a gigantic model's first weights are drawn in seconds there
        model = build_model(config)
    variant = model.variant
    planned = planned_step_bytes(config, model, split, resolve_precision(config.engine.precision, ranks.device))
    engine = create_engine(
        model,
        build_optimizer(model, config.optim),
        classification_loss(config.loss.kind),
        config.engine,
        split=split,
        clip_norm=config.optim.clip_norm,
        device=ranks.device,
        rank=ranks.rank,
    )
    images = torch.randn(micro_batch, 3, *variant.image_px, device=ranks.device)
    targets = Targets(torch.arange(micro_batch, device=ranks.device) % variant.num_classes)
    for _ in range(3):  # compiles, fills the allocator's cache
        loss = _step(engine, images, targets)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(ranks.device)
    started_s = time.perf_counter()
    for _ in range(bench.steps):
        loss = _step(engine, images, targets)
    final = float(loss)  # waits for the device
    images_per_s = bench.steps * micro_batch / (time.perf_counter() - started_s)
    executed = executed_flops(config, variant, micro_batch)
    return {
        "images_per_s": images_per_s,
        "mfu": images_per_s * train_flops(variant) / bench.peak if bench.peak else None,
        "executed_mfu": images_per_s * executed / bench.peak if bench.peak and executed else None,
        "peak_bytes": torch.cuda.max_memory_allocated(ranks.device) if bench.on_gpu else None,
        "planned_bytes": planned,
        "loss": final,
    }


def _step(engine: TrainEngine, images: torch.Tensor, targets: Targets) -> torch.Tensor:
    return engine.train_step([(images, targets)], 1e-4, accept=_any).loss


def _any(grad_norm: float) -> bool:
    """The guard's cost is part of a step: the host waits for the norm."""
    return True
