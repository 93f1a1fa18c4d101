"""The plain torch engine: what a step means, in the fewest words. The oracle for DeepSpeed's."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitscale.engine.adam_state import ensure_adam_state, read_adam_steps, write_adam_steps
from vitscale.engine.precision import Precision
from vitscale.engine.protocol import MASTER, Fragment, LossFn, MicroBatch, StepResult


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
    ) -> None:
        """Wrap a model that already lies on `device` and an optimizer over its parameters."""
        self.module = module
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._grad_accum = grad_accum
        self._clip_norm = clip_norm
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self._rank = rank
        self._world_size = world_size
        self._replicated: nn.Module = module
        if world_size > 1:
            self._replicated = DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)

    def train_step(self, micro_batches: Iterable[MicroBatch], lr: float) -> StepResult:
        """See `TrainEngine`."""
        self._replicated.train()
        total = torch.zeros(())
        count = 0
        for images, labels in micro_batches:
            count += 1
            last = count == self._grad_accum
            unsynced = isinstance(self._replicated, DistributedDataParallel) and not last
            with self._replicated.no_sync() if unsynced else contextlib.nullcontext():  # type: ignore[operator]
                with self._autocast:
                    logits = self._replicated(images)
                loss = self._loss_fn(logits, labels) / self._grad_accum
                loss.backward()  # type: ignore[no-untyped-call]
            total = total.to(loss.device) + loss.detach()
        assert count == self._grad_accum, f"{count} micro-batches for an accumulation of {self._grad_accum}"
        max_norm = self._clip_norm if self._clip_norm is not None else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(total, grad_norm)

    def predict(self, images: Tensor) -> Tensor:
        """See `TrainEngine`."""
        self.module.eval()
        with torch.inference_mode(), self._autocast:
            logits: Tensor = self.module(images)
        return logits.float()

    def fragments(self) -> list[Fragment]:
        """See `TrainEngine`. Every rank holds all parameters; they take turns in writing them."""
        found = []
        for index, (name, parameter) in enumerate(self.module.named_parameters()):
            state = ensure_adam_state(self._optimizer, parameter)
            values = {MASTER: parameter.detach().view(-1)} | {key: value.view(-1) for key, value in state.items()}
            found.append(Fragment(name, 0, values, saved_here=index % self._world_size == self._rank))
        return found

    def optimizer_steps(self) -> int:
        """See `TrainEngine`."""
        return read_adam_steps(self._optimizer)

    def state_loaded(self, optimizer_steps: int) -> None:
        """See `TrainEngine`."""
        write_adam_steps(self._optimizer, optimizer_steps)
