"""Floating-point operations of a Vision Transformer, as closed formulas."""

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
    width, tokens = variant.embed_dim, variant.tokens
    mlp = (3 if variant.act == "swiglu" else 2) * width * variant.mlp_hidden
    blocks = variant.depth * (2 * tokens * (4 * width**2 + mlp) + 4 * tokens**2 * width)
    heads = 2 if variant.distilled else 1
    head = 2 * width * variant.representation_size + heads * 2 * variant.head_input * variant.num_classes
    return _embed_flops(variant) + blocks + (_map_flops(variant, mlp) if variant.pool == "map" else 0) + head


def train_flops(variant: Variant) -> int:
    """Model FLOPs of training on one image: forward, and twice that for the backward pass.

    This is the convention behind MFU (Chowdhery et al. 2022): recomputed activations do not count.
    """
    return 3 * forward_flops(variant)


def _embed_flops(variant: Variant) -> int:
    height, width = variant.patch_kernel
    if variant.stem is None:
        return 2 * variant.patches * variant.in_chans * height * width * variant.embed_dim
    stem = stem_flops(variant.in_chans, variant.stem, variant.image_px)
    return stem + 2 * variant.patches * stem_chans(variant.stem) * height * width * variant.embed_dim


def _map_flops(variant: Variant, mlp: int) -> int:
    """Keys and values of all patches, both products, and the probe's own query, projection and MLP."""
    width, patches = variant.embed_dim, variant.patches
    return 4 * patches * width**2 + 4 * patches * width + 4 * width**2 + 2 * mlp
