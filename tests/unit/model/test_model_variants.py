from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import ConfigError
from vitscale.model import VARIANTS, Variant, create_model

SMALL = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 8}


def error_of(**changes):
    with pytest.raises(ConfigError) as caught:
        Variant(**{**SMALL, **changes})
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"img_size": 384, "patch_size": 14},
            "model.img_size 384 is no multiple of model.patch_size 14: use model.img_size=378 or 392",
        ),
        (
            {"img_size": 8, "patch_size": 16},
            "model.img_size 8 is no multiple of model.patch_size 16: use model.img_size=16",
        ),
        (
            {"img_size": (32, 50), "patch_size": (8, 16)},
            "model.img_size 50 is no multiple of model.patch_size 16: use model.img_size=48 or 64",
        ),
        (
            {"img_size": (33, 48), "patch_size": (8, 16)},
            "model.img_size 33 is no multiple of model.patch_size 8: use model.img_size=32 or 40",
        ),
        (
            {"img_size": 200, "patch_size": 1, "stem": (2, 2, 2, 2)},
            (
                "model.img_size 200 is no multiple of model.patch_size 1 (cells of 32 px behind the stem): "
                "use model.img_size=192 or 224"
            ),
        ),
        (
            {"num_heads": 5},
            (
                "model.embed_dim 12 is no multiple of model.num_heads 5: "
                "use model.embed_dim=10 or 15, or another model.num_heads"
            ),
        ),
        (
            {"embed_dim": 3, "num_heads": 5},
            "model.embed_dim 3 is no multiple of model.num_heads 5: use model.embed_dim=5, or another model.num_heads",
        ),
        (
            {"distilled": True, "pool": "avg"},
            "model.distilled needs a class token beside its own: not model.pool=avg",
        ),
        (
            {"distilled": True, "pool": "map"},
            "model.distilled needs a class token beside its own: not model.pool=map",
        ),
        (
            {"distilled": True, "representation_size": 6},
            (
                "model.representation_size 6 does not go with model.distilled, whose two heads read their tokens: "
                "use model.representation_size=0"
            ),
        ),
    ],
)
def test_what_makes_no_model_is_refused_in_one_line(changes, message):
    assert error_of(**changes) == message


WRONG = {
    "a whole number of pixels, or [height, width],": {
        "img_size": [0, "8", 8.0, None, True, (8,), (8, 8, 8), [8, 0]],
        "patch_size": [0, -4, "4", (4, 0), {4: 4}],
    },
    "a whole number from 1 on": {
        name: [0, -1, 2.0, "2", None, True, 2**31 + 1] for name in ("embed_dim", "depth", "num_heads", "in_chans")
    },
    "a whole number from 0 on": {
        name: [-1, 1.0, "1", None, False] for name in ("representation_size", "num_classes", "reg_tokens")
    },
    "a number above 0": {
        name: [0.0, -1.0, float("nan"), float("inf"), "4", None, True] for name in ("mlp_ratio", "norm_eps")
    },
    "a number from 0 on": {"layer_scale": [-1e-4, float("nan"), None, False]},
    "one of token, avg, map": {"pool": ["mean", None, ["avg"]]},
    "one of gelu, gelu_tanh, swiglu": {"act": ["relu", None, 0]},
    "true or false": {
        name: [0, 1, None, "true"] for name in ("qkv_bias", "distilled", "qk_norm", "parallel", "norm_bias")
    },
    "a list of whole numbers from 1 on, or none,": {"stem": [3, (0,), (1, -2), (1, "2"), "12", False]},
}


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [(field, value, wanted) for wanted, kinds in WRONG.items() for field, values in kinds.items() for value in values],
)
def test_a_value_of_another_kind_is_refused_with_what_is_wanted(field, value, wanted):
    shown = tuple(value) if isinstance(value, list) and field in {"img_size", "patch_size", "stem"} else value
    assert error_of(**{field: value}) == f"model.{field} {shown!r}: {wanted} is wanted"


