"""How a model's blocks are run: recomputation in the backward pass, compilation, and the attention kernel.

Nothing here changes what a model computes or the names of its parameters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from vitscale.model.drop_path import DropPath, add_branch

Recompute = Literal["none", "full", "every_k", "selective", "budget"]
"""What a backward pass recomputes instead of keeping it from the forward pass: nothing, all of every block, all of
every k-th block, all but products and attention, or what the compiler chooses for a share of the memory."""
AttentionKernel = Literal["auto", "flash", "cudnn", "efficient", "math"]

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,  # a Linear with bias
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_mm.default,  # float8
}
# Of the fused attention kernels the one in use; plain attention is products. The maximum is float8's scale.
_SAVED = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
    _aten.max.default,
}

BlockFunction = Callable[..., Tensor]


class ResidualBlock(nn.Module):
    """A block as `Execution` runs it: draws, then `branches` (recomputed or not), then the last addition.

    The last addition lies outside of what is recomputed, so that nothing asks for the last product again: it is a
    third of a block's work. With LayerScale or dropout behind it the backward pass does (`needs_last_product`).
    """

    draws = 1
    """Branches that samples can pass by."""

    attn: Any  # vitscale.model.blocks has the classes, and imports this file
    mlp: Any

    def __init__(self, drop_path: DropPath, *, needs_last_product: bool) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.needs_last_product = needs_last_product
        self.recomputed: dict[str, Any] | None = None  # arguments of `checkpoint`, None without
        self.run: BlockFunction = run_block

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        # Drawn outside of `run`: what is compiled is the same for every rate, and its random numbers are eager's.
        return self.run(self, x, [self.drop_path.draw(x) for _ in range(self.draws)])

    def branches(self, x: Tensor, *draws: Tensor | None) -> tuple[Tensor, ...]:
        """The last branch's output, after the residual stream as far as it has moved on from `x`."""
        raise NotImplementedError


def run_block(block: ResidualBlock, x: Tensor, draws: list[Tensor | None]) -> Tensor:
    """A block's output: [B, S, D] -> [B, S, D]. One function for all blocks, so that they share what is compiled."""
    if block.recomputed is None or not torch.is_grad_enabled():
        found = block.branches(x, *draws)
    else:
        # Keeps the state of the random generators, so dropout repeats in the recomputation.
        found = checkpoint(block.branches, x, *draws, use_reentrant=False, **block.recomputed)
    return add_branch(x if len(found) == 1 else found[0], found[-1], draws[-1])


@dataclass(frozen=True)
class Execution:
    """How blocks are run; `VisionTransformer.set_execution` takes one."""

    recompute: Recompute = "none"
    """Gradients are bitwise the same with each. `budget` is left to `compiled`: without it nothing is recomputed."""
    every: int = 1
    """With `every_k`: the k; of `depth` blocks `depth // k` are recomputed."""
    attention: AttentionKernel = "auto"
    """The kernel of the blocks' attention; auto leaves it to torch."""
    compiled: Callable[[BlockFunction], BlockFunction] | None = None
    """What compiles the one function that runs a block; None runs it as it is."""

    def recomputes(self, index: int) -> bool:
        """Whether all of a block, counted from 0, is recomputed."""
        return self.recompute == "full" or (self.recompute == "every_k" and (index + 1) % self.every == 0)

    def apply(self, blocks: Iterable[nn.Module]) -> None:
        """Have `blocks` run so from now on."""
        run = run_block if self.compiled is None else self.compiled(run_block)
        selective: dict[str, Any] | None = None
        for index, block in enumerate(blocks):
            assert isinstance(block, ResidualBlock)
            block.run = run
            block.recomputed = {} if self.recomputes(index) else None
            if self.recompute == "selective":
                # One object for all: for another one, what is compiled would be compiled again.
                selective = selective or {"context_fn": partial(create_selective_checkpoint_contexts, _policy(block))}
                block.recomputed = selective
            block.attn.kernel = None if self.attention == "auto" else KERNELS[self.attention]


def _policy(block: ResidualBlock) -> Callable[..., CheckpointPolicy]:
    """Save the products and the attention, recompute the rest: norms, activation, additions, changes of layout."""
    last, keep_last = block.mlp.fc2, block.needs_last_product
    last_shape = (last.in_features, last.out_features)

    def policy(_: SelectiveCheckpointContext, op: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            matrix = arguments[2 if op in (_aten.addmm.default, _aten.baddbmm.default) else 1]
            save = keep_last or tuple(matrix.shape) != last_shape
        else:
            save = op in _SAVED
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
