"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the trainer's protocol."""

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Read when deepspeed is imported; left to itself it takes the CPU too, with a warning in every process.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

from vitscale.engine.adam_state import read_adam_steps, write_adam_steps
from vitscale.engine.protocol import Fragment, LossFn, MicroBatch, StepResult
from vitscale.engine.zero_state import refresh_weights, zero_fragments

# DeepSpeed 0.19 calls collectives by names that torch 2.14 renamed; the warning comes at every call.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


class DeepSpeedEngine:
    """A model under ZeRO. DeepSpeed partitions, reduces, clips and steps; its own checkpoints are not used."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        *,
        deepspeed_config: dict[str, Any],
    ) -> None:
        """Hand model and optimizer to DeepSpeed; the process group must be up already."""
        self._engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
        )
        self.module = module
        self._loss_fn = loss_fn
        self._grad_accum: int = deepspeed_config["gradient_accumulation_steps"]
        self._dtype = torch.bfloat16 if deepspeed_config["bf16"]["enabled"] else torch.float32
        # Without ZeRO and in fp32 DeepSpeed steps the optimizer as it is and reports no norm.
        self._plain = self._engine.optimizer is self._engine.basic_optimizer

    def train_step(self, micro_batches: Iterable[MicroBatch], lr: float) -> StepResult:
        """See `TrainEngine`."""
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        total: Tensor | None = None
        grad_norm: Tensor | float = 0.0
        count = 0
        for images, labels in micro_batches:
            count += 1
            loss = self._loss_fn(self._engine(images.to(self._dtype)), labels)
            self._engine.backward(loss)
            share = loss.detach() / self._grad_accum
            total = share if total is None else total + share
            if self._plain and count == self._grad_accum:
                grad_norm = nn.utils.get_total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
            self._engine.step()
        assert total is not None, "a step needs at least one micro-batch"
        assert count == self._grad_accum, f"{count} micro-batches for an accumulation of {self._grad_accum}"
        return StepResult(total, grad_norm if self._plain else self._engine.get_global_grad_norm())

    def predict(self, images: Tensor) -> Tensor:
        """See `TrainEngine`."""
        self._engine.eval()
        with torch.no_grad():
            logits: Tensor = self._engine(images.to(self._dtype))
        return logits.float()

    def fragments(self) -> list[Fragment]:
        """See `TrainEngine`."""
        return zero_fragments(self._engine)

    def optimizer_steps(self) -> int:
        """See `TrainEngine`."""
        return read_adam_steps(self._engine.basic_optimizer)

    def state_loaded(self, optimizer_steps: int) -> None:
        """See `TrainEngine`."""
        write_adam_steps(self._engine.basic_optimizer, optimizer_steps)
        refresh_weights(self._engine)
