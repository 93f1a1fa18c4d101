"""What a step is fed: micro-batches on the device, augmented, with their targets, along the run's course."""

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from vitscale.data.augment import Augmentation
from vitscale.data.batch import TrainBatch
from vitscale.data.loader import TrainLoader
from vitscale.data.mixup import MixedLabels
from vitscale.engine import MicroBatch, resolve_precision
from vitscale.losses import Targets
from vitscale.ranks.groups import Ranks
from vitscale.train.build import Blueprint, build_augmentation, open_loader
from vitscale.train.course import Course, Stretch
from vitscale.train.teacher import Teacher, read_teacher


class Feed:
    """The micro-batches of one step after the other, on one rank.

    A loader reads images in sequence; where the course jumps, or batch or input size change, another takes over.
    """

    def __init__(self, blueprint: Blueprint, ranks: Ranks) -> None:
        """Read the teacher, if there is one; `begin` opens the first loader."""
        self._blueprint = blueprint
        self._ranks = ranks
        self._teacher: Teacher | None = None
        if (distill := blueprint.config.loss.distill) is not None:
            precision = resolve_precision(blueprint.config.engine.precision, ranks.device)
            found = read_teacher(distill, blueprint.source.classes)
            self._teacher = Teacher(found, blueprint.config.data, precision, ranks.device)
        self._stretch: Stretch | None = None
        self._augmentation: Augmentation
        self._loader: TrainLoader

    def begin(self, course: Course, step: int) -> Stretch:
        """Have the data of a step at hand, the first or the one after the last; gives the stretch it is part of."""
        found = self._stretch
        if found is None or not found.first_step <= step < found.end_step:
            self.close()
            found = course.stretch_from(step)
            self._augmentation = build_augmentation(self._blueprint, found.phase)
            self._loader = open_loader(
                self._blueprint, self._augmentation, found.phase.split, self._ranks.rank, found.position
            )
            self._stretch = found
        return found

    def micro_batches(
        self, on_batch: Callable[[TrainBatch, float, int], None], seen: list[TrainBatch]
    ) -> Iterator[MicroBatch]:
        """The step's micro-batches on the device.

        Args:
            on_batch: told of each batch, the seconds that it was waited for, and how many more are ready.
            seen: each batch is put here too.
        """
        assert self._stretch is not None
        for _ in range(self._stretch.phase.split.grad_accum):
            started_s = time.perf_counter()
            batch = self.take()
            on_batch(batch, time.perf_counter() - started_s, self._loader.ready)
            seen.append(batch)
            yield self._on_device(batch)

    def take(self) -> TrainBatch:
        """The next micro-batch, as it comes from the loader."""
        return next(self._loader)

    def close(self) -> None:
        """End the loader; the next step opens another one."""
        if self._stretch is not None:
            self._loader.close()
            self._stretch = None

    def _on_device(self, batch: TrainBatch) -> tuple[Tensor, Targets]:
        device = self._ranks.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        images, found = self._augmentation.apply(images, labels, batch.drawn)
        targets = Targets(*found) if isinstance(found, MixedLabels) else Targets(found)
        if self._teacher is not None:
            targets = targets._replace(teacher_logits=self._teacher.logits(images))
        assert self._stretch is not None
        split = self._stretch.phase.split
        if split.padding:
            # Over equal micro-batches this makes the mean that of the images, whatever each rank has of them.
            weights = batch.valid.to(device, non_blocking=True) * (split.places / split.global_batch)
            targets = targets._replace(image_weights=weights)
        return images, targets
