"""The Vision Transformer: blocks, heads, the table of variants, adaptation to other inputs, and FLOPs."""

from vitscale.model.adapt import Resampling, adapt_in_chans, first_convolution, resample_pos_embed
from vitscale.model.blocks import Block, ParallelBlock
from vitscale.model.drop_path import DropPathMode
from vitscale.model.execution import AttentionKernel, Execution, Recompute, ResidualBlock
from vitscale.model.flops import executed_train_flops, forward_flops, train_flops
from vitscale.model.initialisation import Scheme
from vitscale.model.table import TABLE, VARIANTS, Entry, Preprocessing, resolve_variant
from vitscale.model.variants import Act, Pool, Size, Variant
from vitscale.model.vit import Logits, VisionTransformer, create_model

__all__ = [
    "TABLE",
    "VARIANTS",
    "Act",
    "AttentionKernel",
    "Block",
    "DropPathMode",
    "Entry",
    "Execution",
    "Logits",
    "ParallelBlock",
    "Pool",
    "Preprocessing",
    "Recompute",
    "Resampling",
    "ResidualBlock",
    "Scheme",
    "Size",
    "Variant",
    "VisionTransformer",
    "adapt_in_chans",
    "create_model",
    "executed_train_flops",
    "first_convolution",
    "forward_flops",
    "resample_pos_embed",
    "resolve_variant",
    "train_flops",
]
