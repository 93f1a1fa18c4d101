"""The Vision Transformer: blocks, heads, the table of variants, position embeddings and FLOPs."""

from vitscale.model.blocks import Block
from vitscale.model.flops import forward_flops, train_flops
from vitscale.model.pos_embed import resample_pos_embed
from vitscale.model.variants import VARIANTS, Pool, Variant, resolve_variant
from vitscale.model.vit import VisionTransformer, create_model

__all__ = [
    "VARIANTS",
    "Block",
    "Pool",
    "Variant",
    "VisionTransformer",
    "create_model",
    "forward_flops",
    "resample_pos_embed",
    "resolve_variant",
    "train_flops",
]
