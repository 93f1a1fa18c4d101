"""Where a rank of the preflight is, how long it waits, and the report that it writes over as it comes on."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitscale.train.preflight.reports import RankReport, write_report


@dataclass(frozen=True)
class Limits:
    """The longest that a rank waits."""

    wait_s: float = 90.0
    """For ranks that have not come yet, once this node has looked at itself and its devices."""
    inspection_s: float = 100.0
    """For a node to look at itself; its checks end before."""
    device_s: float = 60.0
    """For a device to multiply."""
    pair_s: float = 15.0
    """For each step of one pair of nodes: to come, to find each other, to send."""
    all_ranks_s: float = 60.0
    """For each collective among all ranks, and until they have found each other."""
    total_s: float = 240.0
    """For everything after the meeting, whatever hangs; then the process ends itself."""

    @property
    def coming_s(self) -> float:
        """For another rank to come to the meeting: one that comes as late as it may has looked at its node before."""
        return self.inspection_s + self.device_s + self.wait_s


@dataclass(frozen=True)
class Seat:
    """Where a rank is."""

    node: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device


class Progress:
    """This rank's report, in the folder from the beginning, and what ends the process should a check hang."""

    def __init__(self, folder: Path, seat: Seat) -> None:
        """Write that the rank is there; raises OSError."""
        self.report = RankReport(seat.node, seat.rank, seat.local_rank, str(seat.device))
        self._folder = folder
        self._lock = threading.Lock()
        self.note()

    def note(self, **changes: Any) -> None:
        """Write down what is new; raises OSError."""
        with self._lock:
            self.report = replace(self.report, **changes)
            write_report(self._folder, self.report)

    @contextlib.contextmanager
    def bounded(self, limit_s: float) -> Iterator[None]:
        """Where what happens inside hangs, the process ends after so long: its report stays where it was then."""
        timer = threading.Timer(limit_s, os._exit, (0,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
