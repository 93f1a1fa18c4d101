"""How our tensors and those of Google's `.npz` correspond, in both layouts.

    original     Transformer/posembed_input/pos_embedding (class token's row first)
                 Transformer/encoderblock_N/{LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3}
    big_vision   pos_embedding (patches only: the class token is added after it)
                 Transformer/encoderblock_N/{LayerNorm_0, MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0}

The published files of the original have Flax's first numbering, one count over all submodules of a block; today's Flax
counts each class apart, as big_vision's files do, and its loaders know both. Files that mix the two are read too.

Dense kernels are (inputs, outputs), convolutions (height, width, inputs, outputs), queries, keys and values
(D, heads, head_dim), the attention's output (heads, head_dim, D).

big_vision keeps the sum of the class token and its position embedding, which is all that a model ever uses. We
add both beside `params/`, where big_vision and timm do not look, so that nothing is lost on the way back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitscale.checkpoint.portable import Link, same
from vitscale.model import Variant

OUTSIDE = "vitscale/"
"""Before the keys that are not Google's."""
CLASS_TOKEN, CLASS_POSITION = f"{OUTSIDE}cls_token", f"{OUTSIDE}cls_pos_embed"


@dataclass(frozen=True)
class BlockNames:
    """Names of a block's submodules under one of Flax's numberings."""

    attention: str
    norm2: str
    mlp: str


