"""The Vision Transformer: blocks, heads, the table of variants, adaptation to other inputs, and FLOPs."""

from vitscale.model.adapt import Resampling, adapt_in_chans, first_convolution, resample_pos_embed
from vitscale.model.blocks import Block, ParallelBlock
from vitscale.model.flops import forward_flops, train_flops
from vitscale.model.initialisation import Scheme
from vitscale.model.table import TABLE, VARIANTS, Entry, Preprocessing, resolve_variant
from vitscale.model.variants import Act, Pool, Size, Variant
from vitscale.model.vit import Logits, VisionTransformer, create_model

__all__ = [
    "TABLE",
    "VARIANTS",
    "Act",
    "Block",
    "Entry",
    "Logits",
    "ParallelBlock",
    "Pool",
    "Preprocessing",
    "Resampling",
    "Scheme",
    "Size",
    "Variant",
    "VisionTransformer",
    "adapt_in_chans",
    "create_model",
    "first_convolution",
    "forward_flops",
    "resample_pos_embed",
    "resolve_variant",
    "train_flops",
]
