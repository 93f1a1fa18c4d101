import ast
import csv
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from small_models import count

from vitscale.errors import ConfigError
from vitscale.model import TABLE, VARIANTS, Preprocessing, VisionTransformer, create_model, resolve_variant

IN21K = 21_843
PIXELS = {
    "INCEPTION(0.5)": (0.5, 0.5, 0.5),
    "IMAGENET_DEFAULT_MEAN": (0.485, 0.456, 0.406),
    "IMAGENET_DEFAULT_STD": (0.229, 0.224, 0.225),
    "(0, 0, 0)": (0.0, 0.0, 0.0),
    "(1, 1, 1)": (1.0, 1.0, 1.0),
}
GOLDEN = {
    row["name"]: row
    for row in csv.DictReader((Path(__file__).parents[2] / "golden/variants.csv").read_text().splitlines())
}


def on_meta(name, **changes):
    with torch.device("meta"):
        return VisionTransformer(replace(VARIANTS[name], **changes))


def classifier_names(model):
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    names = tuple(name for head in heads for name, module in model.named_modules() if module is head)
    return names if len(names) > 1 else names[0]


def test_the_golden_rows_are_the_first_44_of_the_table():
    assert len(GOLDEN) == 44
    assert list(TABLE)[:44] == list(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_row_equals_the_golden_row_in_every_column(name):
    row, entry = GOLDEN[name], TABLE[name]
    variant, pixels = entry.variant, entry.preprocessing
    shown = {
        "name": name,
        "patch_size": variant.patch_size,
        "embed_dim": variant.embed_dim,
        "depth": variant.depth,
        "num_heads": variant.num_heads,
        "mlp_ratio": Fraction(variant.mlp_hidden, variant.embed_dim),
        "qkv_bias": variant.qkv_bias,
        "representation_size": variant.representation_size,
        "distilled": variant.distilled,
        "num_classes": variant.num_classes,
        "input_size": (variant.in_chans, *variant.image_px),
        "crop_pct": pixels.crop,
        "interpolation": pixels.interpolation,
        "mean": pixels.mean,
        "std": pixels.std,
        "classifier": classifier_names(on_meta(name)),
        "weights_url": entry.weights_url,
    }
    expected = {
        "name": name,
        **{key: int(row[key]) for key in ("patch_size", "embed_dim", "depth", "num_heads", "num_classes")},
        "mlp_ratio": Fraction(row["mlp_ratio"]),
        "qkv_bias": {"True": True, "False": False}[row["qkv_bias"]],
        "representation_size": int(row["representation_size"] or 0),
        "distilled": {"True": True, "False": False}[row["distilled"]],
        "input_size": ast.literal_eval(row["input_size"]),
        "crop_pct": float(row["crop_pct"]),
        "interpolation": row["interpolation"],
        "mean": PIXELS[row["mean"]],
        "std": PIXELS[row["std"]],
        "classifier": ast.literal_eval(row["classifier"]),
        "weights_url": row["weights_url"] or None,
    }
    assert set(expected) == set(row)
    assert shown == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_row_has_nothing_that_the_columns_do_not_name(name):
    variant, plain = TABLE[name].variant, resolve_variant("vit_base_patch16_224")
    for option in ("reg_tokens", "layer_scale", "qk_norm", "parallel", "act", "norm_bias", "norm_eps", "stem", "pool"):
        assert getattr(variant, option) == getattr(plain, option)


# embed_dim, depth, num_heads and MLP width, of big_vision's vit.py (So400m, e) and of table 1 of the ViT-22B paper.
LARGER = {
    "vit_so400m_patch14_224": (1152, 27, 16, 4304),
    "vit_4b_patch14_224": (1792, 56, 16, 15_360),
    "vit_22b_patch14_224": (6144, 48, 48, 24_576),
}


@pytest.mark.parametrize("name", LARGER)
def test_the_larger_shapes_are_the_papers(name):
    variant = VARIANTS[name]
    assert (variant.embed_dim, variant.depth, variant.num_heads, variant.mlp_hidden) == LARGER[name]
    assert (variant.patch_size, variant.img_size, variant.pool) == (14, 224, "map")


def test_so400m_has_the_parameters_of_siglips_published_tower():
    # 428,225,600 at 384 px, whose 27 x 27 patches have that many more position embeddings than 16 x 16.
    assert count(on_meta("vit_so400m_patch14_224", num_classes=0)) == 428_225_600 - (27**2 - 16**2) * 1152


def test_vit_22b_is_what_its_paper_says():
    model = on_meta("vit_22b_patch14_224")
    matrices = sum(parameter.numel() for parameter in model.blocks.parameters() if parameter.ndim == 2)
    assert f"{matrices / 1e6:.0f}" == "21743"
    block = dict(model.blocks[0].named_parameters())
    assert not {"attn.qkv.bias", "norm1.bias", "norm2.weight"} & set(block)
    assert {"attn.q_norm.weight", "attn.k_norm.weight"} <= set(block)


HYBRIDS = {  # units of each stage, and patches at the row's own size
    "vit_tiny_r_s16_p8_224": ((), 49),
    "vit_tiny_r_s16_p8_384": ((), 144),
    "vit_small_r26_s32_224": ((2, 2, 2, 2), 49),
    "vit_small_r26_s32_384": ((2, 2, 2, 2), 144),
    "vit_base_r50_s16_224": ((3, 4, 9), 196),
    "vit_base_r50_s16_384": ((3, 4, 9), 576),
    "vit_large_r50_s32_224": ((3, 4, 6, 3), 49),
    "vit_large_r50_s32_384": ((3, 4, 6, 3), 144),
    "vit_tiny_r_s16_p8_224_in21k": ((), 49),
    "vit_small_r26_s32_224_in21k": ((2, 2, 2, 2), 49),
    "vit_large_r50_s32_224_in21k": ((3, 4, 6, 3), 49),
}


def test_the_hybrids_are_the_rows_with_a_stem():
    stems = {name: variant for name, variant in VARIANTS.items() if variant.stem is not None}
    assert {name: (variant.stem, variant.patches) for name, variant in stems.items()} == HYBRIDS
    assert {name for name, variant in stems.items() if variant.num_classes == IN21K} == {
        name for name in HYBRIDS if name.endswith("in21k")
    }


def test_every_row_says_where_it_is_from():
    assert list(TABLE) == [*GOLDEN, *HYBRIDS, *LARGER]
    assert {name: entry.variant for name, entry in TABLE.items()} == VARIANTS
    assert all("arXiv" in entry.source or "timm" in entry.source for entry in TABLE.values())
    assert [name for name, entry in TABLE.items() if entry.timm_name is None] == ["vit_base2_patch32_256", *LARGER]


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
    assert count(on_meta(name, num_classes=0)) == trunk
    assert count(on_meta(name, num_classes=IN21K)) == with_head
    if with_representation:
        width = VARIANTS[name].embed_dim
        assert count(on_meta(name, num_classes=IN21K, representation_size=width)) == with_representation


def test_huge_in21k_has_the_representation_layer_of_its_name():
    assert count(on_meta("vit_huge_patch14_224_in21k")) == 660_385_363


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("vit_huge_patch14_224", 5120), ("vit_giant_patch14_224", 6144), ("vit_gigantic_patch14_224", 8192)],
)
def test_hidden_widths_are_exact(name, hidden):
    assert VARIANTS[name].mlp_hidden == hidden


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vit_hug_patch14_224",
            (
                "model.name 'vit_hug_patch14_224' is unknown: did you mean vit_huge_patch14_224 or "
                "vit_4b_patch14_224 or vit_giant_patch14_224?"
            ),
        ),
        ("resnet", f"model.name 'resnet' is unknown: the variants are {', '.join(VARIANTS)}"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    with pytest.raises(ConfigError) as caught:
        create_model(name, num_classes=10)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("embed_dimm", "unknown key model.embed_dimm: did you mean model.embed_dim?"),
        ("zzz", "unknown key model.zzz"),
    ],
)
def test_a_change_of_no_field_is_refused(change, message):
    with pytest.raises(ConfigError) as caught:
        resolve_variant("vit_base_patch16_224", depth=3, **{change: None})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"std": (0.5, 0.0, 0.5)}, "std [0.5, 0.0, 0.5], crop 0.9"),
        ({"std": (0.5, -1.0, 0.5)}, "std [0.5, -1.0, 0.5], crop 0.9"),
        ({"crop": 0.0}, "std [0.5, 0.5, 0.5], crop 0.0"),
        ({"crop": 1.1}, "std [0.5, 0.5, 0.5], crop 1.1"),
    ],
)
def test_pixels_that_no_image_becomes_are_refused(changes, shown):
    with pytest.raises(ConfigError) as caught:
        Preprocessing(**changes)
    assert str(caught.value) == f"pixels: {shown}: std above 0 and 0 < crop <= 1 are wanted"


def test_a_change_to_none_keeps_the_variants_own_value():
    own = VARIANTS["vit_huge_patch14_224_in21k"]
    assert resolve_variant("vit_huge_patch14_224_in21k", depth=None, representation_size=None) == own
    assert resolve_variant("vit_huge_patch14_224_in21k", representation_size=0).representation_size == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_the_factory_builds_every_row_as_it_stands_for_images_of_its_own_size(name):
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = create_model(name, num_classes=variant.num_classes, depth=1).eval()
        logits = model(torch.empty(2, variant.in_chans, *variant.image_px))
    assert model.variant == replace(variant, depth=1)
    assert logits.shape == (2, variant.num_classes or variant.embed_dim)
