"""The plain torch engine: what a step means, in the fewest words. The oracle for DeepSpeed's."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitscale.config import AverageSection
from vitscale.engine.averaging import WeightAverage
from vitscale.engine.optimizer_state import fragments_of, write_optimizer_steps
from vitscale.engine.precision import Precision
from vitscale.engine.protocol import AVERAGE, Accept, Fragment, LossFn, MicroBatch, StepResult
from vitscale.engine.timing import StepClock
from vitscale.engine.update import GuardedUpdate, set_learning_rate
from vitscale.optim import whole_parameters


class TorchEngine:
    """fp32 weights (bf16 by autocast), DDP over ranks, one torch optimizer."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        *,
        grad_accum: int,
        clip_norm: float | None,
        precision: Precision,
        device: torch.device,
        rank: int,
        world_size: int,
        average: AverageSection | None = None,
    ) -> None:
        """Wrap a model that already lies on `device` and an optimizer over its parameters."""
        self.module = module
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._grad_accum = grad_accum
        self._clip_norm = clip_norm
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._flats = whole_parameters(module.named_parameters())
        self._average = WeightAverage(average, self._flats) if average is not None else None
        self._grad_norm = torch.zeros((), device=device)
        self._update = GuardedUpdate(
            optimizer,
            self._flats,
            grad_norm=lambda: self._grad_norm,
            clip_norm=clip_norm,
            group=None,
            device=device,
            average=self._average,
        )
        self._replicated: nn.Module = module
        if world_size > 1:
            # Views into the buckets save a copy of all gradients; nothing in our models has buffers that change.
            self._replicated = DistributedDataParallel(
                module,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
            _settle_buckets(self._replicated)

    def train_step(
        self,
        micro_batches: Iterable[MicroBatch],
        lr: float,
        *,
        accept: Accept | None = None,
        measure: bool = False,
    ) -> StepResult:
        """See `TrainEngine`."""
        self._replicated.train()
        set_learning_rate(self._optimizer, lr)
        clock = StepClock(self._device)
        total = torch.zeros((), device=self._device)
        count = 0
        for images, targets in micro_batches:
            count += 1
            unsynced = isinstance(self._replicated, DistributedDataParallel) and count < self._grad_accum
            with self._replicated.no_sync() if unsynced else nullcontext():  # type: ignore[operator]
                with clock.phase("forward"):
                    with self._autocast:
                        logits = self._replicated(images)
                    loss = self._loss_fn(logits, targets) / self._grad_accum
                with clock.phase("backward"):
                    loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        assert count == self._grad_accum, f"{count} micro-batches for an accumulation of {self._grad_accum}"
        with clock.phase("optimizer"):
            skipped, norms = self._step(accept, measure)
        return StepResult(total, self._grad_norm, skipped, clock.times(), norms)

    def _step(self, accept: Accept | None, measure: bool) -> tuple[bool, dict[str, Tensor] | None]:
        parameters = [flat.tensor for flat in self._flats]
        self._grad_norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, self._grad_norm)
        self._update.begin(accept, measure)
        self._optimizer.step()
        outcome = self._update.end()
        self._optimizer.zero_grad(set_to_none=True)
        return outcome

    def set_grad_accum(self, grad_accum: int) -> None:
        """See `TrainEngine`."""
        self._grad_accum = grad_accum

    def predict(self, images: Tensor) -> Tensor:
        """See `TrainEngine`."""
        self.module.eval()
        with torch.inference_mode(), self._autocast:
            logits: Tensor = self.module(images)
        return logits.float()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `TrainEngine`."""
        assert self._average is not None, "the engine was made without a moving average"
        with self._average.exchanged():
            yield

    def fragments(self) -> list[Fragment]:
        """See `TrainEngine`. Every rank holds all parameters; they take turns in writing them."""
        average = self._average
        return fragments_of(
            self._flats,
            self._optimizer,
            rank=self._rank,
            world_size=self._world_size,
            replicated=True,
            further=None if average is None else lambda tensor: {AVERAGE: average.of(tensor)},
        )

    def optimizer_steps(self) -> int:
        """See `TrainEngine`."""
        return self._update.count

    def state_loaded(self, optimizer_steps: int) -> None:
        """See `TrainEngine`."""
        self._update.count = optimizer_steps
        write_optimizer_steps(self._optimizer, optimizer_steps)


def _settle_buckets(replicated: DistributedDataParallel) -> None:
    """Show DDP a backward pass, after which it lays its buckets out anew, once and for all. Collective.

    Left to the first step, that step alone would add the ranks' gradients in another order: of three ranks or more, a
    run that goes on from a checkpoint would then no longer be bitwise the one that was never interrupted.
    """
    replicated.reducer.prepare_for_forward()
    replicated.reducer.prepare_for_backward([])
    firsts = [parameter.view(-1)[:1] for parameter in replicated.parameters() if parameter.requires_grad]
    torch.cat(firsts).sum().backward()  # type: ignore[no-untyped-call]
    replicated.zero_grad(set_to_none=True)
