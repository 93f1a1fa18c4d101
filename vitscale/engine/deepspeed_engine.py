"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the trainer's protocol."""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from vitscale.config import AverageSection
from vitscale.engine.averaging import WeightAverage
from vitscale.engine.host_memory import unlink_collective_buffer
from vitscale.engine.optimizer_state import write_optimizer_steps
from vitscale.engine.protocol import AVERAGE, Accept, Fragment, LossFn, MicroBatch, StepResult
from vitscale.engine.timing import StepClock
from vitscale.engine.update import GuardedUpdate, set_learning_rate
from vitscale.engine.zero_state import bind_optimizer, refresh_weights, zero_fragments

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
        average: AverageSection | None = None,
    ) -> None:
        """Hand model and optimizer to DeepSpeed; the process group must be up already."""
        self._engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
        )
        if self._engine.device.type == "cpu":
            deepspeed.comm.barrier()
            unlink_collective_buffer(os.environ, deepspeed.comm.get_rank())
        wrapper, base = self._engine.optimizer, self._engine.basic_optimizer
        assert getattr(wrapper, "loss_scale", 1.0) == 1.0, "nothing here takes a loss scale into account"
        self.module = module
        self._loss_fn = loss_fn
        self._grad_accum: int = deepspeed_config["gradient_accumulation_steps"]
        self._dtype = torch.bfloat16 if deepspeed_config["bf16"]["enabled"] else torch.float32
        # Without ZeRO and in fp32 DeepSpeed steps the optimizer as it is and reports no norm.
        self._plain = wrapper is base
        self._plain_norm = torch.zeros(())
        self._flats = bind_optimizer(self._engine)
        self._average = WeightAverage(average, self._flats) if average is not None else None
        self._update = GuardedUpdate(
            base,
            self._flats,
            grad_norm=self._grad_norm,
            clip_norm=deepspeed_config["gradient_clipping"] or None,
            group=None if self._plain else wrapper.dp_process_group,
            device=self._engine.device,
            average=self._average,
        )

    def train_step(
        self,
        micro_batches: Iterable[MicroBatch],
        lr: float,
        *,
        accept: Accept | None = None,
        measure: bool = False,
    ) -> StepResult:
        """See `TrainEngine`."""
        self._engine.train()
        set_learning_rate(self._engine.basic_optimizer, lr)
        self._update.begin(accept, measure)
        clock = StepClock(self._engine.device)
        total: Tensor | None = None
        count = 0
        for images, targets in micro_batches:
            count += 1
            # Said and not left to DeepSpeed's count of micro-batches, which `set_grad_accum` would put out of step.
            self._engine.set_gradient_accumulation_boundary(count == self._grad_accum)
            with clock.phase("forward"):
                loss = self._loss_fn(self._engine(images.to(self._dtype)), targets)
            with clock.phase("backward"):
                self._engine.backward(loss)
            share = loss.detach() / self._grad_accum
            total = share if total is None else total + share
            with clock.phase("optimizer"):
                if self._plain and count == self._grad_accum:
                    grads = (p.grad for p in self.module.parameters() if p.grad is not None)
                    self._plain_norm = nn.utils.get_total_norm(grads)
                self._engine.step()
        assert total is not None, "a step needs at least one micro-batch"
        assert count == self._grad_accum, f"{count} micro-batches for an accumulation of {self._grad_accum}"
        with clock.phase("optimizer"):
            skipped, norms = self._update.end()
        return StepResult(total, self._grad_norm(), skipped, clock.times(), norms)

    def _grad_norm(self) -> Tensor | float:
        norm: Tensor | float = self._plain_norm if self._plain else self._engine.optimizer._global_grad_norm
        return norm

    def set_grad_accum(self, grad_accum: int) -> None:
        """See `TrainEngine`."""
        self._grad_accum = grad_accum
        engine = self._engine
        # DeepSpeed divides the loss by the ratio of these.
        engine.set_train_batch_size(grad_accum * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        if not self._plain:
            engine.optimizer.gradient_accumulation_steps = grad_accum  # read when gradients are offloaded

    def predict(self, images: Tensor) -> Tensor:
        """See `TrainEngine`."""
        self._engine.eval()
        with torch.no_grad():
            logits: Tensor = self._engine(images.to(self._dtype))
        return logits.float()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `TrainEngine`."""
        assert self._average is not None, "the engine was made without a moving average"
        with self._average.exchanged():
            refresh_weights(self._engine)
            yield
        # Not after an error: ranks without one would not take part.
        refresh_weights(self._engine)

    def fragments(self) -> list[Fragment]:
        """See `TrainEngine`."""
        average = self._average
        further = None if average is None else lambda tensor: {AVERAGE: average.of(tensor)}
        return zero_fragments(self._engine, self._flats, further)

    def optimizer_steps(self) -> int:
        """See `TrainEngine`."""
        return self._update.count

    def state_loaded(self, optimizer_steps: int) -> None:
        """See `TrainEngine`."""
        self._update.count = optimizer_steps
        write_optimizer_steps(self._engine.basic_optimizer, optimizer_steps)
        refresh_weights(self._engine)
