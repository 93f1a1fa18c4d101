"""Parameters of an architecture by part, as closed formulas."""

from vitscale.model import Variant
from vitscale.model.resnet import stem_chans, stem_parameters


def parameter_parts(variant: Variant) -> dict[str, int]:
    """Number of parameters of each part that the architecture has, in the order of the forward pass.

    With width d, MLP width f, heads of width e and depth L, and b = 1 where norms have a bias: a norm has (1 + b) d;
    a block 4 d^2 + d for the attention (and 3 d with qkv biases), 2 d f + d + f for the MLP (SwiGLU:
    3 d f + d + 2 f), two norms (parallel: one), and d for each LayerScale.
    """
    width, hidden = variant.embed_dim, variant.mlp_hidden
    norms = 1 + variant.norm_bias
    mlp = 2 * width * hidden + width + hidden
    if variant.act == "swiglu":
        mlp += width * hidden + hidden
    attention = 4 * width**2 + width + 3 * width * variant.qkv_bias + 2 * norms * variant.head_dim * variant.qk_norm
    branches = 1 if variant.parallel else 2
    block = attention + mlp + branches * (norms * width + width * bool(variant.layer_scale))
    height, across = variant.patch_kernel
    channels = variant.in_chans if variant.stem is None else stem_chans(variant.stem)
    heads = 2 if variant.distilled else 1
    parts = {
        "ResNet stem": 0 if variant.stem is None else stem_parameters(variant.in_chans, variant.stem),
        "patch embedding": channels * height * across * width + width,
        "tokens and positions": (variant.prefix_tokens + variant.tokens) * width,
        "blocks": variant.depth * block,
        "final norm": norms * width,
        "attention pooling": (width + 4 * width**2 + 4 * width + norms * width + mlp) * (variant.pool == "map"),
        "representation layer": (width + 1) * variant.representation_size,
        "head": heads * (variant.head_input + 1) * variant.num_classes,
    }
    return {part: count for part, count in parts.items() if count}
