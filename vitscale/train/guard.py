"""What keeps a run from harm: updates that are not made, and the verdict that it has diverged.

A gradient that is not finite, or far larger than usual, moves the weights for good; skipped in time it costs one step.
Many in a row say that the weights themselves are lost: then the run goes back to its newest checkpoint and takes other
data first (Chowdhery et al. 2022, PaLM, section 5.1, but no sample is left out), or stops with a report.
"""

import json
import math
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitscale.config import GuardSection
from vitscale.telemetry import RunningMean

REMEMBERED_STEPS = 200


@dataclass
class _Step:
    step: int
    grad_norm: float
    skipped: bool
    loss: float | None = None


class StepGuard:
    """Judges every update and every recorded loss; equal on all ranks, because what it is told is."""

    def __init__(self, section: GuardSection, state: dict[str, Any] | None = None) -> None:
        """Start anew, or where `state()` left off.

        Args:
            section: of the config.
            state: what a checkpoint has of it.
        """
        self._norm_factor, self._loss_factor = section.norm_factor, section.loss_factor
        self._window_steps, self._patience_steps = section.window_steps, section.patience_steps
        self._last: deque[_Step] = deque(maxlen=REMEMBERED_STEPS)
        self._step = 0
        self.restore(state or {})

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the means and counts of a checkpoint; what is remembered for a report stays."""
        self._norm = RunningMean(self._window_steps, *state.get("norm", ()))
        self._loss = RunningMean(self._window_steps, *state.get("loss", ()))
        self.skipped: int = state.get("skipped", 0)
        """Updates skipped since the run began."""
        self.spikes: int = state.get("spikes", 0)
        """Those among them whose gradient was finite, but too large."""
        self.streak: int = state.get("streak", 0)
        """Updates skipped since the last one that was made."""

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        means = {"norm": self._norm, "loss": self._loss}
        counted = {name: [mean.count, mean.total] for name, mean in means.items()}
        return {**counted, "skipped": self.skipped, "spikes": self.spikes, "streak": self.streak}

    def begin(self, step: int) -> None:
        """Name the step that is about to be judged."""
        self._step = step

    def accept(self, grad_norm: float) -> bool:
        """Whether to make the update of this step, given the global gradient norm before clipping."""
        factor, mean = self._norm_factor, self._norm
        limit = math.inf
        if factor is not None and mean.warm:
            limit = factor * mean.value
        accepted = math.isfinite(grad_norm) and grad_norm <= limit
        if accepted:
            self._norm = mean.with_value(grad_norm)
            self.streak = 0
        else:
            self.skipped += 1
            self.spikes += math.isfinite(grad_norm)
            self.streak += 1
        self._last.append(_Step(self._step, grad_norm, not accepted))
        return accepted

    def record(self, loss: float) -> str | None:
        """Take the mean loss of the step just done; why the run has diverged, if this says so."""
        if self._last:
            self._last[-1].loss = loss
        factor, mean = self._loss_factor, self._loss
        if factor is not None and mean.warm and loss > factor * mean.value:
            return f"loss {loss:.4g} is over {factor:g} times its running mean {mean.value:.4g}"
        if math.isfinite(loss):
            self._loss = mean.with_value(loss)
        elif not self.streak:
            return f"the loss is {loss}, and its gradient is finite"
        return None

    def diverged(self, *, at_end: bool = False) -> str | None:
        """Why the run has diverged, if too many updates in a row were skipped: at the run's end, more than one."""
        if self.streak < (min(2, self._patience_steps) if at_end else self._patience_steps):
            return None
        norm = self._last[-1].grad_norm
        how = f"has a norm of {norm:.4g}" if math.isfinite(norm) else "is not finite"  # DeepSpeed calls NaN infinite
        return f"{self.streak} updates in a row were skipped, the last one's gradient {how}"

    def write_report(self, path: Path, why: str, more: dict[str, Any]) -> None:
        """Write what is known of the last steps as JSON, for a person."""
        means = {"grad_norm": self._norm, "loss": self._loss}
        usual = {name: mean.value if mean.count else None for name, mean in means.items()}
        last = [{k: v if v is None or math.isfinite(v) else str(v) for k, v in asdict(s).items()} for s in self._last]
        path.write_text(json.dumps({"why": why, **more, "running_means": usual, "last_steps": last}, indent=1) + "\n")
