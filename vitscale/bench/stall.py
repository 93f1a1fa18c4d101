"""What a save costs training: one that goes on beside it, and one that it waits for, in turn."""

import itertools
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitscale.bench.turns import Ratio, median_ms, ratio, take_turns, timed
from vitscale.checkpoint import CheckpointStore
from vitscale.config import BatchSplit, Config
from vitscale.engine import TrainEngine, create_engine
from vitscale.errors import ExitStatus
from vitscale.losses import classification_loss
from vitscale.model import create_model, resolve_variant
from vitscale.optim import build_optimizer
from vitscale.ranks.groups import Ranks
from vitscale.train.run_directory import RunDirectory
from vitscale.train.saving import Progress, Saver

_CLASSES, _MICRO_BATCH, _PEAK_LR = 1000, 2, 1e-4
_STEPS_ALONE = 3
"""Between two saves, with nothing beside them."""


@dataclass(frozen=True)
class Stall:
    """Medians, in milliseconds, and the asynchronous save's wait over the synchronous one's."""

    asynchronous_ms: float
    synchronous_ms: float
    ratio: Ratio
    step_ms: float
    step_beside_save_ms: float


def measure_stall(ranks: Ranks, run_dir: Path, model_name: str, rounds: int) -> Stall:
    """Train a variant on one batch with the plain torch engine and the trainer's own saves between the steps.

    Args:
        ranks: a started process group of one.
        run_dir: a run directory, made anew.
        model_name: a variant of the table.
        rounds: counted pairs of saves.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    config = _config(run_dir, model_name)
    engine, shapes = _engine(config, ranks)
    directory = RunDirectory.open(config, ranks)
    saver = Saver(config, engine, ranks, CheckpointStore(run_dir), directory, {}, (), shapes)
    images = torch.randn(_MICRO_BATCH, 3, *resolve_variant(model_name).image_px, device=ranks.device)
    batch = [(images, torch.arange(_MICRO_BATCH, device=ranks.device))]
    numbers = itertools.count(1)
    alone: list[float] = []
    beside: list[float] = []

    def step(times: list[float]) -> None:
        times.append(timed(lambda: float(engine.train_step(batch, _PEAK_LR).loss)).wall)

    def save() -> None:
        saver.save(Progress(step=next(numbers)), {})

    def save_and_wait() -> None:
        save()
        saver.finish()

    def train() -> None:
        while saver.task.running:
            step(beside)
        saver.finish()
        for _ in range(_STEPS_ALONE):
            step(alone)

    train()  # what is allocated at the first step is not a save's
    try:
        times = take_turns({"beside": save, "waited for": save_and_wait}, rounds, warmup_rounds=1, between=train)
    finally:
        saver.close(finished=False)
        directory.close(ExitStatus.FINISHED, "measured", next(numbers) - 1)
    beside_training, waited_for = times["beside"], times["waited for"]
    return Stall(
        median_ms(beside_training),
        median_ms(waited_for),
        ratio(beside_training, waited_for),
        statistics.median(alone) * 1e3,
        statistics.median(beside) * 1e3,
    )


def _config(run_dir: Path, model_name: str) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": run_dir},
        "model": {"name": model_name, "num_classes": _CLASSES},
        "data": {"train": {"path": "nothing-is-read", "split": "train"}},
        "batch": {"global_batch": _MICRO_BATCH, "micro_batch": _MICRO_BATCH},
        "optim": {"peak_lr": _PEAK_LR},
        "schedule": {"length": 1},
        "engine": {"kind": "torch", "zero_stage": 0, "precision": "fp32"},
        "checkpoint": {"keep_last": 1},
    }
    return Config.model_validate(tree)


def _engine(config: Config, ranks: Ranks) -> tuple[TrainEngine, dict[str, list[int]]]:
    torch.manual_seed(0)
    model = create_model(config.model.name, num_classes=_CLASSES).to(ranks.device)
    engine = create_engine(
        model,
        build_optimizer(model, config.optim),
        classification_loss("softmax"),
        config.engine,
        split=BatchSplit(_MICRO_BATCH, _MICRO_BATCH, 1, 1),
        clip_norm=config.optim.clip_norm,
        device=ranks.device,
        rank=ranks.rank,
    )
    return engine, {name: list(parameter.shape) for name, parameter in model.named_parameters()}
