"""The trainer, for pretraining and fine-tuning alike. `Trainer.run` is the loop: read it first.

config -> blueprint (checked) -> engine -> restore -> { stop? -> step -> record -> validate -> save } -> end
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vitscale import ranks as process_group
from vitscale.checkpoint import CheckpointStore
from vitscale.config import Config
from vitscale.data.batch import Cursor, TrainBatch, check_cursor
from vitscale.data.loader import EvalLoader
from vitscale.data.mixture import Mixture
from vitscale.data.mixup import MixedLabels, soft_targets
from vitscale.data.order import hash64
from vitscale.data.processes import start_server
from vitscale.engine import MicroBatch, StepResult
from vitscale.errors import DivergenceError, ExitStatus, VitscaleError
from vitscale.evaluation import measure_accuracy
from vitscale.optim import learning_rate
from vitscale.ranks import Ranks
from vitscale.telemetry import purge_after, tags
from vitscale.train.build import (
    Blueprint,
    build_augmentation,
    build_engine,
    draw_blueprint,
    exported_arguments,
    open_loader,
)
from vitscale.train.ledger import SampleLedger, purge_ledger
from vitscale.train.reporting import Reporter
from vitscale.train.run_directory import RunDirectory
from vitscale.train.saving import Progress, Saver
from vitscale.train.stop import StopRequest
from vitscale.train.together import as_one, on_main

log = logging.getLogger(__name__)


def run_training(config: Config, allow_change: Sequence[str] = ()) -> ExitStatus:
    """Train until the run's end or a stop request, going on where the run directory left off.

    Args:
        config: the run.
        allow_change: dotted config keys that may differ from those the run directory was started with.

    Returns:
        FINISHED or RUN_AGAIN; every other end is an exception. RUN/exit.json records each of them.

    Raises:
        VitscaleError: with the exit status it stands for.
    """
    stop = StopRequest()
    stop.install()
    ranks = process_group.start()
    try:
        # Rank 0 looks first, so that a mistake is told once and not by every rank.
        drawn: list[Blueprint] = []
        on_main(ranks, lambda: drawn.append(draw_blueprint(config, ranks.world_size, ranks.device)))
        blueprint = drawn[0] if drawn else draw_blueprint(config, ranks.world_size, ranks.device, check_files=False)
        directory = RunDirectory.open(config, ranks, allow_change)
        trainer: Trainer | None = None
        status, reason = ExitStatus.TRANSIENT, ""
        try:
            trainer = Trainer(blueprint, ranks, stop, directory)
            status = trainer.run()
            reason = stop.reason or "finished"
        except VitscaleError as error:
            status, reason = error.status, str(error)
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            directory.close(status, reason, trainer.progress.step if trainer else 0)
        return status
    finally:
        process_group.stop()


class Trainer:
    """One run on one rank. All methods are collective."""

    def __init__(self, blueprint: Blueprint, ranks: Ranks, stop: StopRequest, directory: RunDirectory) -> None:
        """Build the engine, restore the newest checkpoint, and open the data at the position it left."""
        config = blueprint.config
        self.blueprint = blueprint
        self.ranks = ranks
        self.stop = stop
        self.config = config
        if config.data.workers:
            start_server()  # its imports run beside the building of the engine
        self.engine, shapes = build_engine(blueprint, ranks)
        self.saver = Saver(
            config,
            self.engine,
            ranks,
            CheckpointStore(directory.path),
            directory,
            exported_arguments(config),
            blueprint.source.classes,
            shapes,
        )
        restored = self.saver.restore()
        if restored is None:
            self.progress = Progress()
        else:
            self.progress, cursor = restored
            saved, source = Cursor.from_dict(cursor), blueprint.source
            check_cursor(saved, source.cursor(saved.position), source.name)
        self.saved_step = self.progress.step
        # Whatever was written beyond the restored step is about to be done again.
        if ranks.is_main:
            purge_after(directory.path, self.progress.step)
            purge_ledger(directory.path, self.progress.step)
        ranks.barrier()
        self.reporter = Reporter(blueprint, ranks, directory.path, self.progress.step)
        self.ledger = SampleLedger(directory.path, ranks.rank) if config.log.samples else None
        self.augmentation = build_augmentation(blueprint)
        start = self.progress.step * blueprint.split.global_batch
        self.loader = open_loader(blueprint, self.augmentation, ranks.rank, start)
        self.eval_loader = open_eval_loader(blueprint, ranks)
        # Of the step just done; set by train_step.
        self.result: StepResult
        self.cursor: Cursor
        self.lr: float

    def run(self) -> ExitStatus:
        """The loop."""
        config, total = self.config, self.blueprint.total_steps
        try:
            while self.progress.step < total:
                if self.ranks.any(self.stop.poll()):
                    return self.leave()
                self.train_step()
                step, last = self.progress.step, self.progress.step == total
                if last or step % config.log.every_steps == 0:
                    self.record()
                if last or (config.eval.every_steps and step % config.eval.every_steps == 0):
                    self.validate()
                if last or step % config.checkpoint.every_steps == 0:
                    self.save()
            log.info("finished: step %d of %d", self.progress.step, total)
            return ExitStatus.FINISHED
        finally:
            self.loader.close()
            self.reporter.close()
            if self.ledger is not None:
                self.ledger.close()

    def train_step(self) -> None:
        """One optimizer update."""
        started_s = time.perf_counter()
        step, seed = self.progress.step, self.config.run.seed
        # Dropout and drop path follow from (seed, step, rank) alone, so a checkpoint needs no generator state.
        torch.manual_seed(int(hash64(seed, step, self.ranks.rank) >> np.uint64(1)))
        self.lr = learning_rate(
            step,
            kind=self.config.schedule.kind,
            peak_lr=self.config.optim.peak_lr,
            total_steps=self.blueprint.total_steps,
            warmup_steps=self.config.schedule.warmup_steps,
            final_lr=self.config.schedule.final_lr,
        )
        seen: list[TrainBatch] = []
        self.result = self.engine.train_step(self.micro_batches(seen), self.lr)
        self.cursor = seen[-1].cursor
        self.progress.step += 1
        self.reporter.meter.add_step(time.perf_counter() - started_s, self.blueprint.split.global_batch)
        if self.ledger is not None:
            source = self.blueprint.source
            assert isinstance(source, Mixture)  # the config asks for a ledger of nothing else
            rows = (row for batch in seen for row in batch.samples.tolist())
            self.ledger.write(self.progress.step, map(source.samples.key, rows))

    def micro_batches(self, seen: list[TrainBatch]) -> Iterator[MicroBatch]:
        """This step's micro-batches on the device; each goes into `seen` too."""
        device = self.ranks.device
        for _ in range(self.blueprint.split.grad_accum):
            started_s = time.perf_counter()
            batch = next(self.loader)
            self.reporter.batch(batch, time.perf_counter() - started_s, self.loader.ready)
            seen.append(batch)
            images = batch.images.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            images, targets = self.augmentation.apply(images, labels, batch.drawn)
            if isinstance(targets, MixedLabels):
                targets = soft_targets(targets, self.blueprint.variant.num_classes)
            yield images, targets

    def record(self) -> None:
        """Write the metrics of the step just done."""
        self.check_finite()
        self.reporter.train(self.progress.step, self.result, self.lr)

    def validate(self) -> None:
        """Accuracy on the validation split, if there is one."""
        if self.eval_loader is None:
            return
        data = self.config.data
        found = measure_accuracy(self.engine.predict, self.eval_loader, mean=data.mean, std=data.std, ranks=self.ranks)
        self.progress.metrics = {tags.VAL_LOSS: found.loss, tags.VAL_TOP1: found.top1, tags.VAL_TOP5: found.top5}
        self.reporter.scalars(self.progress.step, self.progress.metrics)

    def save(self) -> None:
        """Commit a checkpoint; signals are ignored until it is done."""
        self.check_finite()
        with self.stop.shielded():
            started_s = time.perf_counter()
            tag = self.saver.save(self.progress, self.cursor.to_dict())
            self.saved_step = self.progress.step
            log.info("saved %s in %.1f s", tag, time.perf_counter() - started_s)

    def leave(self) -> ExitStatus:
        """Save what is not saved yet and ask for another start."""
        # The signal may have reached any of the ranks; rank 0 writes down why the run ended.
        self.stop.reason = next(reason for reason in self.ranks.gather_objects(self.stop.reason) if reason)
        if self.saved_step != self.progress.step:
            self.save()
        log.info("stopped at step %d: %s; run the same command again to go on", self.progress.step, self.stop.reason)
        return ExitStatus.RUN_AGAIN

    def check_finite(self) -> None:
        """Stop before a damaged state is recorded or saved.

        Raises:
            DivergenceError: on every rank, when any rank's loss or the gradient norm is not finite.
        """
        own = torch.tensor([float(self.result.loss), float(self.result.grad_norm)], dtype=torch.float64)
        loss, norm = (self.ranks.sum(own) / self.ranks.world_size).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            error = DivergenceError(
                f"step {self.progress.step}: loss {loss}, gradient norm {norm}: the newest checkpoint is "
                f"step {self.saved_step}; lower optim.peak_lr or optim.clip_norm before going on from it"
            )
            raise as_one(self.ranks, error)


def open_eval_loader(blueprint: Blueprint, ranks: Ranks) -> EvalLoader | None:
    """This rank's share of the validation split; None where the config names none."""
    if blueprint.val_index is None:
        return None
    return EvalLoader(
        blueprint.val_index,
        blueprint.config.data,
        img_size=blueprint.variant.image_px[0],
        micro_batch=blueprint.config.eval.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
