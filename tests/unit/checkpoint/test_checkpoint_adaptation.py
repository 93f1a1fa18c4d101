"""Weights for another task: what may differ is adapted, what may not is named with its mend."""

from dataclasses import replace

import pytest
import torch
import yaml
from portable_models import images_for, random_portable, with_weights

from vitscale.checkpoint import (
    ExportOptions,
    adapt_to,
    check_trunk,
    load_into,
    read_portable,
    without_head,
    write_portable,
)
from vitscale.checkpoint.adaptation import _TRUNK
from vitscale.checkpoint.portable import LazyWeights
from vitscale.errors import CheckpointError
from vitscale.model import VisionTransformer, adapt_in_chans, resample_pos_embed

HEAD = {"head.weight", "head.bias"}
REPRESENTATION = {"pre_logits.fc.weight", "pre_logits.fc.bias"}


def adapted(model, method="timm", **changes):
    return adapt_to(model, replace(model.variant, **changes), method)


def changed(before, after):
    """Names of the tensors that are not the same before and after, or only there."""
    names = before.weights.keys() | after.weights.keys()
    return {
        name
        for name in names
        if name not in before.weights
        or name not in after.weights
        or not torch.equal(before.weights[name], after.weights[name])
    }


def test_the_same_architecture_is_the_same_model():
    model = random_portable(representation_size=7, reg_tokens=2)
    back = adapt_to(model, model.variant)
    assert changed(model, back) == set()
    assert (back.variant, back.labels, back.origin) == (model.variant, model.labels, model.origin)
    assert back.weights.keys() == model.shapes.keys()


@pytest.mark.parametrize("method", ["timm", "timm_npz", "google"])
@pytest.mark.parametrize("changes", [{}, {"distilled": True, "reg_tokens": 2}, {"pool": "map"}], ids=str)
@pytest.mark.parametrize(("old", "new"), [(32, 48), (48, 16), ((32, 48), 24), (32, (16, 64))])
def test_another_image_size_resizes_the_position_embedding_and_nothing_else(old, new, changes, method):
    model = random_portable(img_size=old, **changes)
    after = adapted(model, method, img_size=new)
    assert after.variant.img_size == new
    assert changed(model, after) == {"pos_embed"}
    expected = resample_pos_embed(
        model.weights["pos_embed"],
        after.variant.grid,
        model.variant.prefix_tokens,
        old_grid=model.variant.grid,
        method=method,
    )
    assert torch.equal(after.weights["pos_embed"], expected)
    assert after.labels == model.labels
    assert after.build(torch.float64)(images_for(after)).shape == (2, 5)


def test_without_a_word_the_position_embedding_is_resized_as_timm_does():
    model = random_portable()
    assert changed(adapted(model, img_size=48), adapted(model, "timm", img_size=48)) == set()
    assert changed(adapted(model, img_size=48), adapted(model, "google", img_size=48)) == {"pos_embed"}


@pytest.mark.parametrize(
    ("format_", "method"),
    [("vitscale", "timm"), ("timm", "timm"), ("hf", "timm"), ("npz", "google"), ("big_vision", "google")],
)
def test_an_export_resizes_the_position_embedding_as_its_target_would(tmp_path, format_, method):
    model = random_portable()
    certificate = write_portable(model, tmp_path / "out", ExportOptions(format=format_, img_size=48))
    assert certificate.model["img_size"] == 48
    assert changed(adapted(model, method, img_size=48), read_portable(tmp_path / "out")) == set()


@pytest.mark.parametrize("method", ["timm", "timm_npz", "google"])
def test_an_export_resizes_the_position_embedding_as_it_is_told(tmp_path, method):
    model = random_portable()
    for format_ in ("timm", "npz"):
        options = ExportOptions(format=format_, img_size=(16, 48), pos_embed=method)
        write_portable(model, tmp_path / format_, options)
        assert changed(adapted(model, method, img_size=(16, 48)), read_portable(tmp_path / format_)) == set()


