"""What the trainer asks of an engine, whatever executes the step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

LossFn = Callable[[Tensor | tuple[Tensor, Tensor], Tensor], Tensor]
"""(what the model gives in training: logits, or those of both heads of a distilled one; labels) -> scalar."""
MicroBatch = tuple[Tensor, Tensor]
"""Images [B, C, H, W] (float) and labels [B] (int64) or probabilities [B, classes] (float), on the engine's device."""

MASTER = "master"
"""Key of the fp32 weights among a fragment's values; the other keys are the optimizer's own."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; reading a value as a number waits for the device."""

    loss: Tensor
    """Mean loss over this rank's micro-batches, a detached scalar."""
    grad_norm: Tensor | float
    """Global norm of the averaged gradient before clipping."""


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's flattened elements whose training state this rank holds."""

    name: str
    """Parameter name, as in the model's state dict."""
    offset: int
    """First element of the run in the flattened parameter."""
    values: dict[str, Tensor]
    """Flat fp32 views of equal length, live in the engine: `MASTER` and the optimizer's moments."""
    saved_here: bool
    """Whether this rank writes the run to a checkpoint; replicas of it on other ranks do not."""

    @property
    def numel(self) -> int:
        """Elements in the run."""
        return self.values[MASTER].numel()


class TrainEngine(Protocol):
    """Executes optimizer steps and exposes the training state as portable fragments."""

    module: nn.Module
    """The model; under ZeRO-3 its parameters are partitioned."""

    def train_step(self, micro_batches: Iterable[MicroBatch], lr: float) -> StepResult:
        """One update from exactly grad_accum micro-batches: mean gradient, clip by global norm, optimizer."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] in fp32 of images [B, C, H, W], in evaluation mode, without gradients.

        Collective under ZeRO-3: every rank calls it equally often.
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
