"""The trainer, for pretraining and fine-tuning alike. `Trainer.run` is the loop: read it first.

config -> blueprint (checked) -> engine -> restore -> { stop? -> step -> record -> validate -> save } -> end
"""

import logging
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch

from vitscale.checkpoint import CheckpointStore
from vitscale.config import Phase
from vitscale.data.batch import Cursor, TrainBatch, check_cursor
from vitscale.data.mixture import Mixture
from vitscale.data.order import hash64
from vitscale.data.processes import start_server
from vitscale.engine import StepResult
from vitscale.errors import CheckpointError, DivergenceError, ExitStatus, RunDirectoryError
from vitscale.model import VisionTransformer, train_flops
from vitscale.optim import learning_rate
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import purge_after
from vitscale.train.beats import Part
from vitscale.train.build import Blueprint, build_engine, executed_flops, exported_arguments
from vitscale.train.course import Course, Detour, read_detours, write_detours
from vitscale.train.feed import Feed
from vitscale.train.guard import StepGuard
from vitscale.train.ledger import SampleLedger, purge_ledger
from vitscale.train.pictures import Pictures
from vitscale.train.profiling import StepProfiler
from vitscale.train.reporting import Reporter
from vitscale.train.run_directory import RunDirectory
from vitscale.train.saving import Progress, Saver
from vitscale.train.stop import StopRequest
from vitscale.train.together import as_one, on_main
from vitscale.train.validation import Validation
from vitscale.train.watchdog import Watchdog

log = logging.getLogger(__name__)


