"""What a run says while it goes on: metrics to the sinks, and the lines a person reads at its start."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from vitscale.data.batch import TrainBatch
from vitscale.data.stream import LIMITS, Stream
from vitscale.engine import StepResult, resolve_precision
from vitscale.model import train_flops
from vitscale.ranks import Ranks
from vitscale.telemetry import ConsoleSink, JsonlSink, MetricWriter, StepMeter, TensorBoardSink, peak_flops, tags
from vitscale.train.build import Blueprint

log = logging.getLogger(__name__)


class Reporter:
    """Metrics of one run. Only rank 0 writes; the collective methods say so."""

    def __init__(self, blueprint: Blueprint, ranks: Ranks, run_dir: Path, start_step: int) -> None:
        """Open the sinks on rank 0 and log what the run is."""
        self._ranks = ranks
        self._substituted = 0
        peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self.meter = StepMeter(
            flops_per_image=train_flops(blueprint.variant), peak_flops=peak and peak * ranks.world_size
        )
        self._writer = MetricWriter([])
        if ranks.is_main:
            _announce(blueprint, ranks, start_step)
            board = TensorBoardSink(run_dir / "tensorboard")
            board.hparams(_hparams(blueprint))
            console = ConsoleSink(blueprint.total_steps, start_step)
            self._writer = MetricWriter([JsonlSink(run_dir / "metrics.jsonl"), board, console])

    def train(self, step: int, result: StepResult, lr: float) -> None:
        """Write the training metrics of a step. Collective: the loss is the mean over ranks."""
        totals = self._ranks.sum(torch.tensor([float(result.loss), float(self._substituted)], dtype=torch.float64))
        scalars = {
            tags.TRAIN_LOSS: totals[0].item() / self._ranks.world_size,
            tags.TRAIN_LR: lr,
            tags.TRAIN_GRAD_NORM: float(result.grad_norm),
            tags.DATA_SUBSTITUTIONS: totals[1].item(),
        }
        self.scalars(step, scalars | self.meter.read())

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write any metrics of a step."""
        self._writer.write(step, scalars)

    def batch(self, batch: TrainBatch, wait_s: float, ready: int) -> None:
        """Count a micro-batch this rank waited for, and name its unreadable samples on the rank that met them."""
        self.meter.add_batch(wait_s, ready, batch.traffic.read_bytes, batch.traffic.used_bytes)
        for bad in batch.substitutions:
            self._substituted += 1
            log.warning(
                "rank %d: sample %s of %s cannot be used (%s): replaced by %s",
                self._ranks.rank, bad.key, bad.shard, bad.reason, bad.replaced_by,
            )  # fmt: skip

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()


def _announce(blueprint: Blueprint, ranks: Ranks, start_step: int) -> None:
    config, split = blueprint.config, blueprint.split
    precision = resolve_precision(config.engine.precision, ranks.device)
    asked = config.engine.precision
    why = f" ({'this device multiplies bf16 natively' if precision == 'bf16' else 'no native bf16 here'})"
    stage = f", ZeRO stage {config.engine.zero_stage}" if config.engine.kind == "deepspeed" else ""
    log.info("engine %s%s, %s%s", config.engine.kind, stage, precision, why if asked == "auto" else "")
    log.info(
        "%d images a step = %d ranks (%s) x micro-batch %d x accumulation %d",
        split.global_batch, split.world_size, ranks.device.type, split.micro_batch, split.grad_accum,
    )  # fmt: skip
    log.info(
        "%d images an epoch, %d steps, from step %d; run directory %s",
        blueprint.source.epoch_images, blueprint.total_steps, start_step, config.run.dir,
    )  # fmt: skip

    if isinstance(blueprint.source, Stream):
        log.warning(LIMITS, blueprint.source.name)


def _hparams(blueprint: Blueprint) -> dict[str, float | int | str]:
    """The settings that runs are compared by."""
    config = blueprint.config
    return {
        "model": config.model.name,
        "global_batch": config.batch.global_batch,
        "peak_lr": config.optim.peak_lr,
        "weight_decay": config.optim.weight_decay,
        "schedule": config.schedule.kind,
        "total_steps": blueprint.total_steps,
        "loss": config.loss.kind,
        "zero_stage": config.engine.zero_stage,
        "seed": config.run.seed,
    }