def test_a_way_of_resizing_without_a_size_is_refused():
    with pytest.raises(CheckpointError, match="--pos-embed says how a position embedding is resized: give --img-size"):
        ExportOptions(pos_embed="google")


@pytest.mark.parametrize("in_chans", [1, 4, 6])
@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "patch_embed.proj.weight"),
        ({"stem": (), "patch_size": 2}, "patch_embed.backbone.conv.weight"),
        ({"stem": (1, 1), "patch_size": 1}, "patch_embed.backbone.stem.conv.weight"),
    ],
)
def test_other_channels_change_the_convolution_that_reads_the_image_and_nothing_else(changes, first, in_chans):
    model = random_portable(**changes)
    after = adapted(model, in_chans=in_chans)
    assert changed(model, after) == {first}
    assert torch.equal(after.weights[first], adapt_in_chans(model.weights[first], in_chans))
    assert after.build(torch.float64)(images_for(after)).shape == (2, 5)


@pytest.mark.parametrize(
    ("own", "heads"), [({}, HEAD), ({"distilled": True}, {*HEAD, "head_dist.weight", "head_dist.bias"})]
)
@pytest.mark.parametrize("num_classes", [0, 4, 1000])
def test_a_head_for_another_number_of_classes_is_dropped_with_its_labels(own, heads, num_classes):
    model = random_portable(**own)
    after = adapted(model, num_classes=num_classes)
    assert after.variant.num_classes == 0
    assert after.labels == ()
    assert changed(model, after) == heads
    assert heads.isdisjoint(after.weights)


@pytest.mark.parametrize("own", [{}, {"distilled": True}, {"representation_size": 7}], ids=str)
def test_a_head_for_as_many_classes_stays_with_its_labels(own):
    model = random_portable(**own)
    after = adapted(model, num_classes=5, img_size=48)
    assert after.labels == model.labels
    assert changed(model, after) == {"pos_embed"}


def test_a_model_without_head_gets_none():
    model = random_portable(num_classes=0)
    after = adapted(model, num_classes=5)
    assert after.variant.num_classes == 0
    assert changed(model, after) == set()


@pytest.mark.parametrize("num_classes", [5, 4, 0])
def test_where_the_representation_layer_is_dropped_the_head_behind_it_goes_too(num_classes):
    model = random_portable(representation_size=24)  # as wide as the tokens: the head would fit
    after = adapted(model, representation_size=0, num_classes=num_classes)
    assert changed(model, after) == {*HEAD, *REPRESENTATION}
    assert (after.variant.representation_size, after.variant.num_classes, after.labels) == (0, 0, ())


def test_the_representation_layer_stays_under_a_head_of_other_classes():
    model = random_portable(representation_size=7)
    after = adapted(model, num_classes=4)
    assert after.variant.representation_size == 7
    assert changed(model, after) == HEAD


@pytest.mark.parametrize("own", [0, 7])
def test_a_representation_layer_of_another_width_is_refused(own):
    said = (
        rf"run/step-00000001 has a representation layer of {own}, the model of 9: set model\.representation_size={own}$"
    )
    with pytest.raises(CheckpointError, match=said):
        adapted(random_portable(representation_size=own), representation_size=9)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(("own", "wanted"), [(2, 5), (5, 2), (0, 3), (3, 0)])
def test_registers_are_kept_as_far_as_there_are_and_wanted_and_new_ones_are_zero(own, wanted, pool):
    model = random_portable(reg_tokens=own, pool=pool)
    after = adapted(model, reg_tokens=wanted)
    assert changed(model, after) == {"reg_token", "pos_embed"}
    kept = min(own, wanted)
    if wanted:
        found = after.weights["reg_token"]
        assert found.shape == (1, wanted, 24)
        assert not found[:, kept:].any()
        if kept:
            assert torch.equal(found[:, :kept], model.weights["reg_token"][:, :kept])
    before_registers = pool == "token"
    old, new = model.weights["pos_embed"], after.weights["pos_embed"]
    assert torch.equal(new[:, : before_registers + kept], old[:, : before_registers + kept])
    assert not new[:, before_registers + kept : before_registers + wanted].any()
    assert torch.equal(new[:, before_registers + wanted :], old[:, before_registers + own :])
    assert after.build(torch.float64)(images_for(after)).shape == (2, 5)