COUNTED_TOGETHER = BlockNames("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
COUNTED_APART = BlockNames("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")


@dataclass(frozen=True)
class Layout:
    """In what the two projects' files differ."""

    prefix: str
    """Before every key."""
    block: BlockNames
    pos_embed: str
    joins_class_token: bool
    """Whether the class token has a row in the position embedding."""


ORIGINAL = Layout("", COUNTED_TOGETHER, "Transformer/posembed_input/pos_embedding", True)
BIG_VISION = Layout("params/", COUNTED_APART, "pos_embedding", False)


def links(variant: Variant, layout: Layout, *, with_parts: bool) -> list[Link]:
    """How our tensors and a layout's correspond, without the prefix.

    `with_parts` asks for the two parts of what big_vision keeps as a sum, too.
    """
    found = [*_embedding(variant, layout, with_parts), *_norm("norm", "Transformer/encoder_norm")]
    for index in range(variant.depth):
        ours, theirs = f"blocks.{index}", f"Transformer/encoderblock_{index}"
        found += [
            *_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0"),
            *_projections(f"{ours}.attn.qkv", f"{theirs}/{layout.block.attention}", ("query", "key", "value"), variant),
            *_attention_output(f"{ours}.attn.proj", f"{theirs}/{layout.block.attention}/out", variant),
            *_norm(f"{ours}.norm2", f"{theirs}/{layout.block.norm2}"),
            *_mlp(f"{ours}.mlp", f"{theirs}/{layout.block.mlp}"),
        ]
    if variant.pool == "map":
        attention = "MAPHead_0/MultiHeadDotProductAttention_0"
        found += [
            same("attn_pool.latent", "MAPHead_0/probe"),
            *_projections("attn_pool.q", attention, ("query",), variant),
            *_projections("attn_pool.kv", attention, ("key", "value"), variant),
            *_attention_output("attn_pool.proj", f"{attention}/out", variant),
            *_norm("attn_pool.norm", "MAPHead_0/LayerNorm_0"),
            *_mlp("attn_pool.mlp", "MAPHead_0/MlpBlock_0"),
        ]
    if variant.representation_size:
        found += _dense("pre_logits.fc", "pre_logits")
    if variant.num_classes:
        found += _dense("head", "head")
    return found


def _embedding(variant: Variant, layout: Layout, with_parts: bool) -> list[Link]:
    found = [
        _convolution("patch_embed.proj.weight", "embedding/kernel"),
        same("patch_embed.proj.bias", "embedding/bias"),
    ]
    if variant.pool == "token" and not layout.joins_class_token:
        theirs = ("cls", layout.pos_embed, *((CLASS_TOKEN, CLASS_POSITION) if with_parts else ()))
        found.append(Link(("cls_token", "pos_embed"), theirs, join_class_token, _split_class_token))
    else:
        found.append(same("pos_embed", layout.pos_embed))
        if variant.pool == "token":
            found.append(same("cls_token", "cls"))
    return found + (_stem(variant.stem) if variant.stem is not None else [])


def join_class_token(cls_token: Tensor, pos_embed: Tensor) -> tuple[Tensor, ...]:
    """Class token with its position embedding, the patches' position embedding, and both parts of the sum."""
    return cls_token + pos_embed[:, :1], pos_embed[:, 1:], cls_token, pos_embed[:, :1]


def _split_class_token(joined: Tensor, pos_embed: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    if not parts or not torch.equal(parts[0] + parts[1], joined):  # none kept, or the sum was trained on since
        parts = (joined, torch.zeros_like(joined))
    return parts[0], torch.cat([parts[1], pos_embed], dim=1)


def _stem(stages: tuple[int, ...]) -> list[Link]:
    root = "patch_embed.backbone.stem" if stages else "patch_embed.backbone"
    found = [_convolution(f"{root}.conv.weight", "conv_root/kernel"), *_norm(f"{root}.norm", "gn_root")]
    for stage, units in enumerate(stages):
        for unit in range(units):
            ours = f"patch_embed.backbone.stages.{stage}.blocks.{unit}"
            theirs = f"block{stage + 1}/unit{unit + 1}"
            for layer in (1, 2, 3):
                found.append(_convolution(f"{ours}.conv{layer}.weight", f"{theirs}/conv{layer}/kernel"))
                found += _norm(f"{ours}.norm{layer}", f"{theirs}/gn{layer}")
            if unit == 0:
                found.append(_convolution(f"{ours}.downsample.conv.weight", f"{theirs}/conv_proj/kernel"))
                found += _norm(f"{ours}.downsample.norm", f"{theirs}/gn_proj")
    return found


def _convolution(ours: str, theirs: str) -> Link:
    return Link((ours,), (theirs,), lambda w: (w.permute(2, 3, 1, 0),), lambda w: (w.permute(3, 2, 0, 1),))


def _norm(ours: str, theirs: str) -> list[Link]:
    return [same(f"{ours}.weight", f"{theirs}/scale"), same(f"{ours}.bias", f"{theirs}/bias")]


def _dense(ours: str, theirs: str) -> list[Link]:
    kernel = Link((f"{ours}.weight",), (f"{theirs}/kernel",), lambda w: (w.T,), lambda w: (w.T,))
    return [kernel, same(f"{ours}.bias", f"{theirs}/bias")]


def _mlp(ours: str, theirs: str) -> list[Link]:
    return [*_dense(f"{ours}.fc1", f"{theirs}/Dense_0"), *_dense(f"{ours}.fc2", f"{theirs}/Dense_1")]


def _projections(ours: str, theirs: str, names: tuple[str, ...], variant: Variant) -> list[Link]:
    """Stacked matrices of ours as one kernel (D, heads, head_dim) and bias (heads, head_dim) for each name."""
    parts, heads, width = len(names), variant.num_heads, variant.embed_dim

    def kernels(weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.T.reshape(width, heads, -1) for part in weight.chunk(parts))

    def weight(*kernels: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat([kernel.flatten(1).T for kernel in kernels]),)

    def biases(bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.view(heads, -1) for part in bias.chunk(parts))

    def bias(*biases: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat([part.flatten() for part in biases]),)

    return [
        Link((f"{ours}.weight",), tuple(f"{theirs}/{name}/kernel" for name in names), kernels, weight),
        Link((f"{ours}.bias",), tuple(f"{theirs}/{name}/bias" for name in names), biases, bias),
    ]


def _attention_output(ours: str, theirs: str, variant: Variant) -> list[Link]:
    def kernel(weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.T.reshape(variant.num_heads, variant.head_dim, -1),)

    link = Link((f"{ours}.weight",), (f"{theirs}/kernel",), kernel, lambda k: (k.flatten(0, 1).T,))
    return [link, same(f"{ours}.bias", f"{theirs}/bias")]
