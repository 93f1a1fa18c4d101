"""The base optimizer's step, which may be refused, measured and averaged, whoever calls it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vitscale.engine.averaging import WeightAverage
from vitscale.engine.norms import PartNorms
from vitscale.engine.protocol import Accept
from vitscale.optim import Flat


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate, times its own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@dataclass
class _Request:
    """What is asked of one step."""

    accept: Accept | None = None
    measure: bool = False
    accepted: bool | None = None
    """The verdict; None before the optimizer's step is reached."""


class GuardedUpdate:
    """Stands in for an optimizer's `step` between `begin` and `end` of each of the trainer's steps.

    DeepSpeed calls it once a parameter group (stages 1 and 2) or sub-group (3), after it has the global norm; the
    question whether to go on is put once. Refused, the optimizer is not called: weights, moments and counts stay.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        flats: Sequence[Flat],
        *,
        grad_norm: Callable[[], Tensor | float],
        clip_norm: float | None,
        group: ProcessGroup | None,
        device: torch.device,
        average: WeightAverage | None,
    ) -> None:
        """Take the place of `optimizer.step`.

        Args:
            optimizer: whose step it is.
            flats: what it updates.
            grad_norm: the global norm before clipping, known by the time of the step.
            clip_norm: to which the gradients are clipped by then.
            group: the ranks among which `flats` are partitioned; None where each has them whole.
            device: of the model.
            average: follows each update.
        """
        self._optimizer = optimizer
        self._apply = optimizer.step
        optimizer.step = self.step  # type: ignore[method-assign, assignment]
        self._grad_norm = grad_norm
        self._clip_norm = clip_norm
        self._norms = PartNorms(flats, group, device)
        self._average = average
        self._request = _Request()
        self.count = 0
        """Updates of the run that were made."""

    def begin(self, accept: Accept | None, measure: bool) -> None:
        """Say what is asked of the coming step."""
        self._request = _Request(accept, measure)

    def step(self, closure: None = None) -> None:
        """In place of the optimizer's."""
        request = self._request
        if request.accepted is None:
            request.accepted = self._judge()
        measured = self._measured() if request.measure else []
        if measured:
            self._norms.before(measured, self._clipped_by())
        if request.accepted:
            self._apply()
        self._norms.after(measured)

    def end(self) -> tuple[bool, dict[str, Tensor] | None]:
        """Whether the update was left out, and the norms by part if they were asked for and could be taken."""
        request = self._request
        norms = None
        if request.accepted is None:
            # DeepSpeed has left out a gradient that is not finite, without a step; who guards the run is told.
            self._judge()
        elif request.measure:
            norms = self._norms.read()
        if request.accepted:
            self.count += 1
            if self._average is not None:
                self._average.update(self.count)
        return not request.accepted, norms

    def _judge(self) -> bool:
        """The verdict; the host waits for the norm where there is somebody to ask, and only then."""
        accept = self._request.accept
        if accept is None:
            return True
        norm = float(self._grad_norm())
        return accept(norm) and math.isfinite(norm)

    def _measured(self) -> list[Tensor]:
        groups = self._optimizer.param_groups
        return [tensor for group in groups for tensor in group["params"] if tensor.grad is not None]

    def _clipped_by(self) -> Tensor:
        """What the gradients have been divided by, as DeepSpeed and torch compute it."""
        norm = torch.as_tensor(self._grad_norm())
        return torch.ones_like(norm) if self._clip_norm is None else ((norm + 1e-6) / self._clip_norm).clamp(min=1.0)
