"""Parameters by part against the built model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.model import VARIANTS, Variant, VisionTransformer
from vitscale.planning import parameter_parts

PARTS = {
    "ResNet stem": ("patch_embed.backbone.",),
    "patch embedding": ("patch_embed.proj.",),
    "tokens and positions": ("cls_token", "dist_token", "reg_token", "pos_embed"),
    "blocks": ("blocks.",),
    "final norm": ("norm.",),
    "attention pooling": ("attn_pool.",),
    "representation layer": ("pre_logits.",),
    "head": ("head.", "head_dist."),
}


def counted(variant):
    with torch.device("meta"):
        model = VisionTransformer(variant)
    parts = {}
    for name, parameter in model.named_parameters():
        part = next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_of_every_variant(name):
    assert parameter_parts(VARIANTS[name]) == counted(VARIANTS[name])


@settings(max_examples=60)
@given(
    variant=st.builds(
        Variant,
        patch_size=st.sampled_from([4, (4, 8)]),
        embed_dim=st.just(24),
        depth=st.integers(1, 3),
        num_heads=st.sampled_from([2, 3]),
        mlp_ratio=st.sampled_from([2.5, 4.0]),
        qkv_bias=st.booleans(),
        representation_size=st.sampled_from([0, 10]),
        num_classes=st.integers(0, 5),
        img_size=st.sampled_from([16, (8, 24)]),
        in_chans=st.integers(1, 4),
        pool=st.sampled_from(["token", "avg", "map"]),
        reg_tokens=st.integers(0, 2),
        layer_scale=st.sampled_from([0.0, 0.1]),
        qk_norm=st.booleans(),
        parallel=st.booleans(),
        act=st.sampled_from(["gelu", "swiglu"]),
        norm_bias=st.booleans(),
    )
)
def test_parts_of_any_architecture(variant):
    assert parameter_parts(variant) == counted(variant)
