"""Floating-point operations of a Vision Transformer, as closed formulas."""

from vitscale.model.variants import Variant


def forward_flops(variant: Variant) -> int:
    """Floating-point operations of the forward pass of one image, a multiply-add counted as two.

    Counted are the matrix products: patch embedding, attention (both products) and its projections, MLP,
    representation layer and head. Norms, softmax, GELU, biases and residual additions are not; they are
    below one percent. With S tokens, n patches of p x p pixels in c channels, width d, MLP width f, L blocks:
    L [2S (4d^2 + 2df) + 4 S^2 d] + 2n c p^2 d, and 2 x inputs x outputs for each layer of the head.
    """
    width, tokens = variant.embed_dim, variant.tokens
    projections = 2 * tokens * (4 * width**2 + 2 * width * variant.mlp_hidden)
    attention = 4 * tokens**2 * width
    patch_embed = 2 * variant.grid**2 * variant.in_chans * variant.patch_size**2 * width
    head = 2 * width * variant.representation_size + 2 * variant.head_input * variant.num_classes
    return variant.depth * (projections + attention) + patch_embed + head


def train_flops(variant: Variant) -> int:
    """Model FLOPs of training on one image: forward, and twice that for the backward pass.

    This is the convention behind MFU (Chowdhery et al. 2022): recomputed activations do not count.
    """
    return 3 * forward_flops(variant)
