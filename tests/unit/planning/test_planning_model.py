"""Parameters by part against the built model, activations against what autograd keeps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.model import VARIANTS, Block, Variant, VisionTransformer
from vitscale.planning import activation_bytes, checkpointed_bytes, parameter_parts

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


@pytest.mark.parametrize(
    ("name", "kept_mb", "checkpointed_mb"),
    [
        ("vit_huge_patch14_224", 337, 21),
        ("vit_giant_patch14_224", 485, 29),
        ("vit_gigantic_patch14_224", 734, 41),
    ],
)
def test_activations_of_the_large_shapes(name, kept_mb, checkpointed_mb):
    assert round(activation_bytes(VARIANTS[name]) / 1e6) == kept_mb
    assert round(checkpointed_bytes(VARIANTS[name]) / 1e6) == checkpointed_mb


@pytest.mark.parametrize("name", ["vit_huge_patch14_224", "vit_tiny_patch16_224"])
def test_activations_are_what_autograd_keeps_of_a_block(name):
    variant = replace(VARIANTS[name], depth=1, img_size=4 * VARIANTS[name].patch_px[0])
    block = Block(variant).bfloat16()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    images = 3
    tokens = torch.randn(images, variant.tokens, variant.embed_dim, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(tokens)
    assert sum(size for size, _ in kept.values()) == images * activation_bytes(variant)


@pytest.mark.parametrize("option", [{"layer_scale": 0.1}, {"qk_norm": True}, {"parallel": True}, {"act": "swiglu"}])
def test_blocks_that_keep_more_are_not_guessed(option):
    assert activation_bytes(replace(VARIANTS["vit_tiny_patch16_224"], **option)) is None
