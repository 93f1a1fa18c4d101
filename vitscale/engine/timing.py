"""How long each part of a step takes, on the clock of the device that does the work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from vitscale.engine.communication import CommunicationRecord, record_communication

Phase = Literal["forward", "backward", "optimizer"]
Mark = float | torch.cuda.Event


class _Span(NamedTuple):
    phase: Phase
    start: Mark
    end: Mark
    communication: CommunicationRecord


class StepTimes:
    """Seconds of a step's parts on this rank; no two of them share any time.

    Reading them waits for the device, so they are read when the loss is. Collectives in C++, those of
    `DistributedDataParallel` and of compiled graphs, count where they occur and not as communication; those that
    overlap with computation count as communication only.
    """

    def __init__(self, spans: list[_Span]) -> None:
        self._spans = spans

    @property
    def forward_s(self) -> float:
        """Model and loss."""
        return self._computing("forward")

    @property
    def backward_s(self) -> float:
        """Gradients, down to their place in the rank's partition."""
        return self._computing("backward")

    @property
    def optimizer_s(self) -> float:
        """Gradient norm, clipping, update, and the weights that forward uses."""
        return self._computing("optimizer")

    @property
    def communication_s(self) -> float:
        """What the rank stood in collectives, or waited for them, in any of the three."""
        return sum(span.communication.seconds() for span in self._spans)

    def _computing(self, phase: Phase) -> float:
        spans = [span for span in self._spans if span.phase == phase]
        elapsed_s = sum(_between(span.start, span.end) for span in spans)
        return max(0.0, elapsed_s - sum(span.communication.seconds() for span in spans))


class StepClock:
    """Takes a step's times: without waiting, by events on the current stream, where the device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[_Span] = []

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count what the block does as a part of the phase."""
        start = self._mark()
        with record_communication() as communication:
            yield
        self._spans.append(_Span(phase, start, self._mark(), communication))

    def times(self) -> StepTimes:
        """Of the phases so far."""
        return StepTimes(self._spans)

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms / 1e3
