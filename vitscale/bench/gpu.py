"""One GPU's ladder: images a second, MFU and memory of a model's training step, from eager torch to all levers.

Every rung adds one lever to what came before it, at the real size, on a batch that lies ready; the last rows are the
whole loop, on one batch and on shards of photographs. Without a GPU the same code runs at micro size, to see that it
will work on one.
"""

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitscale.bench.ladder import LADDER, Rung, RungResult
from vitscale.bench.photo_dataset import SPLIT, write_photo_dataset
from vitscale.config import BatchSplit, Config, merge_trees, parse_config
from vitscale.data.batch import TrainBatch
from vitscale.engine import TrainEngine, create_engine, resolve_precision
from vitscale.errors import ConfigError
from vitscale.losses import Targets, classification_loss
from vitscale.model import train_flops
from vitscale.optim import build_optimizer
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import peak_flops, tags
from vitscale.train.build import build_model, draw_blueprint, executed_flops
from vitscale.train.feed import Feed
from vitscale.train.footprint import planned_step_bytes
from vitscale.train.loop import Trainer
from vitscale.train.run_directory import RunDirectory
from vitscale.train.stop import StopRequest
from vitscale.train.watchdog import Watchdog

IN21K = tuple(f"n{label:08d}" for label in range(21_843))
"""As many classes as ImageNet-21k has."""
MEMORY_SHARE = 0.9
"""Of the device's, that a step may take by the plan; the rest is for kernels, their workspaces and gaps."""
MICRO = {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "img_size": 56}
"""What makes a model small enough to rehearse on a CPU."""