def test_everything_at_once():
    model = random_portable(distilled=True, reg_tokens=1)
    after = adapted(model, img_size=(48, 16), in_chans=1, reg_tokens=4, num_classes=9)
    assert (after.variant.img_size, after.variant.in_chans, after.variant.reg_tokens) == ((48, 16), 1, 4)
    assert after.build(torch.float64).forward_features(images_for(after)).shape == (2, 2 + 4 + 12, 24)


def test_a_model_at_another_size_still_sees_the_image_much_as_before():
    """Not only shapes: an image at twice the size gives nearly the features that it gave."""
    model = random_portable(img_size=64, patch_size=4, depth=1)
    # A smooth position embedding, as training gives.
    pos_embed = model.weights["pos_embed"].clone()
    pos_embed[:, 1:] = torch.linspace(-1, 1, 256).view(1, 256, 1) * torch.linspace(0.5, 1, 24)
    model = with_weights(model, pos_embed=pos_embed)
    with torch.no_grad():
        image = torch.full((1, 3, 64, 64), 0.5, dtype=torch.float64)
        before = model.build(torch.float64)(image)
        twice = adapted(model, img_size=128).build(torch.float64)(image.repeat(1, 1, 2, 2))
        wrong = adapted(with_weights(model, pos_embed=pos_embed.flip(1)), img_size=128).build(torch.float64)(
            image.repeat(1, 1, 2, 2)
        )
    assert (twice - before).abs().max() < 0.02 < (wrong - before).abs().max()


def test_nothing_is_read_before_it_is_asked_for():
    model, read = random_portable(), []
    lazy = LazyWeights({name: lambda name=name: read.append(name) or model.weights[name] for name in model.weights})
    after = adapted(replace(model, weights=lazy), img_size=48, num_classes=0)
    assert read == []
    _ = after.weights["pos_embed"], after.weights["norm.bias"]
    assert read == ["pos_embed", "norm.bias"]


# Another trunk.

OTHER_TRUNKS = {
    "patch_size": ({"patch_size": 16}, "has patch_size 8, the model 16: set model.patch_size=8"),
    "embed_dim": ({"embed_dim": 48}, "has embed_dim 24, the model 48: set model.embed_dim=24"),
    "depth": ({"depth": 3}, "has depth 2, the model 3: set model.depth=2"),
    "num_heads": ({"num_heads": 3}, "has num_heads 2, the model 3: set model.num_heads=2"),
    "mlp_hidden": ({"mlp_ratio": 2.0}, "has mlp_hidden 96, the model 48: set model.mlp_ratio=4.0"),
    "qkv_bias": ({"qkv_bias": False}, "has qkv_bias True, the model False: set model.qkv_bias=True"),
    "layer_scale": ({"layer_scale": 0.1}, "has layer_scale False, the model True: set model.layer_scale=0.0"),
    "qk_norm": ({"qk_norm": True}, "has qk_norm False, the model True: set model.qk_norm=False"),
    "parallel": ({"parallel": True}, "has parallel False, the model True: set model.parallel=False"),
    "act": ({"act": "gelu_tanh"}, "has act gelu, the model gelu_tanh: set model.act=gelu"),
    "norm_bias": ({"norm_bias": False}, "has norm_bias True, the model False: set model.norm_bias=True"),
    "norm_eps": ({"norm_eps": 1e-12}, "has norm_eps 1e-06, the model 1e-12: set model.norm_eps=1e-06"),
    "stem": ({"stem": ()}, "has stem None, the model (): set model.stem=null"),
}


def test_every_difference_of_the_trunk_has_a_case():
    assert OTHER_TRUNKS.keys() == set(_TRUNK)


