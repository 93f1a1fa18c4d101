"""Bytes of weights, gradients and optimizer state on one rank, as DeepSpeed 0.19.8 allocates them.

With P parameters on N ranks, p = P / N, e bytes an element in forward and backward (bf16 2, fp32 4) and a bucket of
b bytes, AdamW under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) takes

    stage 0 (fp32)  eP weights, 8P moments; eP gradients; to reduce them a copy of up to 5e8 elements
    stage 1         eP weights, 4p master weights, 8p moments; eP gradients during backward, b and ep to reduce them
    stage 2         the same, but ep gradients; 2ep where micro-steps accumulate, and two b to reduce them
    stage 3         ep weights, 4p, 8p, ep gradients, b, the small parameters whole; and what is gathered at a time: the
                    live parameters, and twice what is fetched
    each update     4p fp32 gradients, in bf16 ep more while they are converted

Read from stage_1_and_2.py and stage3.py of the wheel and counted in tests/distributed/test_distributed_memory.py.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from vitscale.engine import Precision
from vitscale.planning.updates import ADAMW, FP32_BYTES, UpdateBytes

ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
_ALL_REDUCE_ELEMENTS = 500_000_000  # DeepSpeed's, without ZeRO; no key sets it
_ALIGNMENT = 2  # elements a rank, to which a flat group is padded

Groups = Sequence[Sequence[int]]
"""Elements of each parameter, by optimizer group, in the optimizer's order."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank's device; activations and what no tensor accounts for come on top."""

    weights: int
    """What forward and backward multiply; at stage 3 this rank's part of it and the small ones whole."""
    master: int
    """fp32 weights that are updated, where they are a copy."""
    moments: int
    """All that the optimizer keeps."""
    average: int
    """The weights' moving average."""
    gradients: int
    """The most of them that is held in backward; at stage 1 all of the model's."""
    reduced: int
    """What is left of them between the last backward and the update: this rank's."""
    gradients_stay: bool
    """Whether they have a place of their own for good (stage 3), or come and go."""
    buffers: int
    """What DeepSpeed allocates for good beside these: a bucket at stage 3."""
    carried: int
    """Gradients of earlier micro-steps, when the last one begins."""
    bucket: int
    """What gradients are collected in, from the first backward on (stage 1) or during each (stage 2)."""
    flight: int
    """The largest gradient on its way from backward to where gradients are kept."""
    reducing: int
    """Beyond what is resident, at the height of the last reduction of gradients, near the end of backward."""
    update: int
    """Beyond what is resident and the gradients, while the optimizer steps."""
    gathered: int
    """Of other ranks' weights at a time, at stage 3; a bound."""
    host: int
    """In the host's memory, by offload."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state: what is usually called the state."""
        return self.weights + self.master + self.moments + self.average + self.gradients

    @property
    def resident(self) -> int:
        """What is there between two steps."""
        return self.total + self.buffers - (0 if self.gradients_stay else self.gradients)

    @property
    def stepping(self) -> int:
        """Beyond what is resident, at the height of the update."""
        return self.update + (0 if self.gradients_stay else self.reduced)

    def peak(self, activations: int) -> int:
        """The most that is allocated within a step whose forward leaves `activations` bytes for its backward."""
        backward = self.carried + self.bucket + self.flight + self.gathered + activations
        return self.resident + max(backward, self.gathered + self.reducing, self.stepping)


