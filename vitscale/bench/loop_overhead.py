"""What the trainer adds to the bare forward pass, backward pass and update: its loop and bare steps in turn."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vitscale.bench.photo_dataset import CLASSES, SPLIT
from vitscale.bench.turns import Ratio, Seconds, median_ms, ratio, timed
from vitscale.config import Config
from vitscale.model import create_model
from vitscale.optim import build_optimizer
from vitscale.ranks.groups import Ranks
from vitscale.train.build import draw_blueprint
from vitscale.train.loop import Trainer
from vitscale.train.run_directory import RunDirectory
from vitscale.train.stop import StopRequest
from vitscale.train.watchdog import Watchdog

_WARMUP_STEPS = 2


@dataclass(frozen=True)
class LoopOverhead:
    """Medians over the counted pairs, in milliseconds, and the trainer's step over the bare one."""

    bare_ms: float
    loop_ms: float
    parts_ms: Mapping[str, tuple[float, float]]
    """Forward, backward and update: of the bare step, of the trainer's."""
    ratio: Ratio


class _EnoughError(Exception):
    """All pairs are counted; nobody needs the run's last checkpoint."""


@dataclass
class _Parts:
    """Times of a step's parts, step by step."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def median_ms(self, part: str) -> float:
        return statistics.median(step[part] for step in self.steps[_WARMUP_STEPS:]) * 1e3


class _BareStepBetween(StopRequest):
    """Runs a bare step wherever the loop asks whether to stop: once at each step's boundary."""

    def __init__(self, bare_step: Callable[[], object], pairs: int) -> None:
        super().__init__()
        self.trainer: Trainer
        self.bare: list[Seconds] = []
        self.loop: list[Seconds] = []
        self.engine = _Parts()
        self._bare_step = bare_step
        self._pairs = pairs + _WARMUP_STEPS
        self._resumed: Seconds | None = None

    def poll(self) -> bool:
        now = Seconds(time.perf_counter(), time.process_time())
        if self._resumed is not None:
            self.loop.append(Seconds(now.wall - self._resumed.wall, now.cpu - self._resumed.cpu))
            times = self.trainer.result.times
            self.engine.steps.append(
                {"forward": times.forward_s, "backward": times.backward_s, "update": times.optimizer_s}
            )
        if len(self.loop) == self._pairs:
            raise _EnoughError
        self.bare.append(timed(self._bare_step))
        self._resumed = Seconds(time.perf_counter(), time.process_time())
        return False


def measure_loop(
    ranks: Ranks, photos: Path, run_dir: Path, *, model_name: str, micro_batch: int, workers: int, pairs: int
) -> LoopOverhead:
    """Run the trainer on photographs at ZeRO stage 0 in fp32 with a bare step of the same model after each of its own.

    Args:
        ranks: a started process group of one.
        photos: what `write_photo_dataset` made.
        run_dir: a new run directory.
        model_name: a variant of the table.
        micro_batch: images a step.
        workers: loader processes; 0 has the trainer's own process read and decode within the step.
        pairs: counted pairs of steps.
    """
    config = _config(photos, run_dir, model_name, micro_batch, workers, pairs)
    bare_parts = _Parts()
    between = _BareStepBetween(_bare_step(config, ranks.device, bare_parts), pairs)
    directory = RunDirectory.open(config, ranks)
    # Not started: a bare step in between has no name.
    watchdog = Watchdog(config.watchdog, ranks, directory, between)
    between.trainer = Trainer(draw_blueprint(config, ranks), ranks, between, directory, watchdog)
    with suppress(_EnoughError):
        between.trainer.run()
    bare, loop = between.bare[_WARMUP_STEPS:], between.loop[_WARMUP_STEPS:]
    parts = {part: (bare_parts.median_ms(part), between.engine.median_ms(part)) for part in bare_parts.steps[0]}
    return LoopOverhead(median_ms(bare), median_ms(loop), parts, ratio(loop, bare))


def _config(photos: Path, run_dir: Path, model_name: str, micro_batch: int, workers: int, pairs: int) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": run_dir},
        "model": {"name": model_name, "num_classes": len(CLASSES)},
        "data": {"train": {"path": str(photos), "split": SPLIT}, "workers": workers},
        "batch": {"global_batch": micro_batch, "micro_batch": micro_batch},
        "optim": {"peak_lr": 1e-4},
        "schedule": {"length": 10 * (pairs + _WARMUP_STEPS)},
        "engine": {"zero_stage": 0, "precision": "fp32"},
    }
    return Config.model_validate(tree)


def _bare_step(config: Config, device: torch.device, parts: _Parts) -> Callable[[], None]:
    """The same model, loss and optimizer on one batch that is ready, without clipping and without an engine."""
    micro_batch = config.batch.micro_batch
    torch.manual_seed(0)
    model = create_model(config.model.name, num_classes=len(CLASSES)).to(device).train()
    optimizer = build_optimizer(model, config.optim)
    images = torch.randn(micro_batch, 3, *model.variant.image_px, device=device)
    labels = torch.arange(micro_batch, device=device)

    def step() -> None:
        marks = [time.perf_counter()]
        loss = F.cross_entropy(model(images), labels)
        marks.append(time.perf_counter())
        loss.backward()  # type: ignore[no-untyped-call]
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        spent = [end - start for start, end in itertools.pairwise(marks)]
        parts.steps.append(dict(zip(("forward", "backward", "update"), spent, strict=True)))

    return step