class Trainer:
    """One run on one rank. All methods are collective."""

    def __init__(
        self, blueprint: Blueprint, ranks: Ranks, stop: StopRequest, directory: RunDirectory, watchdog: Watchdog
    ) -> None:
        """Build the engine, restore the newest checkpoint, and open the data at the position it left."""
        config = blueprint.config
        self.blueprint = blueprint
        self.ranks = ranks
        self.stop = stop
        self.config = config
        self.directory = directory.path
        self.watchdog = watchdog
        if config.data.workers:
            start_server()  # its imports run beside the building of the engine
        resumes = directory.found_step > 0 or config.run.branch_from is not None
        self.engine, shapes = build_engine(blueprint, ranks, resumes)
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
        self.validation = Validation(blueprint, self.engine, ranks)
        self.pictures = Pictures(blueprint, ranks, self.validation.loader)
        self.profiler = StepProfiler(config.profile, ranks, directory.path)
        self.feed = Feed(blueprint, ranks)
        self.guard = StepGuard(config.guard)
        self.phase: Phase | None = None
        self.progress = Progress()
        self.saved_step = 0
        self.course = Course(blueprint.timeline)
        restored = self.saver.restore()
        if restored is not None:
            self.follow(*restored)
            # Read once: a network file system may show one node a file, and another none.
            kept = on_main(ranks, lambda: read_detours(directory.path))
            # A roll-back's detour is on record before the first checkpoint that was trained along it.
            self.course = replace(self.course, detours=max(kept, self.course.detours, key=len))
        self.open_records()
        # Of the step just done; set by train_step.
        self.result: StepResult
        self.lr: float

    def run(self) -> ExitStatus:
        """The loop."""
        config, total = self.config, self.blueprint.total_steps
        self.reporter.begin()
        try:
            while self.progress.step < total:
                with self.reporter.waiting():
                    stopping, failing = self.ranks.any_of(self.stop.poll(), self.saver.failing)
                if failing:
                    self.finish_save()
                if stopping:
                    return self.leave()
                self.train_step()
                step, last = self.progress.step, self.progress.step == total
                diverged = self.guard.diverged(at_end=last)
                if self.is_recorded(step):
                    diverged = self.record() or diverged
                if diverged:
                    self.recover(diverged)
                    continue
                validated = last or (config.eval.every_steps is not None and step % config.eval.every_steps == 0)
                if validated:
                    self.validate()
                if self.pictures.due(step, validated):
                    self.draw()
                if last or (self.is_due(step) and not self.guard.streak):
                    self.save()
            self.finish_save()
            log.info("finished: step %d of %d", self.progress.step, total)
            return ExitStatus.FINISHED
        finally:
            self.feed.close()
            self.profiler.close()
            with self.watchdog.within(Part.SAVE):
                self.saver.close(finished=self.saved_step == total)
            self.close_records()

    @property
    def model(self) -> VisionTransformer:
        """The model that the engine trains."""
        module = self.engine.module
        assert isinstance(module, VisionTransformer)
        return module

    def train_step(self) -> None:
        """One optimizer update, or none where the guard says so."""
        step = self.progress.step
        self.profiler.before(step + 1)
        with self.watchdog.within(Part.DATA):
            phase = self.feed.begin(self.course, step).phase
        if phase is not self.phase:
            self.enter(phase)
        # Dropout and drop path follow from (seed, step, rank) alone, so a checkpoint needs no generator state.
        torch.manual_seed(int(hash64(self.config.run.seed, step, self.ranks.rank) >> np.uint64(1)))
        self.lr = self.learning_rate(step)
        self.guard.begin(step)
        seen: list[TrainBatch] = []
        self.result = self.engine.train_step(
            self.watchdog.each(Part.DATA, self.feed.micro_batches(self.reporter.batch, seen)),
            self.lr,
            accept=self.guard.accept,
            measure=self.is_recorded(step + 1),
        )
        self.progress.step += 1
        self.watchdog.enter(Part.STEP, self.progress.step)
        self.reporter.step(self.result, phase.split.global_batch)
        if self.ledger is not None:
            source = self.blueprint.source
            assert isinstance(source, Mixture)  # the config asks for a ledger of nothing else
            rows = (row for batch in seen for row in batch.samples[batch.valid].tolist())
            self.ledger.write(self.progress.step, map(source.samples.key, rows))
        self.profiler.after(step + 1)

    def learning_rate(self, step: int) -> float:
        """The rate of a step, of layers without a scale of their own."""
        config, timeline = self.config, self.blueprint.timeline
        return learning_rate(
            step,
            kind=config.schedule.kind,
            peak_lr=config.optim.peak_lr,
            total_steps=timeline.total_steps,
            warmup_steps=timeline.warmup_steps,
            cooldown_steps=timeline.cooldown_steps,
            timescale_steps=timeline.timescale_steps,
            final_lr=config.schedule.final_lr,
        )

    def enter(self, phase: Phase) -> None:
        """Go on with the batch and the input size of a phase."""
        variant = self.blueprint.phase_variant(phase)
        self.watchdog.enter(Part.START, self.progress.step)  # the step may compile
        self.phase = phase
        self.engine.set_grad_accum(phase.split.grad_accum)
        self.model.set_input_size(phase.img_size)
        self.reporter.set_flops(model=train_flops(variant), executed=executed_flops(self.config, variant, phase.split))
        if len(self.blueprint.timeline.phases) > 1:
            log.info(
                "step %d: %d images a step of %d x %d px until step %d",
                self.progress.step, phase.split.global_batch, *variant.image_px, phase.end_step,
            )  # fmt: skip

    def is_recorded(self, step: int) -> bool:
        """Whether metrics are written after this step."""
        return step % self.config.log.every_steps == 0 or step == self.blueprint.total_steps

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due; while updates are skipped it waits, for the weights may be lost already."""
        every = self.config.checkpoint.every_steps
        return step // every > self.saved_step // every

    def record(self) -> str | None:
        """Write the metrics of the step just done; why the run has diverged, if they say so."""
        loss = self.reporter.train(
            self.progress.step,
            self.result,
            self.lr,
            images_seen=self.course.images_seen(self.progress.step),
            skipped=self.guard.skipped,
            spikes=self.guard.spikes,
        )
        return self.guard.record(loss)

    def validate(self) -> None:
        """Accuracy on the validation split, if there is one, and pictures with it."""
        with self.reporter.paused(), self.watchdog.within(Part.VALIDATION):
            metrics = self.validation.metrics()
        if metrics:
            self.progress.metrics = metrics
            self.reporter.scalars(self.progress.step, metrics)

    def draw(self) -> None:
        """Pictures for TensorBoard."""
        with self.reporter.paused(), self.watchdog.within(Part.VALIDATION), self.validation.own_input_size():
            pictures = self.pictures.draw(self.engine)
        self.reporter.images(self.progress.step, pictures)

    def save(self) -> None:
        """Take a checkpoint, which is written and committed while training goes on."""
        with self.reporter.stalled(), self.watchdog.within(Part.SAVE):
            cursor = self.blueprint.source.cursor(self.course.images_seen(self.progress.step))
            self.progress.course = {"guard": self.guard.state(), "detours": [astuple(d) for d in self.course.detours]}
            self.saver.save(self.progress, cursor.to_dict())
        self.saved_step = self.progress.step

    def finish_save(self) -> None:
        """Wait for the checkpoint under way, if there is one."""
        with self.reporter.stalled(), self.watchdog.within(Part.SAVE):
            self.saver.finish()

    def leave(self) -> ExitStatus:
        """Save what is not saved yet, heeding no further signals, and ask for another start."""
        # The signal may have reached any of the ranks; rank 0 writes down why the run ended.
        self.stop.reason = next(reason for reason in self.ranks.gather_objects(self.stop.reason) if reason)
        with self.stop.shielded():
            if self.guard.streak:
                log.warning("updates are being skipped, so nothing is saved after step %d", self.saved_step)
            elif self.saved_step != self.progress.step:
                self.save()
            self.finish_save()
        log.info("stopped at step %d: %s; run the same command again to go on", self.progress.step, self.stop.reason)
        return ExitStatus.RUN_AGAIN

    def recover(self, why: str) -> None:
        """Go back to the newest checkpoint and from there on with other data, or end the run.

        Raises:
            DivergenceError: on every rank, when the config allows no roll-back (any more), or none is possible.
        """
        failed_step = self.progress.step
        report = self.directory / f"divergence-{failed_step:08d}.json"
        if self.ranks.is_main:
            self.guard.write_report(report, why, {"step": failed_step, "learning_rate": self.lr})
        self.finish_save()
        detours = self.course.detours
        self.watchdog.enter(Part.START, failed_step)
        restored = self.saver.restore() if len(detours) < self.config.guard.roll_backs else None
        course = self.course.avoiding(restored[0].step, failed_step - 1) if restored is not None else None
        if restored is None or course is None:
            error = DivergenceError(
                f"step {failed_step}: {why}: the newest checkpoint is step {self.saved_step}, what came before stands "
                f"in {report}; lower optim.peak_lr or optim.clip_norm before going on, or allow guard.roll_backs"
            )
            raise as_one(self.ranks, error)
        log.warning(
            "step %d: %s: back to step %d, whose next %d steps of data change places with those after them (%s)",
            failed_step, why, restored[0].step, course.detours[-1].steps, report,
        )  # fmt: skip
        self.feed.close()
        self.close_records()
        self.follow(*restored)
        self.guard.streak = 0
        self.course = replace(course, shift=self.course.shift)
        if self.ranks.is_main:
            write_detours(self.directory, course.detours)
        self.open_records()
        self.phase = None
        self.reporter.begin()

    def follow(self, progress: Progress, cursor: dict[str, Any]) -> None:
        """Take over how far a checkpoint had come.

        Raises:
            CheckpointError: its position is one of another data order, or it was not saved by vitscale.
        """
        source = self.blueprint.source
        try:
            saved = Cursor.from_dict(cursor)
            check_cursor(saved, source.cursor(saved.position), source.name)
            self.guard.restore(progress.course.get("guard", {}))
            detours = tuple(Detour(*values) for values in progress.course.get("detours", ()))
            shift = saved.position - self.blueprint.timeline.images_at(progress.step)
        except (TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the manifest of step {progress.step} does not say where the run stands in its data: {error}: "
                "restore it from a copy"
            ) from None
        self.progress = progress
        self.saved_step = progress.step
        self.course = Course(self.blueprint.timeline, detours, shift)

    def open_records(self) -> None:
        """Metrics and ledger from the present step on: whatever was written beyond it is about to be done again.

        Raises:
            RunDirectoryError: they cannot be read or written.
        """
        try:
            if self.ranks.is_main:
                purge_after(self.directory, self.progress.step)
                purge_ledger(self.directory, self.progress.step)
            self.ranks.barrier()
            self.reporter = Reporter(self.blueprint, self.ranks, self.directory, self.progress.step)
            self.ledger = SampleLedger(self.directory, self.ranks.rank) if self.config.log.samples else None
        except OSError as error:
            raise RunDirectoryError.of_system(
                error, f"{self.directory}: the records of its steps cannot be opened: {error}: mend it"
            ) from None

    def close_records(self) -> None:
        """Write out what is pending of metrics and ledger."""
        self.reporter.close()
        if self.ledger is not None:
            self.ledger.close()
