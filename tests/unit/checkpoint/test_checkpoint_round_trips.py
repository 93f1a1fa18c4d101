"""From our model to every format and back: nothing is lost, and what a format cannot hold it refuses by name."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from portable_models import random_portable, randomised

from vitscale.checkpoint import FORMATS, READERS, ExportOptions, read_portable, write_portable
from vitscale.errors import CheckpointError
from vitscale.model import Preprocessing, Variant


@st.composite
def variants(draw):
    """Any small architecture; each option is left off often enough for every format to take many of them."""
    rarely = st.sampled_from([False] * 11 + [True])
    heads, pool = draw(st.integers(1, 3)), draw(st.sampled_from(["token", "token", "avg", "map"]))
    distilled = pool == "token" and draw(rarely)
    stem = draw(st.sampled_from([None] * 8 + [(), (1, 1)]))
    stride = {None: 1, (): 4, (1, 1): 8}[stem]
    patch = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    act = draw(st.sampled_from(["gelu"] * 4 + ["gelu_tanh"] * 4 + ["swiglu"]))
    return Variant(
        patch_size=patch,
        embed_dim=4 * heads,
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_ratio=draw(st.sampled_from([4.0, 2.5, 8 / 3, 48 / 11, 3.3])),
        qkv_bias=not draw(rarely),
        representation_size=0 if distilled else draw(st.sampled_from([0, 0, 5])),
        num_classes=draw(st.integers(0, 4)),
        img_size=(grid[0] * patch[0] * stride, grid[1] * patch[1] * stride),
        in_chans=draw(st.sampled_from([3, 3, 1, 4])),
        pool=pool,
        distilled=distilled,
        reg_tokens=2 * draw(rarely),
        layer_scale=0.1 * draw(rarely),
        qk_norm=draw(rarely),
        parallel=draw(rarely),
        act=act,
        norm_bias=not draw(rarely),
        norm_eps=draw(st.sampled_from([1e-6] * 8 + [1e-12])),
        stem=stem,
    )


pixels = st.builds(
    Preprocessing,
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 1)] * 3),
    crop=st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.8]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)


def there_and_back(model, format_, precision="fp32"):
    """What is read from what was written; the folder is gone afterwards, so the weights are read in full."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        write_portable(model, out, ExportOptions(format=format_, precision=precision))
        assert [name for name, known in READERS.items() if known.recognises(out)] == [format_]
        back = read_portable(out)
        return replace(back, weights={name: back.weights[name].clone() for name in back.weights})


def said_by_arguments(variant):
    """The arguments; the ratio as the width that it stands for, which is all that other formats keep of it."""
    return variant.arguments() | {"mlp_ratio": variant.mlp_hidden}


def shorter_edge(model):
    """Pixels that the shorter side is resized to before the crop."""
    return round(min(model.variant.image_px) / model.preprocessing.crop)


@settings(max_examples=40)
@given(variants(), pixels, st.booleans(), st.data())
def test_what_a_format_does_not_refuse_comes_back_bit_by_bit(variant, preprocessing, labelled, data):
    model = replace(randomised("vit_tiny_patch16_224", variant), preprocessing=preprocessing)
    model = model if labelled else replace(model, labels=())
    accepted = [name for name in FORMATS if not FORMATS[name].refusal(model)]
    assert "vitscale" in accepted
    format_ = data.draw(st.sampled_from(accepted[1:] * 3 + accepted[:1]))  # ours takes all, the others are rarer
    back = there_and_back(model, format_)
    assert said_by_arguments(back.variant) == said_by_arguments(variant)
    assert back.weights.keys() == model.weights.keys()
    for name, tensor in model.weights.items():
        assert back.weights[name].dtype == torch.float32
        assert torch.equal(back.weights[name], tensor), name
    assert back.labels == model.labels
    if format_ != "hf" or variant.in_chans == 3:  # transformers' processors are for RGB images alone
        assert back.preprocessing == preprocessing


