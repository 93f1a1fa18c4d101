"""Numbers that follow from a config, all computed here and nowhere else."""

import math
from dataclasses import dataclass

from vitscale.config.length import Length
from vitscale.config.schedule import BatchSection, PhaseSection, ScheduleSection
from vitscale.errors import ConfigError


@dataclass(frozen=True)
class BatchSplit:
    """How a step's images fall on ranks and micro-steps: world_size x micro_batch x grad_accum places.

    These are the global batch, or more where it is padded.
    """

    global_batch: int
    micro_batch: int
    grad_accum: int
    world_size: int

    @property
    def rank_batch(self) -> int:
        """Places of one rank in a step."""
        return self.micro_batch * self.grad_accum

    @property
    def places(self) -> int:
        """Places of all ranks in a step."""
        return self.world_size * self.rank_batch

    @property
    def padding(self) -> int:
        """Places of a step that hold no image: 0 but for `batch.pad`."""
        return self.places - self.global_batch


@dataclass(frozen=True)
class Phase:
    """Steps first_step to end_step - 1, which share one batch split and one input size."""

    first_step: int
    end_step: int
    first_image: int
    """Images seen before the first step."""
    split: BatchSplit
    img_size: int | None
    """Input in pixels; None for the model's own."""


@dataclass(frozen=True)
class Timeline:
    """The whole run in optimizer steps: its phases, one after the other, and its learning rate's lengths."""

    phases: tuple[Phase, ...]
    warmup_steps: int
    cooldown_steps: int
    timescale_steps: float | None

    @property
    def total_steps(self) -> int:
        """Length of the run."""
        return self.phases[-1].end_step

    def phase_at(self, step: int) -> Phase:
        """The phase that a step belongs to; beyond the run the last one."""
        return next((phase for phase in self.phases if step < phase.end_step), self.phases[-1])

    def images_at(self, step: int) -> int:
        """Images seen before a step."""
        phase = self.phase_at(step)
        return phase.first_image + (step - phase.first_step) * phase.split.global_batch


def split_batch(batch: BatchSection, world_size: int) -> BatchSplit:
    """Split the global batch over `world_size` ranks.

    A batch that does not divide is refused or, with `batch.pad`, padded: in as many micro-steps as hold it, each of the
    fewest pairs of images that do. A batch that divides is split alike either way.

    Raises:
        ConfigError: the global batch is no multiple of ranks x micro-batch; the message names the nearest
            global batches that are, and the micro-batches and ranks that fit the global batch as it stands.
    """
    unit = world_size * batch.micro_batch
    grad_accum = math.ceil(batch.global_batch / unit)
    if _divides(batch, world_size):
        return BatchSplit(batch.global_batch, batch.micro_batch, grad_accum, world_size)
    if not batch.pad:
        raise ConfigError(_refusal(batch, world_size))
    pairs = math.ceil(batch.global_batch / (2 * world_size * grad_accum))
    return BatchSplit(batch.global_batch, 2 * pairs, grad_accum, world_size)


def usable_ranks(schedule: ScheduleSection, batch: BatchSection, available: int, ranks_per_node: int = 1) -> int:
    """The most ranks, in whole nodes and at most `available`, on which the batch of every phase can run; 0 for none."""
    batches = phase_batches(schedule, batch)
    for ranks in range(available - available % ranks_per_node, 0, -ranks_per_node):
        if batch.pad or all(_divides(own, ranks) for own in batches):
            return ranks
    return 0


def phase_batches(schedule: ScheduleSection, batch: BatchSection) -> tuple[BatchSection, ...]:
    """The batch of each of `schedule.phases`, its own numbers or the run's where it has none, and last the run's."""
    return (*(_batch_of(phase, batch) for phase in schedule.phases), batch)


def _batch_of(phase: PhaseSection, batch: BatchSection) -> BatchSection:
    return BatchSection(
        global_batch=phase.global_batch or batch.global_batch,
        micro_batch=phase.micro_batch or batch.micro_batch,
        pad=batch.pad,
    )


def _divides(batch: BatchSection, world_size: int) -> bool:
    return batch.global_batch % (world_size * batch.micro_batch) == 0