@pytest.mark.parametrize("refuse", [check_trunk, adapt_to])
@pytest.mark.parametrize("key", OTHER_TRUNKS)
def test_another_trunk_is_refused_by_the_key_that_differs_and_its_mend(key, refuse):
    changes, said = OTHER_TRUNKS[key]
    model = random_portable()
    with pytest.raises(CheckpointError) as error:
        refuse(model, replace(model.variant, **changes))
    assert str(error.value) == f"run/step-00000001 {said}"


@pytest.mark.parametrize("key", OTHER_TRUNKS)
def test_the_mend_makes_the_two_fit(key):
    """As it is typed: `KEY=VALUE` with the value read as YAML."""
    model = random_portable()
    target = replace(model.variant, **OTHER_TRUNKS[key][0])
    with pytest.raises(CheckpointError) as error:
        check_trunk(model, target)
    setting, _, text = str(error.value).rpartition("set model.")[2].partition("=")
    value = yaml.safe_load(text)
    check_trunk(model, replace(target, **{setting: float(value) if setting == "norm_eps" else value}))


@pytest.mark.parametrize(
    ("own", "changes", "mend"),
    [
        ({"patch_size": (8, 16)}, {"patch_size": 8}, "set model.patch_size=[8,16]"),
        ({"stem": (1, 1), "patch_size": 1}, {"stem": (2, 2)}, "set model.stem=[1,1]"),
        ({"stem": (), "patch_size": 2}, {"stem": None}, "set model.stem=[]"),
        ({"layer_scale": 0.25}, {"layer_scale": 0.0}, "set model.layer_scale=0.25"),
        ({"mlp_ratio": 48 / 11}, {"mlp_ratio": 4.0}, f"set model.mlp_ratio={48 / 11}"),
    ],
    ids=str,
)
def test_a_mend_is_a_value_that_can_be_typed(own, changes, mend):
    model = random_portable(**own)
    with pytest.raises(CheckpointError) as error:
        check_trunk(model, replace(model.variant, **changes))
    assert str(error.value).endswith(mend)


def test_the_first_difference_is_named():
    model = random_portable()
    with pytest.raises(CheckpointError, match="has depth 2, the model 3"):
        adapted(model, act="gelu_tanh", depth=3, qk_norm=True)


def test_what_differs_without_changing_the_trunk_is_let_through():
    model = random_portable(layer_scale=0.1, mlp_ratio=3.3)
    target = replace(
        model.variant, layer_scale=1e-5, mlp_ratio=79 / 24, img_size=16, in_chans=1, reg_tokens=1, num_classes=3
    )
    check_trunk(model, target)
    assert changed(model, adapt_to(model, target)) == {
        "pos_embed", "reg_token", "patch_embed.proj.weight", *HEAD
    }  # fmt: skip


# Another pooling: any trunk can be averaged, and no other pooling comes from nothing.


@pytest.mark.parametrize(
    ("own", "gone"),
    [
        ({}, {"cls_token"}),
        ({"reg_tokens": 2}, {"cls_token"}),
        ({"distilled": True}, {"cls_token", "dist_token", "head_dist.weight", "head_dist.bias"}),
        ({"pool": "map"}, {name for name in random_portable(pool="map").weights if name.startswith("attn_pool.")}),
    ],
)
def test_any_trunk_can_be_averaged_without_the_tokens_and_heads_of_its_own_pooling(own, gone):
    model = random_portable(**own)
    after = adapted(model, pool="avg", distilled=False)
    assert (after.variant.pool, after.variant.num_classes, after.labels) == ("avg", 0, ())
    tokens = model.variant.prefix_tokens - model.variant.reg_tokens
    assert changed(model, after) == gone | HEAD | ({"pos_embed"} if tokens else set())
    assert torch.equal(after.weights["pos_embed"], model.weights["pos_embed"][:, tokens:])
    assert after.build(torch.float64)(images_for(after)).shape == (2, 24)


