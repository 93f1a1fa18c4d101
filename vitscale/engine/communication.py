"""What the collectives of a step carry and how long it stands in them, whoever calls them.

Every Python collective of torch.distributed, DeepSpeed's and `Ranks`' alike, goes through a method of ProcessGroup
and, unless it is asynchronous, straight on through `Work.wait`; these are the doors that are watched. What C++ sends by
itself is not seen: the reducer of DistributedDataParallel, and collectives inside a compiled graph.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Method of ProcessGroup -> kind of collective. torch 2.14 renamed the single-tensor forms; all names are of use.
KINDS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "barrier": "barrier",
}
METHODS = {name: kind for name, kind in KINDS.items() if hasattr(dist.ProcessGroup, name)}


@dataclass
class Traffic:
    """What one rank's collectives of one kind carried."""

    calls: int = 0
    payload_bytes: int = 0
    """Bytes of the whole tensor each call works on: what is reduced or broadcast, all ranks' parts of a gather."""
    wire_bytes: float = 0.0
    """Bytes that the rank sends in a ring of N: payload x 2 (N - 1) / N of an all-reduce, (N - 1) / N of the others."""


@dataclass
class CommunicationRecord:
    """The collectives that this rank took part in while it was recorded."""

    by_kind: dict[str, Traffic] = field(default_factory=dict)
    """Traffic by kind of collective, of those that occurred."""
    _host_s: float = 0.0
    _spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def payload_bytes(self) -> int:
        """Sum over the kinds."""
        return sum(traffic.payload_bytes for traffic in self.by_kind.values())

    @property
    def wire_bytes(self) -> float:
        """Sum over the kinds."""
        return sum(traffic.wire_bytes for traffic in self.by_kind.values())

    def seconds(self) -> float:
        """Time that the rank stood in collectives or waited for them; waits for the device if they ran there.

        That is the host's time for tensors on the CPU and the current stream's for those on a GPU. Where
        collectives are overlapped they have a stream of their own, and its time may be hidden behind computation.
        """
        for start, end in self._spans:
            end.synchronize()
            self._host_s += start.elapsed_time(end) / 1e3
        self._spans.clear()
        return self._host_s

    def _count(self, kind: str, payload_bytes: int, world_size: int) -> None:
        traffic = self.by_kind.setdefault(kind, Traffic())
        traffic.calls += 1
        traffic.payload_bytes += payload_bytes
        share = (world_size - 1) / world_size
        traffic.wire_bytes += payload_bytes * share * (2 if kind == "all_reduce" else 1)


_active: list[CommunicationRecord] = []
_doors: dict[tuple[type, str], Any] = {}


@contextmanager
def record_communication() -> Iterator[CommunicationRecord]:
    """Record the collectives of this process while the block runs; blocks may be nested.

    ProcessGroup and Work are patched for as long as a block runs and are restored by the last one's end.
    """
    record = CommunicationRecord()
    if not _active:
        _watch()
    _active.append(record)
    try:
        yield record
    finally:
        _active[:] = [other for other in _active if other is not record]
        if not _active:
            _restore()


def _watch() -> None:
    on_device: set[int] = set()  # works whose tensors lie on a GPU, by id
    for name, kind in METHODS.items():
        _replace(dist.ProcessGroup, name, _watched_call(getattr(dist.ProcessGroup, name), kind, on_device))
    _replace(dist.Work, "wait", _watched_wait(dist.Work.wait, on_device))


def _replace(owner: type, name: str, method: Callable[..., Any]) -> None:
    _doors[owner, name] = vars(owner)[name]  # getattr would give the function without what binds it to an instance
    setattr(owner, name, method)


def _restore() -> None:
    for (owner, name), original in _doors.items():
        setattr(owner, name, original)
    _doors.clear()


def _watched_call(original: Callable[..., Any], kind: str, on_device: set[int]) -> Callable[..., Any]:
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [_tensors(value) for value in (*args, *kwargs.values())]
        tensors = [found for found in tensors if found]
        # Outputs and inputs of gathers and scatters: the larger side is the whole.
        payload_bytes = max((sum(t.nbytes for t in found) for found in tensors), default=0)
        for record in _active:
            record._count(kind, payload_bytes, group.size())
        cuda = bool(tensors) and tensors[0][0].is_cuda
        work = _timed(cuda, original, group, *args, **kwargs)
        (on_device.add if cuda else on_device.discard)(id(work))
        return work

    return call


def _watched_wait(original: Callable[..., Any], on_device: set[int]) -> Callable[..., Any]:
    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        return _timed(id(work) in on_device, original, work, *args, **kwargs)

    return wait


def _timed(cuda: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        result = function(*args, **kwargs)
        end.record()
        for record in _active:
            record._spans.append((start, end))
        return result
    started_s = time.perf_counter()
    result = function(*args, **kwargs)
    for record in _active:
        record._host_s += time.perf_counter() - started_s
    return result


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a collective's argument: a tensor, a sequence, or a sequence of sequences."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
