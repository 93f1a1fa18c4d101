"""What the trainer asks of an engine, whatever executes the step."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from vitscale.engine.timing import StepTimes
from vitscale.losses import Targets

LossFn = Callable[[Tensor | tuple[Tensor, Tensor], Tensor | Targets], Tensor]
"""(what the model gives in training: logits, or those of both heads of a distilled one; targets) -> scalar."""
MicroBatch = tuple[Tensor, Tensor | Targets]
"""Images [B, C, H, W] (float), and labels [B] (int64) or `Targets`, on the engine's device."""

Accept = Callable[[float], bool]
"""Global gradient norm before clipping, the same on every rank -> whether to make the update."""

MASTER = "master"
"""Key of the fp32 weights among a fragment's values."""
AVERAGE = "ema"
"""Key of the weights' moving average; the keys beside the two are the optimizer's own."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; reading a value as a number waits for the device."""

    loss: Tensor
    """Mean loss over this rank's micro-batches, a detached scalar; the mean over ranks is that over the images."""
    grad_norm: Tensor | float
    """Global norm of the mean gradient before clipping."""
    skipped: bool
    """Whether the update was left out: weights, optimizer state, moving average and step count are as before."""
    times: StepTimes
    norms: Mapping[str, Tensor] | None
    """Norms "<grad_norm, update_norm or weight_norm>/<part of the model>" of a measured step, the gradient's before
    clipping; None where the step was not to be measured, or DeepSpeed left out a gradient that is not finite."""


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's flattened elements whose training state this rank holds."""

    name: str
    """Parameter name, as in the model's state dict."""
    offset: int
    """First element of the run in the flattened parameter."""
    values: dict[str, Tensor]
    """Flat views of equal length, live in the engine, such as `MASTER`, `AVERAGE` and the optimizer's moments."""
    saved_here: bool
    """Whether this rank writes the run to a checkpoint; replicas of it on other ranks do not."""

    @property
    def numel(self) -> int:
        """Elements in the run."""
        return next(iter(self.values.values())).numel()


class TrainEngine(Protocol):
    """Executes optimizer steps and exposes the training state as portable fragments."""

    module: nn.Module
    """The model; under ZeRO-3 its parameters are partitioned."""

    def train_step(
        self,
        micro_batches: Iterable[MicroBatch],
        lr: float,
        *,
        accept: Accept | None = None,
        measure: bool = False,
    ) -> StepResult:
        """One update from exactly grad_accum micro-batches: mean gradient, clip by global norm, optimizer.

        Args:
            micro_batches: images and targets, on the device.
            lr: of every parameter group, times the group's `lr_scale` where it has one.
            accept: asked once a step; False leaves the update out. A norm that is not finite is put to it too and
                left out whatever it says. The host waits for the device to ask.
            measure: take norms by part of the model.
        """
        ...

    def set_grad_accum(self, grad_accum: int) -> None:
        """Micro-batches a step from now on; between steps only."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] in fp32 of images [B, C, H, W], in evaluation mode, without gradients.

        Collective under ZeRO-3: every rank calls it equally often.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Have `predict` use the weights' moving average while the block runs; no step may be made in it.

        Collective. What the engine held before is bitwise there afterwards.
        """
        ...

    def fragments(self) -> list[Fragment]:
        """The state this rank holds, in parameter order. Writing into the views changes the state."""
        ...

    def optimizer_steps(self) -> int:
        """Updates the optimizer has made (Adam's bias correction counts them)."""
        ...

    def state_loaded(self, optimizer_steps: int) -> None:
        """Make everything else follow fragments that were just written: the weights and the step count.

        Collective.
        """
        ...
