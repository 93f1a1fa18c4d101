from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer as TimmViT

from vitscale.errors import ConfigError
from vitscale.model import VARIANTS, Variant, create_model, resolve_variant

IN21K = 21_843


def count(**arguments):
    with torch.device("meta"):
        model = create_model(**arguments)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "trunk", "with_head", "with_representation"),
    [
        ("vit_base_patch16_224", 85_798_656, 102_595_923, None),
        ("vit_large_patch16_224", 303_301_632, 325_690_707, None),
        ("vit_huge_patch14_224", 630_764_800, 658_745_683, 660_385_363),
        ("vit_giant_patch14_224", 1_011_202_432, 1_041_979_219, 1_043_963_091),
        ("vit_gigantic_patch14_224", 1_842_775_680, 1_879_144_275, 1_881_914_835),
    ],
)
def test_parameter_counts(name, trunk, with_head, with_representation):
    assert count(name=name, num_classes=0) == trunk
    assert count(name=name, num_classes=IN21K) == with_head
    if with_representation:
        width = VARIANTS[name].embed_dim
        assert count(name=name, num_classes=IN21K, representation_size=width) == with_representation


def test_huge_in21k_has_the_representation_layer_of_its_name():
    assert count(name="vit_huge_patch14_224_in21k", num_classes=IN21K) == 660_385_363


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("vit_huge_patch14_224", 5120), ("vit_giant_patch14_224", 6144), ("vit_gigantic_patch14_224", 8192)],
)
def test_hidden_widths_are_exact(name, hidden):
    assert VARIANTS[name].mlp_hidden == hidden


def test_hidden_width_is_rounded_not_cut_off():
    assert replace(VARIANTS["vit_giant_patch14_224"], mlp_ratio=4.3636).mlp_hidden == 6144


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_has_timms_name_and_shape(name):
    variant = VARIANTS[name]
    with torch.device("meta"):
        ours = create_model(name, num_classes=variant.num_classes, representation_size=0)
        theirs = TimmViT(
            img_size=variant.img_size,
            patch_size=variant.patch_size,
            embed_dim=variant.embed_dim,
            depth=variant.depth,
            num_heads=variant.num_heads,
            mlp_ratio=variant.mlp_hidden / variant.embed_dim,
            num_classes=variant.num_classes,
            weight_init="skip",
        )
    assert shapes(ours) == shapes(theirs)


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_hug_patch14_224", "model.name 'vit_hug_patch14_224' is unknown: did you mean vit_huge_patch14_224 or "),
        ("resnet", "model.name 'resnet' is unknown: the variants are vit_tiny_patch16_224, "),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(ConfigError) as caught:
        create_model(name, num_classes=10)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "vit_huge_patch14_224", "img_size": 384},
            "model.img_size 384 is no multiple of model.patch_size 14: use model.img_size=378 or 392",
        ),
        (
            {"name": "vit_tiny_patch16_224", "img_size": 8},
            "model.img_size 8 is no multiple of model.patch_size 16: use model.img_size=16",
        ),
        (
            {"name": "vit_tiny_patch16_224", "num_heads": 5},
            (
                "model.embed_dim 192 is no multiple of model.num_heads 5: "
                "use model.embed_dim=190 or 195, or another model.num_heads"
            ),
        ),
    ],
)
def test_shapes_that_do_not_divide(changes, message):
    with pytest.raises(ConfigError) as caught:
        create_model(**changes, num_classes=10)
    assert str(caught.value) == message


@given(
    patch=st.integers(1, 16),
    grid=st.integers(1, 16),
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 16),
    pool=st.sampled_from(["token", "avg"]),
)
def test_derived_sizes(patch, grid, heads, head_dim, pool):
    variant = Variant(patch, heads * head_dim, depth=1, num_heads=heads, img_size=patch * grid, pool=pool)
    assert variant.grid == grid
    assert variant.tokens == grid * grid + (pool == "token")
    assert variant.tokens - variant.prefix_tokens == grid * grid
    assert variant.mlp_hidden == 4 * heads * head_dim
    assert variant.head_input == variant.embed_dim
    assert replace(variant, representation_size=7).head_input == 7


def test_a_change_to_none_keeps_the_variants_own_value():
    own = VARIANTS["vit_huge_patch14_224_in21k"]
    assert resolve_variant("vit_huge_patch14_224_in21k", depth=None, representation_size=None) == own
    assert resolve_variant("vit_huge_patch14_224_in21k", representation_size=0).representation_size == 0
