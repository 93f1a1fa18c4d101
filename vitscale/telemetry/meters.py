"""How fast a run is, and how near to what its devices can do."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, Self

from vitscale.telemetry import tags

# The first name that is part of the device's wins, so PCIe and NVL cards stand before the module they resemble.
# Data sheets that give only the rate with sparsity are halved.
PEAK_FLOPS_BF16: Mapping[str, float] = MappingProxyType(
    {
        "GB200": 2500e12,  # NVIDIA GB200 NVL72 data sheet: 360 PFLOPS with sparsity over 72 GPUs
        "B200": 2250e12,  # NVIDIA HGX B200 data sheet: 36 PFLOPS with sparsity over 8 GPUs
        "H200 NVL": 835.5e12,  # NVIDIA H200 data sheet: 1,671 TFLOPS with sparsity
        "H200": 989e12,  # NVIDIA H200 data sheet, SXM: 1,979 TFLOPS with sparsity; GH200 holds the same chip
        "H100 PCIe": 756e12,  # NVIDIA H100 data sheet, PCIe: 1,513 TFLOPS with sparsity
        "H100 NVL": 835.5e12,  # NVIDIA H100 NVL data sheet: 1,671 TFLOPS with sparsity
        "H100": 989e12,  # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity
        "A100": 312e12,  # NVIDIA A100 data sheet, SXM and PCIe alike
        "L40S": 362e12,  # NVIDIA L40S data sheet
        "MI300X": 1307e12,  # AMD Instinct MI300X data sheet
    }
)
"""Dense bf16 matrix rate of a device, in floating-point operations a second, by a part of its name."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, by the name torch gives it; None for a device not in the table."""
    return next((peak for part, peak in PEAK_FLOPS_BF16.items() if part in device_name), None)


class PartTimes(Protocol):
    """What the parts of one step took on this rank; reading may wait for the device. The parts do not overlap."""

    @property
    def forward_s(self) -> float:
        """Forward passes, without what they waited in collectives."""

    @property
    def backward_s(self) -> float:
        """Backward passes, without what they waited in collectives."""

    @property
    def optimizer_s(self) -> float:
        """Clipping and the optimizer's update, without what they waited in collectives."""

    @property
    def communication_s(self) -> float:
        """Collectives, and the wait for other ranks in them."""


@dataclass(frozen=True)
class Interval:
    """What one rank measured between two records (at least one step)."""

    steps: int
    images: int
    """Of all ranks together."""
    wall_s: float
    """From record to record, without pauses."""
    pause_s: float
    parts_s: Mapping[str, float]
    """Time of each part of a step, by the tag of its fraction."""
    model_flops: float
    executed_flops: float | None
    """None where it was not known for some of the images."""
    batches: int
    ready: int
    read_bytes: int
    read_amplification: float | None

    @property
    def own_step_s(self) -> float:
        """What a step took this rank itself: not the wait for others, nor for a checkpoint.

        All ranks' steps take the same time, because each waits for the slowest in the collectives.
        """
        waits = self.parts_s[tags.PERF_COMMUNICATION_FRACTION] + self.parts_s[tags.PERF_CHECKPOINT_FRACTION]
        return max(self.wall_s - waits, 0.0) / self.steps

    def metrics(self, parts_s: Mapping[str, float], peak_flops: float | None) -> dict[str, float]:
        """Metrics by tag.

        The model FLOPs utilization follows Chowdhery et al. 2022 (PaLM, appendix B): the FLOPs of the model,
        not those executed, over the peak. Both utilizations are left out where the peak is not known.

        Args:
            parts_s: as in this interval, or their means over ranks.
            peak_flops: peak rate of all devices of the run together, in FLOP/s; None where it is not known.
        """
        scalars = {
            tags.PERF_IMAGES_PER_S: self.images / self.wall_s,
            tags.PERF_STEP_TIME_S: self.wall_s / self.steps,
        }
        if peak_flops is not None:
            scalars[tags.PERF_MFU] = self.model_flops / self.wall_s / peak_flops
            if self.executed_flops is not None:
                scalars[tags.PERF_EXECUTED_MFU] = self.executed_flops / self.wall_s / peak_flops
        scalars |= {tag: time_s / self.wall_s for tag, time_s in parts_s.items()}
        scalars[tags.PERF_OTHER_FRACTION] = max(1.0 - sum(parts_s.values()) / self.wall_s, 0.0)
        if self.pause_s:
            scalars[tags.PERF_PAUSE_S] = self.pause_s
        if self.batches:
            scalars[tags.DATA_READY_BATCHES] = self.ready / self.batches
            scalars[tags.DATA_READ_BYTES_PER_S] = self.read_bytes / self.wall_s
        if self.read_amplification is not None:
            scalars[tags.DATA_READ_AMPLIFICATION] = self.read_amplification
        return scalars


PARTS = (
    tags.PERF_DATA_WAIT_FRACTION,
    tags.PERF_FORWARD_FRACTION,
    tags.PERF_BACKWARD_FRACTION,
    tags.PERF_OPTIMIZER_FRACTION,
    tags.PERF_COMMUNICATION_FRACTION,
    tags.PERF_CHECKPOINT_FRACTION,
)
"""The parts of a step, by the tags of their fractions; what is left over is PERF_OTHER_FRACTION."""