# What the strategy above meets by chance, each format meets here for certain.
HELD = {
    "vitscale": [
        {"parallel": True, "pool": "map", "qk_norm": True, "qkv_bias": False, "norm_bias": False},
        {"act": "swiglu", "representation_size": 7}, {"stem": (1, 1), "patch_size": 1}, {"norm_eps": 1e-3},
        {"distilled": True, "num_classes": 0},
    ],
    "timm": [
        {}, {"pool": "avg"}, {"pool": "map", "reg_tokens": 3}, {"qk_norm": True, "layer_scale": 0.5},
        {"distilled": True, "layer_scale": 0.5}, {"qkv_bias": False, "act": "gelu_tanh"},
        {"stem": (), "patch_size": 2}, {"mlp_ratio": 60 / 22, "embed_dim": 22},
        {"img_size": (32, 48), "patch_size": (8, 16), "in_chans": 4}, {"num_classes": 0}, {"mlp_ratio": 3.3},
    ],
    "hf": [
        {}, {"distilled": True}, {"num_classes": 0}, {"num_classes": 0, "representation_size": 7},
        {"act": "gelu_tanh", "norm_eps": 1e-12}, {"qkv_bias": False}, {"num_classes": 1}, {"num_classes": 2},
        {"img_size": (32, 48), "patch_size": (8, 16), "in_chans": 4}, {"mlp_ratio": 3.3},
    ],
    "npz": [
        {}, {"pool": "avg"}, {"representation_size": 7}, {"act": "gelu_tanh"}, {"stem": (), "patch_size": 2},
        {"stem": (1, 2), "patch_size": 1}, {"img_size": (32, 48), "patch_size": (8, 16), "in_chans": 4},
        {"num_classes": 0}, {"num_classes": 0, "representation_size": 7},
    ],
    "big_vision": [
        {}, {"pool": "avg"}, {"pool": "map"}, {"pool": "map", "representation_size": 7}, {"representation_size": 7},
        {"img_size": (32, 48), "patch_size": (8, 16), "in_chans": 4}, {"num_classes": 0, "pool": "map"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("format_", "changes"), [pytest.param(f, c, id=f"{f}-{c}") for f, many in HELD.items() for c in many]
)
def test_a_model_of_each_kind_comes_back(format_, changes):
    model = random_portable(**changes)
    back = there_and_back(model, format_)
    assert said_by_arguments(back.variant) == said_by_arguments(model.variant)
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in model.weights.items())
    assert back.labels == model.labels


@pytest.mark.parametrize("format_", ["vitscale", "timm", "hf"])
def test_bf16_comes_back_rounded_and_no_other(format_):
    model = random_portable()
    back = there_and_back(model, format_, "bf16")
    changed = 0
    for name, tensor in model.weights.items():
        assert torch.equal(back.weights[name], tensor.bfloat16().float())
        changed += not torch.equal(back.weights[name], tensor)
    assert changed > 20  # the rounding is not of nothing


@pytest.mark.parametrize("format_", ["npz", "big_vision"])
def test_bf16_is_refused_where_numpy_would_have_to_hold_it(format_):
    said = f"--precision bf16: NumPy has no bf16, so format {format_} is fp32 only"
    with pytest.raises(CheckpointError) as error:
        ExportOptions(format=format_, precision="bf16")
    assert str(error.value) == said


@pytest.mark.parametrize("format_", FORMATS)
def test_any_crop_comes_back(format_):
    model = random_portable()
    model = replace(model, preprocessing=replace(model.preprocessing, crop=0.8765432101))
    assert there_and_back(model, format_).preprocessing == model.preprocessing


@pytest.mark.parametrize("crop", [1.0, 0.95, 0.9, 0.875, 0.8, 224 / 248])
@pytest.mark.parametrize("img_size", [224, 518, (224, 288)])
def test_without_our_word_for_it_the_crop_is_the_roundest_that_gives_transformers_whole_pixels(
    tmp_path, crop, img_size
):
    patch = 14 if img_size == 518 else 16
    model = random_portable(img_size=img_size, patch_size=patch, embed_dim=4, depth=1)
    model = replace(model, preprocessing=replace(model.preprocessing, crop=crop))
    write_portable(model, tmp_path / "out", ExportOptions(format="hf"))
    path = tmp_path / "out" / "preprocessor_config.json"
    processor = json.loads(path.read_text(encoding="utf-8"))
    assert processor.pop("crop_pct") == crop
    path.write_text(json.dumps(processor), encoding="utf-8")
    back = read_portable(tmp_path / "out")
    assert shorter_edge(back) == shorter_edge(model)
    if crop in {1.0, 0.95, 0.9, 0.875}:
        assert back.preprocessing.crop == crop


def test_transformers_placeholder_labels_are_no_labels():
    model = replace(random_portable(), labels=())
    assert there_and_back(model, "hf").labels == ()


def test_labels_with_the_same_name_all_come_back():
    """ImageNet's two cranes and two maillots have one word each."""
    model = replace(random_portable(), labels=("crane", "n2", "crane", "n4", "maillot"))
    for format_ in FORMATS:
        assert there_and_back(model, format_).labels == model.labels


def test_labels_stay_in_order_beyond_ten():
    model = random_portable(num_classes=12)
    assert model.labels[10] == "n00000010"
    for format_ in FORMATS:
        assert there_and_back(model, format_).labels == model.labels


def test_big_vision_keeps_both_parts_of_the_class_tokens_sum():
    """Zeros with the signs that a sum would lose, too."""
    model = random_portable()
    cls_token = model.weights["cls_token"].clone()
    cls_token[..., 0] = -0.0
    model = replace(model, weights={**model.weights, "cls_token": cls_token})
    back = there_and_back(model, "big_vision")
    assert back.weights["cls_token"].view(torch.int32).equal(cls_token.view(torch.int32))
    assert torch.equal(back.weights["pos_embed"], model.weights["pos_embed"])


TIMM_HEAD = (
    "timm has no representation layer, and the head reads 7 features behind a tanh: the logits would be others. "
    "Export the features with --features-only"
)
HF_HEAD = (
    "ViTForImageClassification has no representation layer, and the head reads 7 features behind a tanh: the logits "
    "would be others. ViTModel keeps the layer as its pooler: --features-only"
)
REFUSED = [
    ("timm", {"representation_size": 7}, TIMM_HEAD),
    ("timm", {"representation_size": 7, "num_classes": 0},
     "timm has no representation layer: export the features before it with --features-only"),
    ("timm", {"norm_eps": 1e-5}, "timm's LayerNorm has an epsilon of 1e-6, this model's is 1e-05"),
    ("timm", {"stem": (1, 1), "patch_size": 1},
     "timm has no hybrid with ResNet stages [1, 1]; it has [[], [2, 2, 2, 2], [3, 4, 9], [3, 4, 6, 3]]"),
    ("timm", {"distilled": True, "reg_tokens": 1}, "timm's distilled model has no register tokens"),
    ("timm", {"distilled": True, "stem": (), "patch_size": 2}, "timm's distilled model has no ResNet stem"),
    ("timm", {"parallel": True}, "no entry point of timm takes parallel blocks from a config"),
    ("timm", {"act": "swiglu"}, "no entry point of timm takes SwiGLU from a config"),
    ("timm", {"norm_bias": False, "parallel": True},
     "no entry point of timm takes parallel blocks or LayerNorm without bias from a config"),
    ("hf", {"representation_size": 7}, HF_HEAD),
    ("hf", {"distilled": True, "num_classes": 0},
     "transformers' headless DeiT has a pooler of its own: export with the heads"),
    ("hf", {"pool": "avg"}, "transformers' ViT has no pool 'avg' without class token"),
    ("hf", {"pool": "map"}, "transformers' ViT has no pool 'map' without class token"),
    ("hf", {"reg_tokens": 1}, "transformers' ViT has no register tokens"),
    ("hf", {"layer_scale": 0.1}, "transformers' ViT has no LayerScale"),
    ("hf", {"qk_norm": True}, "transformers' ViT has no normalised queries and keys"),
    ("hf", {"parallel": True}, "transformers' ViT has no parallel blocks"),
    ("hf", {"act": "swiglu"}, "transformers' ViT has no SwiGLU"),
    ("hf", {"norm_bias": False}, "transformers' ViT has no LayerNorm without bias"),
    ("hf", {"stem": (), "patch_size": 2, "reg_tokens": 1},
     "transformers' ViT has no register tokens and no ResNet stem"),
    ("npz", {"pool": "map"}, "Google's npz layout has no attention pooling"),
    *(
        case for layout in ("npz", "big_vision") for case in (
            (layout, {"distilled": True}, f"Google's {layout} layout has no distillation token"),
            (layout, {"reg_tokens": 1}, f"Google's {layout} layout has no register tokens"),
            (layout, {"layer_scale": 0.1}, f"Google's {layout} layout has no LayerScale"),
            (layout, {"qk_norm": True}, f"Google's {layout} layout has no normalised queries and keys"),
            (layout, {"parallel": True}, f"Google's {layout} layout has no parallel blocks"),
            (layout, {"act": "swiglu"}, f"Google's {layout} layout has no SwiGLU"),
            (layout, {"norm_bias": False}, f"Google's {layout} layout has no LayerNorm without bias"),
            (layout, {"qkv_bias": False}, f"Google's {layout} layout has no attention without bias"),
            (layout, {"norm_eps": 1e-12}, f"Google's {layout} layout has no LayerNorm with an epsilon of 1e-12"),
            (layout, {"qk_norm": True, "layer_scale": 0.1},
             f"Google's {layout} layout has no LayerScale and no normalised queries and keys"),
        )
    ),
    ("big_vision", {"stem": (), "patch_size": 2}, "Google's big_vision layout has no ResNet stem"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("format_", "changes", "reason"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in REFUSED]
)
def test_a_format_refuses_what_it_cannot_hold_and_says_why(tmp_path, format_, changes, reason):
    with pytest.raises(CheckpointError) as error:
        write_portable(random_portable(**changes), tmp_path / "out", ExportOptions(format=format_))
    assert str(error.value) == f"--format {format_}: {reason}"
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_is_only_read_is_not_written():
    assert READERS.keys() - FORMATS.keys() == {"state_dict", "deepspeed"}
    with pytest.raises(
        CheckpointError, match="--format state_dict: the formats that can be written are vitscale, timm"
    ):
        ExportOptions(format="state_dict")


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("num_classes", [0, 5])
def test_features_only_leaves_the_head_out_and_the_representation_layer_where_there_is_no_place(
    tmp_path, format_, num_classes
):
    model = random_portable(representation_size=7, num_classes=num_classes)
    write_portable(model, tmp_path / "out", ExportOptions(format=format_, features_only=True))
    back = read_portable(tmp_path / "out")
    kept = 0 if format_ == "timm" else 7
    assert back.variant == replace(model.variant, num_classes=0, representation_size=kept)
    assert ("pre_logits.fc.weight" in back.weights) == (kept > 0)
    assert back.labels == ()
    for name in back.weights:
        assert torch.equal(back.weights[name], model.weights[name])


def test_features_only_does_not_make_a_format_hold_what_it_cannot(tmp_path):
    with pytest.raises(CheckpointError, match=r"--format hf: transformers' ViT has no register tokens$"):
        write_portable(
            random_portable(reg_tokens=1, representation_size=7),
            tmp_path / "out",
            ExportOptions(format="hf", features_only=True),
        )


@pytest.mark.parametrize("order", [list(FORMATS), list(FORMATS)[::-1]], ids="-".join)
def test_a_model_goes_from_format_to_format_and_stays_what_it_is(tmp_path, order):
    model = at = random_portable()
    for format_ in [*order, order[0]]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}-{format_}"
        write_portable(at, folder, ExportOptions(format=format_))
        at = read_portable(folder)
    assert said_by_arguments(at.variant) == said_by_arguments(model.variant)
    assert all(torch.equal(at.weights[name], tensor) for name, tensor in model.weights.items())
    assert (at.labels, at.preprocessing) == (model.labels, model.preprocessing)
