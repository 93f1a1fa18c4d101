"""A trace of some steps by torch's profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

import logging
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from vitscale.config import ProfileSection
from vitscale.ranks.groups import Ranks

log = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps that the config names, on the ranks that it names; elsewhere it only compares two numbers.

    The step before them is traced too and thrown away, because a profiler's first step pays for its start. It
    writes RUN/profile/trace-rank0-step10-12.json.gz; a trace that cannot be written is a warning.
    """

    def __init__(self, config: ProfileSection, ranks: Ranks, run_dir: Path) -> None:
        """Plan the trace; nothing is started yet."""
        self._profiler: profile | None = None
        self._device = ranks.device
        self._first, self._last = config.steps if config.steps and ranks.rank in config.ranks else (0, -1)
        name = f"trace-rank{ranks.rank}-step{self._first}-{self._last}.json.gz"
        self._file = run_dir / "profile" / name

    def before(self, step: int) -> None:
        """Call right before a step; steps count from 1."""
        starts = max(self._first - 1, 1)
        # A resume in the middle of the steps traces what is left of them.
        if self._profiler is None and starts <= step <= self._last:
            self._start(warmup_steps=max(self._first - step, 0), steps=self._last - max(step, self._first) + 1)

    def after(self, step: int) -> None:
        """Call right after the step."""
        if self._profiler is None:
            return
        if step >= self._last and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # else the trace ends before the kernels of the last step
        self._profiler.step()
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """End a trace that is under way; it is written with the steps it has."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            self._first, self._last = 0, -1

    def _start(self, warmup_steps: int, steps: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the first step of a run has none before it
            plan = schedule(wait=0, warmup=warmup_steps, active=steps, repeat=1)
        self._profiler = profile(
            activities=activities,
            schedule=plan,
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.start()

    def _write(self, profiler: profile) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._file))
            log.info("trace of steps %d to %d: %s", self._first, self._last, self._file)
        except (OSError, RuntimeError) as error:
            log.warning("%s: the trace cannot be written, the run goes on: %s", self._file, error)