@dataclass(frozen=True)
class _Setting:
    """What the sums below are made of."""

    groups: Groups
    world_size: int
    rank: int | None
    zero: Mapping[str, Any]
    element: int
    accumulates: bool
    update: UpdateBytes
    average: bool

    @property
    def parameters(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        return max(max(group) for group in self.groups if group)

    @property
    def flight(self) -> int:
        """Bytes of the largest gradient."""
        return self.element * self.largest

    @property
    def bucket_elements(self) -> int:
        return int(self.zero["reduce_bucket_size"])

    @property
    def bucket(self) -> int:
        """Bytes of the buffers that gradients are collected in."""
        return self.element * self.bucket_elements * (2 if self.zero["overlap_comm"] else 1)

    @property
    def reduced(self) -> int:
        """Bytes of what is reduced at a time, which is a copy of a bucket, or of a parameter that fits none."""
        return self.element * max(min(self.bucket_elements, self.parameters), self.largest)

    @property
    def offloads(self) -> bool:
        return bool(self.zero["offload_optimizer"]["device"] == "cpu")

    def kept(self, partition: int) -> int:
        """Bytes of the optimizer's state for `partition` elements."""
        return self.update.element * partition + self.update.whole + FP32_BYTES * self.update.plain // self.world_size

    def scratch(self, partition: int, piece: int) -> int:
        """Bytes that the optimizer needs to update `partition` elements, the largest parameter's among them `piece`."""
        return self.update.scratch * partition + self.update.piece * piece

    def conversion(self, partition: int, piece: int) -> int:
        """Bytes to bring the gradients of `partition` elements to fp32 and apply them."""
        copied = self.element * partition if self.element < FP32_BYTES else 0
        return FP32_BYTES * partition + max(copied, self.scratch(partition, piece))


def state_bytes(
    groups: Groups,
    *,
    world_size: int,
    zero: Mapping[str, Any],
    precision: Precision,
    update: UpdateBytes = ADAMW,
    accumulates: bool = False,
    average: bool = False,
    rank: int | None = None,
) -> StateBytes:
    """State of one rank under DeepSpeed.

    Args:
        groups: the model's parameters.
        world_size: number of ranks.
        zero: `zero_optimization` of the rendered DeepSpeed config.
        precision: of forward and backward.
        update: the optimizer's; AdamW where left out.
        accumulates: whether a step has several micro-steps.
        average: whether a moving average of the weights is kept.
        rank: whose state; the fullest one's where left out.
    """
    setting = _Setting(groups, world_size, rank, zero, ELEMENT_BYTES[precision], accumulates, update, average)
    if zero["stage"] == 0:
        return _replicated(setting)
    return _stage_3(setting) if zero["stage"] == 3 else _stages_1_and_2(setting)


def _replicated(s: _Setting) -> StateBytes:
    parameters = s.parameters
    weights = gradients = s.element * parameters
    average, moments = FP32_BYTES * parameters * s.average, s.kept(parameters)
    copied = s.element * min(parameters, _ALL_REDUCE_ELEMENTS)
    return StateBytes(
        weights=weights, master=0, moments=moments, average=average,
        gradients=gradients, reduced=gradients, gradients_stay=False, buffers=0,
        carried=gradients if s.accumulates else 0, bucket=0, flight=s.flight,
        reducing=gradients + copied,
        update=s.scratch(parameters, s.largest),
        gathered=0, host=0,
    )  # fmt: skip


def _stages_1_and_2(s: _Setting) -> StateBytes:
    unit = _ALIGNMENT * s.world_size
    padded = [math.ceil(sum(group) / unit) * unit for group in s.groups]
    partition, largest_group = sum(padded) // s.world_size, max(padded) // s.world_size
    weights = s.element * sum(padded)
    owned, late = (s.element * elements for elements in _owned_elements(s, padded))
    master, average = FP32_BYTES * partition, FP32_BYTES * partition * s.average
    moments, update = s.kept(partition), s.conversion(largest_group, min(s.largest, largest_group))
    whole, host, buffers = s.element * s.parameters, 0, 0
    if s.offloads:
        # On the host also fp32 gradients for good, the updated weights in the forward's dtype, what stage 2
        # accumulates, and one parameter's gradient on its way; that one on the device as well.
        buffers = s.flight
        host = master + moments + average + (FP32_BYTES + s.element) * partition + buffers
        host += owned if s.zero["stage"] == 2 and s.accumulates else 0
        master = moments = average = owned = update = 0
    if s.zero["stage"] == 1:
        carried = whole if s.accumulates else 0
        gradients, reducing = whole, whole + s.bucket + (0 if s.offloads else max(late, 0))
    else:
        carried = owned if s.accumulates else 0
        gradients = carried + owned
        reducing = gradients + s.bucket + s.reduced + s.flight
    return StateBytes(
        weights=weights, master=master, moments=moments, average=average,
        gradients=gradients, reduced=owned, gradients_stay=False, buffers=buffers,
        carried=carried, bucket=s.bucket, flight=s.flight, reducing=reducing, update=update, gathered=0, host=host,
    )  # fmt: skip


def _stage_3(s: _Setting) -> StateBytes:
    sizes = [size for group in s.groups for size in group]
    partition = sum(math.ceil(size / s.world_size) for size in sizes)
    pieces = max(sum(math.ceil(size / s.world_size) for size in group) for group in s.groups)
    alone = s.world_size == 1  # a partition is then the parameter itself
    whole = 0 if alone else sum(size for size in sizes if size <= s.zero["stage3_param_persistence_threshold"])
    hpz = s.zero["zero_hpz_partition_size"]
    second = s.element * math.ceil(s.parameters / hpz) if hpz > 1 else 0
    weights, gradients = s.element * (partition + whole) + second, s.element * partition
    master, average = FP32_BYTES * partition, FP32_BYTES * partition * s.average
    moments = s.kept(partition)
    # What may stay, and twice (a copy puts the ranks' pieces in order) what is prefetched and used, which overshoot by
    # a parameter.
    live = min(s.parameters - whole, s.zero["stage3_max_live_parameters"])
    ahead = min(s.parameters - whole, s.zero["stage3_prefetch_bucket_size"])
    gathered = 0 if alone else s.element * (live + 2 * ahead + 3 * s.largest)
    update = s.conversion(min(pieces, s.zero["sub_group_size"]), math.ceil(s.largest / s.world_size))
    host = 0
    if s.offloads:
        host = master + moments + average + FP32_BYTES * partition + gradients
        master = moments = average = gradients = update = 0
        if s.zero["offload_param"]["device"] == "cpu":
            host, weights = host + s.element * partition, weights - s.element * partition
    return StateBytes(
        weights=weights, master=master, moments=moments, average=average,
        gradients=gradients, reduced=gradients, gradients_stay=True, buffers=s.element * s.bucket_elements,
        carried=0, bucket=0, flight=s.flight, reducing=s.flight + s.reduced * (2 if alone else 1),
        update=update, gathered=gathered, host=host,
    )  # fmt: skip


def _owned_elements(s: _Setting, padded: Sequence[int]) -> tuple[int, int]:
    """Elements of the parameters that lie in a rank's partition, those that straddle its ends counted whole; and how
    many these are beyond what other ranks' parameters have left free by the time that they are reduced (stage 1)."""
    ends = [list(accumulate(group)) for group in s.groups]

    def owned(rank: int) -> int:
        total = 0
        for group, group_ends, whole in zip(s.groups, ends, padded, strict=True):
            first = bisect_right(group_ends, rank * whole // s.world_size)
            last = bisect_left(group_ends, (rank + 1) * whole // s.world_size)
            total += sum(group[first : last + 1])
        return total

    elements = {rank: owned(rank) for rank in (range(s.world_size) if s.rank is None else (s.rank,))}
    # Overlapped, they are reduced as backward makes them: the last first.
    before = {rank: s.world_size - 1 - rank if s.zero["overlap_comm"] else rank for rank in elements}
    late = max(count - before[rank] * padded[0] // s.world_size for rank, count in elements.items())
    return max(elements.values()), late