def _refusal(batch: BatchSection, world_size: int) -> str:
    unit = world_size * batch.micro_batch
    below, above = batch.global_batch // unit * unit, -(-batch.global_batch // unit) * unit
    nearest = " or ".join(str(b) for b in (below, above) if b)
    per_rank, rest = divmod(batch.global_batch, world_size)
    fitting = [] if rest else [m for m in range(2, per_rank + 1, 2) if per_rank % m == 0]
    by_distance = sorted(fitting, key=lambda m: abs(m - batch.micro_batch))[:2]
    or_micro = f", batch.micro_batch={' or '.join(map(str, sorted(by_distance)))}" if fitting else ""
    ranks = [r for r in range(1, batch.global_batch // batch.micro_batch + 1) if _divides(batch, r)]
    around = [*[r for r in ranks if r < world_size][-1:], *[r for r in ranks if r > world_size][:1]]
    or_ranks = f", {' or '.join(map(str, around))} ranks" if around else ""
    return (
        f"batch.global_batch {batch.global_batch} is not {world_size} ranks x batch.micro_batch "
        f"{batch.micro_batch} x a whole number: use batch.global_batch={nearest}{or_micro}{or_ranks}, or batch.pad=true"
    )


def lay_out(schedule: ScheduleSection, batch: BatchSection, world_size: int, epoch_images: int) -> Timeline:
    """The run in steps. Lengths in images or epochs are covered by the fewest steps; percent is of the run's length.

    Args:
        schedule, batch: of the config.
        world_size: number of ranks.
        epoch_images: images of one pass over the training data.

    Raises:
        ConfigError: a phase has no step, a batch does not split, or warm-up and cool-down leave nothing between them.
    """
    phases: list[Phase] = []
    step = image = 0
    batches = phase_batches(schedule, batch)
    for index, (phase, own) in enumerate(zip(schedule.phases, batches, strict=False)):
        split = split_batch(own, world_size)
        end_step = _end_step(phase.until, schedule.length, step, image, split.global_batch, epoch_images)
        if end_step <= step:
            raise ConfigError(
                f"schedule.phases[{index}].until {phase.until} is no later than where the phase begins "
                f"(step {step}): put the phases in order, or remove it"
            )
        phases.append(Phase(step, end_step, image, split, phase.img_size))
        image += (end_step - step) * split.global_batch
        step = end_step
    split = split_batch(batch, world_size)
    end_step = _end_step(schedule.length, schedule.length, step, image, split.global_batch, epoch_images)
    if end_step <= step:
        raise ConfigError(
            f"schedule.phases end at step {step}, schedule.length {schedule.length} at step {max(end_step, 0)}: "
            "the last phase must end before the run"
        )
    phases.append(Phase(step, end_step, image, split, None))
    return _with_rate_lengths(tuple(phases), schedule, epoch_images)


def _end_step(until: Length, whole: Length, step: int, image: int, global_batch: int, epoch_images: int) -> int:
    """The step at which `until` is reached, by steps of `global_batch` images that go on from `step` and `image`."""
    amount, unit = until.amount, until.unit
    if unit == "percent":
        amount, unit = amount / 100 * whole.amount, whole.unit
    if unit == "steps":
        return round(amount)
    images = amount * epoch_images if unit == "epochs" else amount
    return step + math.ceil((images - image) / global_batch)


def _with_rate_lengths(phases: tuple[Phase, ...], schedule: ScheduleSection, epoch_images: int) -> Timeline:
    total, first, last = phases[-1].end_step, phases[0].split.global_batch, phases[-1].split.global_batch

    def steps(length: Length, global_batch: int) -> float:
        match length.unit:
            case "steps":
                return length.amount
            case "percent":
                return length.amount / 100 * total
            case "images":
                return length.amount / global_batch
            case "epochs":
                return length.amount * epoch_images / global_batch

    warmup, cooldown = round(steps(schedule.warmup, first)), round(steps(schedule.cooldown, last))
    if warmup + cooldown >= total:
        parts = f"schedule.warmup {warmup}" + (f" with schedule.cooldown {cooldown}" if cooldown else "")
        together = " together" if cooldown else ""
        raise ConfigError(f"{parts} leaves nothing of the run's {total} steps: use at most {total - 1}{together}")
    timescale = steps(schedule.timescale, last) if schedule.timescale is not None else None
    return Timeline(phases, warmup, cooldown, timescale)