def test_every_field_has_a_kind():
    assert {field for kinds in WRONG.values() for field in kinds} == {field.name for field in fields(Variant)}


def test_the_factory_passes_the_refusal_on():
    with pytest.raises(ConfigError, match=r"^model\.img_size 384 is no multiple of model\.patch_size 14: use"):
        create_model("vit_huge_patch14_224", num_classes=10, img_size=384)


@pytest.mark.parametrize("field", ["img_size", "patch_size"])
@pytest.mark.parametrize(
    ("size", "kept"),
    [(224, 224), ((224, 224), 224), ([224, 224], 224), ((224, 448), (224, 448)), ([448, 224], (448, 224))],
)
def test_a_size_is_one_side_or_a_pair_of_two(field, size, kept):
    variant = Variant(**{**SMALL, "img_size": 448, "patch_size": 4, field: size})
    assert getattr(variant, field) == kept
    assert type(getattr(variant, field)) is type(kept)
    pair = variant.image_px if field == "img_size" else variant.patch_kernel
    assert pair == ((kept, kept) if isinstance(kept, int) else kept)


def test_variants_that_are_equal_have_one_hash():
    listed = Variant(**{**SMALL, "img_size": [32, 64], "stem": [1, 2], "patch_size": [1, 2]})
    tupled = Variant(**{**SMALL, "img_size": (32, 64), "stem": (1, 2), "patch_size": (1, 2)})
    assert len({listed, tupled}) == 1
    assert listed.stem == (1, 2)


def test_a_variant_does_not_change():
    with pytest.raises(FrozenInstanceError):
        VARIANTS["vit_base_patch16_224"].depth = 3


@pytest.mark.parametrize(("stem", "stride"), [(None, 1), ((), 4), ((2,), 4), ((2, 2), 8), ((3, 4, 9), 16)])
def test_a_stem_widens_the_patch(stem, stride):
    variant = Variant(**{**SMALL, "stem": stem, "patch_size": (1, 2), "img_size": (64, 96)})
    assert variant.stem_stride == stride
    assert variant.patch_px == (stride, 2 * stride)
    assert variant.grid == (64 // stride, 96 // (2 * stride))


@given(
    patch=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    grid=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 16),
    pool=st.sampled_from(["token", "avg", "map"]),
    distilled=st.booleans(),
    reg_tokens=st.integers(0, 4),
)
def test_derived_sizes(patch, grid, heads, head_dim, pool, distilled, reg_tokens):
    variant = Variant(
        patch_size=patch,
        embed_dim=heads * head_dim,
        depth=1,
        num_heads=heads,
        img_size=(patch[0] * grid[0], patch[1] * grid[1]),
        pool=pool,
        distilled=distilled and pool == "token",
        reg_tokens=reg_tokens,
    )
    assert variant.grid == grid
    assert variant.patches == grid[0] * grid[1]
    assert variant.prefix_tokens == reg_tokens + (0 if pool != "token" else 2 if distilled else 1)
    assert variant.tokens == variant.patches + variant.prefix_tokens
    assert variant.head_dim == head_dim
    assert variant.mlp_hidden == 4 * heads * head_dim
    assert variant.head_input == variant.embed_dim
    assert replace(variant, distilled=False, representation_size=7).head_input == 7


def test_hidden_width_is_rounded_not_cut_off():
    assert replace(VARIANTS["vit_giant_patch14_224"], mlp_ratio=4.3636).mlp_hidden == 6144


@pytest.mark.parametrize("name", VARIANTS)
def test_the_arguments_of_a_variant_make_it_again(name):
    variant = VARIANTS[name]
    assert set(variant.arguments()) == {field.name for field in fields(Variant)}
    assert Variant(**variant.arguments()) == variant


def test_an_mlp_without_units_is_none():
    with pytest.raises(ConfigError) as caught:
        replace(VARIANTS["vit_tiny_patch16_224"], mlp_ratio=0.001)
    assert str(caught.value) == "model.mlp_ratio 0.001 of model.embed_dim 192 leaves no hidden unit"
