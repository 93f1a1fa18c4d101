"""What a run says while it goes on: metrics to the sinks, and the lines a person reads at its start."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitscale.data.batch import TrainBatch
from vitscale.data.stream import LIMITS, Stream
from vitscale.engine import StepResult, resolve_precision
from vitscale.model import train_flops
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import (
    PARTS,
    STORY,
    ConsoleSink,
    Interval,
    JsonlSink,
    MetricWriter,
    RunningMean,
    Sink,
    StepMeter,
    TensorBoardSink,
    newest_record,
    open_second_sink,
    peak_flops,
    peak_rss_bytes,
    slowest_rank,
    tags,
)
from vitscale.train.build import Blueprint

log = logging.getLogger(__name__)

_AVERAGED_STEPS = 100


class Reporter:
    """Metrics of one run. Only rank 0 writes; the collective methods say so.

    Between two records nothing here waits for the device: `step` keeps what the engine gave, `train` reads it.
    """

    def __init__(self, blueprint: Blueprint, ranks: Ranks, run_dir: Path, start_step: int) -> None:
        """Open the sinks on rank 0 and log what the run is."""
        self._ranks = ranks
        self._epoch_images = blueprint.source.epoch_images
        self._substituted = 0
        self._losses: list[Tensor] = []
        self._average = RunningMean(_AVERAGED_STEPS)
        self._meter = StepMeter(flops_per_image=train_flops(blueprint.variant))
        peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self._peak_flops = peak and peak * ranks.world_size
        self._writer = MetricWriter([])
        if ranks.is_main:
            _announce(blueprint, ranks, start_step)
            metrics = run_dir / "metrics.jsonl"
            if (found := newest_record(metrics, tags.TRAIN_LOSS_EMA)) is not None:
                self._average = RunningMean.resumed(_AVERAGED_STEPS, found["step"], found[tags.TRAIN_LOSS_EMA])
            self._writer = MetricWriter(_open_sinks(blueprint, run_dir, start_step))

    def begin(self) -> None:
        """Start the clock of the first interval; call it right before the first step."""
        self._meter.begin()

    def set_flops(self, *, model: float, executed: float | None) -> None:
        """What training on one image costs from now on, in FLOPs; until the first call, what the model's own size says.

        Args:
            model: of the model, without recomputation.
            executed: with what is recomputed or left out; None where it is not known.
        """
        self._meter.set_flops(model=model, executed=executed)

    def batch(self, batch: TrainBatch, wait_s: float, ready: int) -> None:
        """Count a micro-batch this rank waited for, and name its unreadable samples on the rank that met them."""
        self._meter.add_batch(wait_s, ready, batch.traffic.read_bytes, batch.traffic.used_bytes)
        for bad in batch.substitutions:
            self._substituted += 1
            log.warning(
                "rank %d: sample %s of %s cannot be used (%s): replaced by %s",
                self._ranks.rank, bad.key, bad.shard, bad.reason, bad.replaced_by,
            )  # fmt: skip

    def step(self, result: StepResult, images: int) -> None:
        """Count a step of so many images over all ranks."""
        self._meter.add_step(images, result.times)
        self._losses.append(result.loss)

    def train(
        self, step: int, result: StepResult, lr: float, *, images_seen: int, skipped: int = 0, spikes: int = 0
    ) -> float:
        """Write the training metrics of the steps since the last record; gives this step's mean loss. Collective.

        Args:
            step: the step just done.
            result: of this step.
            lr: learning rate of this step.
            images_seen: by the run so far.
            skipped: steps of the run so far whose update was not made.
            spikes: those among them whose gradient was too large.
        """
        own_losses = torch.stack(self._losses).double().cpu()  # from here on the device has done the steps
        interval = self._meter.take()
        self._losses.clear()
        losses, substituted, parts_s, ranks = self._shared(own_losses, interval)
        if not self._ranks.is_main:
            return losses[-1]
        for loss in filter(math.isfinite, losses):
            self._average = self._average.with_value(loss)
        scalars: dict[str, float] = {
            tags.TRAIN_LOSS: losses[-1],
            tags.TRAIN_LOSS_EMA: self._average.value,
            tags.TRAIN_LR: lr,
            tags.TRAIN_GRAD_NORM: float(result.grad_norm),
            tags.TRAIN_IMAGES_SEEN: images_seen,
            tags.TRAIN_EPOCH: images_seen / self._epoch_images,
            tags.TRAIN_SKIPPED_STEPS: skipped,
            tags.TRAIN_SPIKES: spikes,
            tags.DATA_SUBSTITUTIONS: substituted,
        }
        scalars |= interval.metrics(parts_s, self._peak_flops)
        if result.norms:
            scalars |= dict(zip(result.norms, torch.stack(list(result.norms.values())).tolist(), strict=True))
        scalars |= slowest_rank([own_step_s for own_step_s, _, _ in ranks])
        scalars[tags.MACHINE_HOST_PEAK_BYTES] = max(host for _, host, _ in ranks)
        if self._ranks.device.type == "cuda":
            scalars[tags.MACHINE_DEVICE_PEAK_BYTES] = max(device for _, _, device in ranks)
        self.scalars(step, scalars)
        return losses[-1]

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write any metrics of a step."""
        self._writer.write(step, scalars)

    def images(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Write pictures of a step, PNG files by their tags."""
        for tag, png in pictures.items():
            self._writer.images(step, tag, png)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is a collective between two steps; without waiting for the device."""
        started_s = time.perf_counter()
        yield
        self._meter.add_wait(time.perf_counter() - started_s)

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """What happens inside holds up training: it counts as the checkpoint's part of the steps."""
        with self._timed() as took:
            yield
        self._meter.add_stall(took[0])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training, such as a validation: rates leave its time out."""
        with self._timed() as took:
            yield
        self._meter.add_pause(took[0])

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[list[float]]:
        """Gives a list that holds the seconds when it is over."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)  # steps still under way are not part of it
        took: list[float] = []
        started_s = time.perf_counter()
        yield took
        took.append(time.perf_counter() - started_s)

    def _shared(
        self, losses: Tensor, interval: Interval
    ) -> tuple[list[float], float, dict[str, float], list[list[float]]]:
        """All ranks' numbers in one collective.

        Returns:
            The losses' means over ranks, the sum of substitutions, the parts' mean times by tag, and of every
            rank its time a step, its host's and its device's memory.
        """
        ranks = self._ranks
        device_bytes = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else 0
        own = [interval.own_step_s, peak_rss_bytes(), device_bytes]
        shared = [*losses.tolist(), *(interval.parts_s[tag] for tag in PARTS), self._substituted]
        with self.waiting():
            rows = ranks.gather(torch.tensor([*own, *shared], dtype=torch.float64))
        owns, losses, parts, counts = torch.split(rows, [len(own), len(losses), len(PARTS), 1], dim=1)
        parts_s = dict(zip(PARTS, parts.mean(0).tolist(), strict=True))
        return losses.mean(0).tolist(), counts.sum().item(), parts_s, owns.tolist()


def _open_sinks(blueprint: Blueprint, run_dir: Path, start_step: int) -> list[Sink]:
    board = TensorBoardSink(run_dir / "tensorboard")
    board.hparams(_hparams(blueprint))
    board.layout(STORY)
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl"), board, ConsoleSink(blueprint.total_steps, start_step)]
    second = blueprint.config.log.second_sink
    return [*sinks, open_second_sink(second, run_dir, _hparams(blueprint))] if second else sinks


def _announce(blueprint: Blueprint, ranks: Ranks, start_step: int) -> None:
    config, split = blueprint.config, blueprint.split
    precision = resolve_precision(config.engine.precision, ranks.device)
    asked = config.engine.precision
    why = f" ({'this device multiplies bf16 natively' if precision == 'bf16' else 'no native bf16 here'})"
    stage = f", ZeRO stage {config.engine.zero_stage}" if config.engine.kind == "deepspeed" else ""
    log.info("engine %s%s, %s%s", config.engine.kind, stage, precision, why if asked == "auto" else "")
    log.info(
        "%d images a step = %d ranks (%s) x micro-batch %d x accumulation %d%s",
        split.global_batch, split.world_size, ranks.device.type, split.micro_batch, split.grad_accum,
        f" - {split.padding} masked" if split.padding else "",
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