@dataclass(frozen=True)
class GpuBench:
    """What is measured, and how often."""

    ranks: Ranks
    """A started process group of one."""
    folder: Path
    """For shards and run directories."""
    micro_batch: int
    """Images of a step, or as many as fit of half, a quarter and so on."""
    steps: int
    """Counted steps of each rung."""
    workers: int
    say: Callable[[str], None]
    memory_bytes: int | None = None
    """Of the device; None where it sets no limit."""

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU; without one, models are made small."""
        return self.ranks.device.type == "cuda"

    @property
    def peak(self) -> float | None:
        """Dense bf16 rate of the GPU in FLOP/s, where it is known."""
        return peak_flops(torch.cuda.get_device_name(self.ranks.device)) if self.on_gpu else None


class Climb:
    """One model's way up the ladder; what it has reached stays for the whole loop."""

    def __init__(self, bench: GpuBench, model_name: str) -> None:
        """Stand at the bottom, with a micro-batch that the device's memory holds by the plan."""
        self._bench = bench
        self._model_name = model_name
        self._tree = _base_tree(bench, model_name)
        while not self._fits() and self.micro_batch % 4 == 0:  # mixup pairs images, so a half is even too
            self._tree = merge_trees(self._tree, _batch_of(self.micro_batch // 2))

    @property
    def micro_batch(self) -> int:
        """Images a step."""
        found: int = self._tree["batch"]["micro_batch"]
        return found

    def rungs(self, rungs: Iterable[Rung] = LADDER) -> Iterator[RungResult]:
        """Measure from the bottom; what cannot run says why and is left out of what stands above it."""
        for rung in rungs:
            tried = [
                (change, _measured(self._bench, rung, merge_trees(self._tree, change))) for change in rung.alternatives
            ]
            for change, result in tried:
                if len(tried) > 1:
                    ((section, keys),) = change.items()
                    result = replace(result, rung=f"{rung.name}: {section}.{'='.join(map(str, *keys.items()))}")
                yield result
            ran = [(change, result) for change, result in tried if not result.failed]
            if ran and rung.stays:
                self._tree = merge_trees(self._tree, max(ran, key=lambda pair: pair[1].images_per_s or 0.0)[0])

    def whole_loop(self) -> Iterator[RungResult]:
        """The trainer with telemetry and guard and all levers that stay: on a batch that is there, then on shards."""
        photos = self._bench.folder / "photos"
        if not (photos / "dataset.json").exists():
            images, distinct = (2048, 16) if self._bench.on_gpu else (64, 2)
            write_photo_dataset(photos, max(images, 2 * self.micro_batch), 64, distinct, IN21K)
        for data, feed in (("one batch, again and again", _SameBatch), ("shards of photographs", Feed)):
            self._bench.say(f"{self._model_name}: the whole loop on {data}")
            with _memory_of_its_own(self._bench):
                result = self._run_trainer(photos, f"the whole loop on {data}", feed)
            yield result

    def _fits(self) -> bool:
        memory_bytes = self._bench.memory_bytes
        if memory_bytes is None:
            return True
        config = _parse(self._tree)
        with torch.device("meta"):
            model = build_model(config)
        precision = resolve_precision(config.engine.precision, self._bench.ranks.device)
        return planned_step_bytes(config, model, _split(config), precision) <= MEMORY_SHARE * memory_bytes

    def _run_trainer(self, photos: Path, what: str, feed: type[Feed]) -> RungResult:
        bench = self._bench
        steps = 4 * bench.steps
        run_dir = bench.folder / f"run-{self._model_name}-{feed.__name__}"
        changes = {
            "run": {"dir": str(run_dir)},
            "data": {"train": {"path": str(photos), "split": SPLIT}, "workers": bench.workers},
            "schedule": {"length": steps},
            "log": {"every_steps": bench.steps},
            "checkpoint": {"every_steps": 10 * steps},
        }
        config = _parse(merge_trees(self._tree, changes))
        blueprint = draw_blueprint(config, bench.ranks)
        directory = RunDirectory.open(config, bench.ranks)
        stop = StopRequest()
        watchdog = Watchdog(config.watchdog, bench.ranks, directory, stop)
        trainer = Trainer(blueprint, bench.ranks, stop, directory, watchdog)
        trainer.feed = feed(blueprint, bench.ranks)
        with suppress(_MeasuredError):
            trainer.save = _stop_here  # type: ignore[method-assign]
            trainer.run()
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = next(json.loads(line) for line in reversed(lines) if tags.TRAIN_LOSS in line)
        return RungResult(
            self._model_name,
            what,
            self.micro_batch,
            images_per_s=last[tags.PERF_IMAGES_PER_S],
            mfu=last.get(tags.PERF_MFU),
            executed_mfu=last.get(tags.PERF_EXECUTED_MFU),
            peak_bytes=last.get(tags.MACHINE_DEVICE_PEAK_BYTES),
            loss=last[tags.TRAIN_LOSS],
        )


class _SameBatch(Feed):
    """Reads one batch and gives it in place of every other one: what a step costs when data is always there."""

    _batch: TrainBatch | None = None

    def take(self) -> TrainBatch:
        if self._batch is None:
            self._batch = super().take()
        return self._batch


class _MeasuredError(Exception):
    """All steps are counted; nobody needs the run's last checkpoint."""


def _stop_here() -> None:
    raise _MeasuredError


def _base_tree(bench: GpuBench, model_name: str) -> dict[str, Any]:
    """Config of the lowest rung; the data is never read but by the whole loop."""
    return {
        "model": {"name": model_name, "num_classes": len(IN21K), "representation_size": 0}
        | ({} if bench.on_gpu else MICRO),
        "data": {"train": {"path": "photographs", "split": SPLIT}, "lanes": 64, "block": 1},
        **_batch_of(bench.micro_batch),
        "optim": {"peak_lr": 1e-4, "weight_decay": 0.03},
        "schedule": {"length": 1000},
        "loss": {"kind": "sigmoid"},
        "engine": {"zero_stage": 1, "precision": "bf16" if bench.on_gpu else "fp32"},
        "log": {"pictures": 0},
    }


def _parse(tree: Mapping[str, Any]) -> Config:
    return parse_config(tree, source="bench gpu")


def _batch_of(images: int) -> dict[str, dict[str, int]]:
    return {"batch": {"global_batch": images, "micro_batch": images}}


def _split(config: Config) -> BatchSplit:
    return BatchSplit(config.batch.global_batch, config.batch.micro_batch, 1, 1)


def _measured(bench: GpuBench, rung: Rung, tree: Mapping[str, Any]) -> RungResult:
    result = RungResult(tree["model"]["name"], rung.name, tree["batch"]["micro_batch"])
    bench.say(f"{result.model}: {rung.name}")
    try:
        with _memory_of_its_own(bench):
            found = _time_steps(bench, _parse(tree))
    except ConfigError as error:
        return replace(result, failed=str(error))
    except torch.OutOfMemoryError:
        return replace(result, failed="out of memory")
    except Exception as error:  # a kernel or compiler of this machine that fails must not cost the other rungs
        return replace(result, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    return replace(result, **found)


@contextmanager
def _memory_of_its_own(bench: GpuBench) -> Iterator[None]:
    """What is allocated inside is given back, and the device's peak counts from here."""
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.ranks.device)
    try:
        yield
    finally:
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()


def _time_steps(bench: GpuBench, config: Config) -> dict[str, Any]:
    ranks, split = bench.ranks, _split(config)
    micro_batch = split.micro_batch
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
    executed = executed_flops(config, variant, split)
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
