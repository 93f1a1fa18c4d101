"""Floating-point operations of a Vision Transformer, as closed formulas."""

from vitscale.model.drop_path import DropPathMode, drop_path_rates, kept_samples
from vitscale.model.execution import Execution
from vitscale.model.resnet import stem_chans, stem_flops
from vitscale.model.variants import Variant


def forward_flops(variant: Variant) -> int:
    """Floating-point operations of the forward pass of one image, a multiply-add counted as two.

    Counted are the matrix products and convolutions: patch embedding, attention (both products) and its
    projections, MLP, attention pooling, representation layer and heads. Norms, softmax, activations, biases
    and residual additions are not; they are below one percent. With S tokens, n patches of p pixels in c
    channels, width d, MLP width f, L blocks: L [2S (4d^2 + 2df) + 4 S^2 d] + 2n c p d, and 2 x inputs x outputs
    for each layer of the head. SwiGLU has 3df where an MLP has 2df. A hybrid adds its convolutions, and its
    patch embedding reads their channels.
    """
    width = variant.embed_dim
    heads = 2 if variant.distilled else 1
    head = 2 * width * variant.representation_size + heads * 2 * variant.head_input * variant.num_classes
    pool = _map_flops(variant) if variant.pool == "map" else 0
    return _embed_flops(variant) + variant.depth * _block_flops(variant) + pool + head


def train_flops(variant: Variant) -> int:
    """Model FLOPs of training on one image: forward, and twice that for the backward pass.

    This is the convention behind MFU (Chowdhery et al. 2022): recomputed activations do not count.
    """
    return 3 * forward_flops(variant)


def executed_train_flops(
    variant: Variant,
    micro_batch: int,
    *,
    execution: Execution,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    drop_path_mode: DropPathMode = "mask",
) -> int:
    """FLOPs that training on a micro-batch executes, counted as in `train_flops`.

    Samples that a subset leaves out do not count; what is recomputed counts: of a block its forward pass but for the
    last product, unless LayerScale or dropout asks for that again. Selective recomputation repeats no product. What
    the compiler recomputes for a budget is its own choice and not counted.
    """
    block = _block_flops(variant)
    last = 0 if variant.layer_scale or drop_rate else 2 * variant.tokens * variant.mlp_hidden * variant.embed_dim
    total = micro_batch * train_flops(variant)
    for index, rate in enumerate(drop_path_rates(drop_path_rate, variant.depth)):
        kept = kept_samples(micro_batch, rate) if drop_path_mode == "subset" else micro_batch
        total -= (micro_batch - kept) * 3 * block
        total += kept * (block - last) if execution.recomputes(index) else 0
    return total


def _block_flops(variant: Variant) -> int:
    width, tokens = variant.embed_dim, variant.tokens
    return 2 * tokens * (4 * width**2 + _mlp_multiplies(variant)) + 4 * tokens**2 * width


def _mlp_multiplies(variant: Variant) -> int:
    return (3 if variant.act == "swiglu" else 2) * variant.embed_dim * variant.mlp_hidden


def _embed_flops(variant: Variant) -> int:
    height, width = variant.patch_kernel
    if variant.stem is None:
        return 2 * variant.patches * variant.in_chans * height * width * variant.embed_dim
    stem = stem_flops(variant.in_chans, variant.stem, variant.image_px)
    return stem + 2 * variant.patches * stem_chans(variant.stem) * height * width * variant.embed_dim


def _map_flops(variant: Variant) -> int:
    """Keys and values of all patches, both products, and the probe's own query, projection and MLP."""
    width, patches = variant.embed_dim, variant.patches
    return 4 * patches * width**2 + 4 * patches * width + 4 * width**2 + 2 * _mlp_multiplies(variant)