def test_a_distilled_trunk_goes_on_without_its_second_token_and_heads():
    model = random_portable(distilled=True, reg_tokens=1)
    after = adapted(model, distilled=False, reg_tokens=2)
    heads = {*HEAD, "head_dist.weight", "head_dist.bias"}
    assert changed(model, after) == {"dist_token", "reg_token", "pos_embed", *heads}
    old, new = model.weights["pos_embed"], after.weights["pos_embed"]
    # Class token, the first register, a new one, patches.
    assert torch.equal(new, torch.cat([old[:, :1], old[:, 2:3], torch.zeros(1, 1, 24), old[:, 3:]], dim=1))


@pytest.mark.parametrize(("own", "wanted"), [("token", "map"), ("avg", "token"), ("avg", "map"), ("map", "token")])
def test_a_pooling_that_the_weights_have_nothing_for_is_refused(own, wanted):
    said = (
        f"run/step-00000001 has pool {own}, the model {wanted}: set model.pool={own}, or avg, which any trunk can have"
    )
    for refuse in (check_trunk, adapt_to):
        model = random_portable(pool=own)
        with pytest.raises(CheckpointError) as error:
            refuse(model, replace(model.variant, pool=wanted))
        assert str(error.value) == said


def test_a_distillation_token_that_the_weights_do_not_have_is_refused():
    said = "run/step-00000001 has no distillation token, the model has one: set model.distilled=false"
    model = random_portable()
    with pytest.raises(CheckpointError) as error:
        adapted(model, distilled=True)
    assert str(error.value) == said


# Into a built model.


def test_weights_are_copied_into_a_model_and_its_fresh_head_stays():
    model = random_portable()
    built = VisionTransformer(replace(model.variant, num_classes=9, img_size=48))
    with torch.no_grad():
        built.head.weight.normal_()
    head, places = built.head.weight.clone(), {name: tensor.data_ptr() for name, tensor in built.state_dict().items()}
    source = adapted(model, num_classes=0, img_size=48)
    load_into(built, source)
    state = built.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == places
    assert torch.equal(built.head.weight, head)
    assert state.keys() - source.weights.keys() == HEAD
    assert all(torch.equal(state[name], tensor) for name, tensor in source.weights.items())


def test_weights_are_rounded_to_the_models_dtype():
    model = random_portable()
    built = VisionTransformer(model.variant).bfloat16()
    load_into(built, model)
    assert torch.equal(built.pos_embed, model.weights["pos_embed"].bfloat16())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_chans": 3}, r"patch_embed\.proj\.weight has shape \[24, 1, 8, 8\], the model wants \[24, 3, 8, 8\]"),
        ({"img_size": 48, "in_chans": 1}, r"pos_embed has shape \[1, 17, 24\], the model wants \[1, 37, 24\]"),
        ({"num_classes": 0, "in_chans": 1}, r"head\.weight \[5, 24\] has no place in this model"),
    ],
)
def test_weights_that_do_not_fit_a_model_are_refused_before_any_is_copied(changes, said):
    """One channel would be broadcast to three without a word."""
    model = random_portable(in_chans=1)
    built = VisionTransformer(replace(model.variant, **changes))
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"run/step-00000001: {said}"):
        load_into(built, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())


def test_damaged_weights_are_not_copied():
    damaged = with_weights(random_portable(), norm__bias=torch.full((24,), float("nan")))
    with pytest.raises(CheckpointError, match=r"norm\.bias: 24 of 24 values are NaN or infinite"):
        load_into(VisionTransformer(damaged.variant), damaged)


# Features alone.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"representation_size": 7},
        {"num_classes": 0, "representation_size": 7},
        {"distilled": True},
        {"pool": "map"},
    ],
    ids=str,
)
def test_without_head_are_the_features_alone(changes):
    model = random_portable(**changes)
    after = without_head(model)
    assert after.variant == replace(model.variant, num_classes=0, representation_size=0)
    gone = {name for name in model.weights if name.startswith(("head", "pre_logits"))}
    assert changed(model, after) == gone
    assert after.labels == ()
    images = images_for(model)
    with torch.no_grad():
        features = model.build(torch.float64).forward_features(images)
        assert torch.equal(after.build(torch.float64).forward_features(images), features)
