"""Bytes of activations that one image leaves for the backward pass."""

from vitscale.model import Variant


def activation_bytes(variant: Variant) -> int | None:
    """Activations of one image in bf16 that the blocks keep for the backward pass.

    Per token a pre-norm block keeps 16 d + 4 f + 4 h + 8 bytes (width d, MLP width f, heads h): the inputs and
    outputs of both norms and their statistics, queries, keys and values, the attention's output and its
    log-sum-exp, and the MLP's hidden layer before and after GELU. This is eager PyTorch with fused attention and
    no dropout; what patch embedding, head and allocator add is not in it.

    None for blocks with LayerScale, QK-norm, SwiGLU or parallel branches, which keep more.
    """
    if variant.layer_scale or variant.qk_norm or variant.parallel or variant.act == "swiglu":
        return None
    kept = 16 * variant.embed_dim + 4 * variant.mlp_hidden + 4 * variant.num_heads + 8
    return variant.depth * variant.tokens * kept


def checkpointed_bytes(variant: Variant) -> int:
    """The same under full activation checkpointing, where a block keeps its input alone: 2 d bytes a token."""
    return variant.depth * variant.tokens * 2 * variant.embed_dim