class StepMeter:
    """Adds up steps until they are taken. Nothing but `take` waits for the device.

    Rates are over the wall time between two `take`s: what a call took says nothing where a device works on its own.
    Call it only when the device has done the steps, right after a value of the last one was read.

    Args:
        flops_per_image: model FLOPs of training on one image, without recomputation.
        clock: seconds that only grow.
    """

    def __init__(self, *, flops_per_image: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start with no steps; the clock runs."""
        self._clock = clock
        self._model_flops_per_image, self._executed_flops_per_image = flops_per_image, math.nan
        self._read_bytes = self._used_bytes = self._told_bytes = 0
        self.begin()

    def begin(self) -> None:
        """Forget the steps so far and start the clock anew."""
        self._began_s = self._clock()
        self._steps = self._images = self._batches = self._ready = 0
        self._data_wait_s = self._wait_s = self._stall_s = self._pause_s = 0.0
        self._model_flops = self._executed_flops = 0.0
        self._times: list[PartTimes] = []

    def set_flops(self, *, model: float, executed: float | None) -> None:
        """What training on one image costs from now on, in FLOPs: of the model, and with what is recomputed or dropped.

        `executed` is None where it is not known.
        """
        self._model_flops_per_image = model
        self._executed_flops_per_image = math.nan if executed is None else executed

    def add_step(self, images: int, times: PartTimes | None = None) -> None:
        """Count a step over all its ranks' images; its times are read when the steps are taken."""
        self._steps += 1
        self._images += images
        self._model_flops += images * self._model_flops_per_image
        self._executed_flops += images * self._executed_flops_per_image
        if times is not None:
            self._times.append(times)

    def add_batch(self, wait_s: float, ready: int, read_bytes: int, used_bytes: int) -> None:
        """Count a micro-batch of this rank.

        Args:
            wait_s: time the rank waited for it.
            ready: micro-batches that were ready beside it.
            read_bytes: bytes that the rank's loader has read from shards since it began.
            used_bytes: bytes of samples among them.
        """
        self._data_wait_s += wait_s
        self._batches += 1
        self._ready += ready
        self._read_bytes, self._used_bytes = read_bytes, used_bytes

    def add_wait(self, wait_s: float) -> None:
        """Count time in collectives between steps, which is communication like that in them."""
        self._wait_s += wait_s

    def add_stall(self, stall_s: float) -> None:
        """Count time that the steps waited for a checkpoint."""
        self._stall_s += stall_s

    def add_pause(self, pause_s: float) -> None:
        """Count time that is not training's, such as a validation."""
        self._pause_s += pause_s

    def take(self) -> Interval:
        """What was measured since the last time, and start anew."""
        assert self._steps
        ended_s = self._clock()
        parts_s = (
            self._data_wait_s,
            sum(times.forward_s for times in self._times),
            sum(times.backward_s for times in self._times),
            sum(times.optimizer_s for times in self._times),
            sum(times.communication_s for times in self._times) + self._wait_s,
            self._stall_s,
        )
        interval = Interval(
            steps=self._steps,
            images=self._images,
            wall_s=ended_s - self._began_s - self._pause_s,
            pause_s=self._pause_s,
            parts_s=dict(zip(PARTS, parts_s, strict=True)),
            model_flops=self._model_flops,
            executed_flops=None if math.isnan(self._executed_flops) else self._executed_flops,
            batches=self._batches,
            ready=self._ready,
            read_bytes=self._read_bytes - self._told_bytes,
            read_amplification=self._read_bytes / self._used_bytes if self._used_bytes else None,
        )
        self._told_bytes = self._read_bytes
        self.begin()
        self._began_s = ended_s  # what telling it costs is the next interval's
        return interval


@dataclass(frozen=True)
class RunningMean:
    """Exponential mean over about `window` values, with the bias of its start taken out.

    The correction is Adam's (Kingma and Ba 2015, section 3): the mean of one value is that value.
    """

    window: int
    count: int = 0
    total: float = 0.0

    @classmethod
    def resumed(cls, window: int, count: int, value: float) -> Self:
        """The mean that so many values had led to."""
        return cls(window, count, value * (1 - (1 - 1 / window) ** count))

    @property
    def value(self) -> float:
        """The mean; NaN before the first value."""
        return self.total / (1 - (1 - 1 / self.window) ** self.count) if self.count else math.nan

    @property
    def warm(self) -> bool:
        """Whether it has seen a whole window."""
        return self.count >= self.window

    def with_value(self, value: float) -> Self:
        """The mean once `value` is in it."""
        return type(self)(self.window, self.count + 1, self.total + (value - self.total) / self.window)


def slowest_rank(own_step_s: Sequence[float]) -> dict[str, float]:
    """Which rank holds up the others, by tag: its number, its time a step, and by what share that is over the median.

    Args:
        own_step_s: of every rank what a step takes it, without the wait for others.
    """
    slowest = max(range(len(own_step_s)), key=own_step_s.__getitem__)
    median_s = statistics.median(own_step_s)
    return {
        tags.MACHINE_SLOWEST_RANK: slowest,
        tags.MACHINE_SLOWEST_RANK_STEP_S: own_step_s[slowest],
        tags.MACHINE_SLOWEST_RANK_LAG: own_step_s[slowest] / median_s - 1.0 if median_s else 0.0,
    }
