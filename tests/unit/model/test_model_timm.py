"""timm as the oracle of the whole table: the same tensors, the same features, the same logits."""

from dataclasses import replace

import pytest
import timm
import torch
from small_models import count, images_for, randomise, shapes
from timm_twins import TOLERANCE, assert_weights_travel_both_ways, timm_of_class, timm_of_row

from vitscale.model import TABLE, VARIANTS, VisionTransformer

# 13 logits show what 21,843 would; timm has no representation layer any more.
COMPARED = {name: replace(v, num_classes=min(v.num_classes, 13), representation_size=0) for name, v in VARIANTS.items()}
# timm fuses the projections of parallel blocks.
NAMED_ALIKE = [name for name, variant in VARIANTS.items() if not variant.parallel]
LEADERS = {}
for name in NAMED_ALIKE:
    LEADERS.setdefault(COMPARED[name], name)
# The dearest; each has a twin of another size among the rest.
DEAR = {
    "vit_base_patch16_384",
    "vit_base_patch8_224",
    "vit_small_patch8_224_dino",
    "vit_base_patch8_224_dino",
    "deit_base_distilled_patch16_384",
    "vit_base_r50_s16_384",
}
FULL = [
    pytest.param(name, marks=pytest.mark.slow) if name in DEAR else name
    for variant, name in LEADERS.items()
    if variant.depth == 12
]
DEEP = [name for variant, name in LEADERS.items() if variant.depth > 12]


def on_meta(variant, **arguments):
    with torch.device("meta"):
        return VisionTransformer(variant, **arguments).eval()


@pytest.mark.parametrize("name", NAMED_ALIKE)
def test_every_tensor_has_timms_name_and_shape(name):
    variant = replace(VARIANTS[name], representation_size=0)
    ours, theirs = on_meta(variant), timm_of_row(name, variant)
    assert shapes(ours) == shapes(theirs)
    assert count(ours) == count(theirs)


def test_vit_22b_has_as_many_parameters_as_timms_class():
    variant = VARIANTS["vit_22b_patch14_224"]
    assert count(on_meta(variant)) == count(timm_of_class(variant))


@pytest.mark.parametrize("name", [name for name in NAMED_ALIKE if name not in LEADERS.values()])
def test_rows_of_one_architecture_are_one_architecture_in_timm_too(name):
    variant = COMPARED[name]
    # The printed modules show epsilons, activations, strides and dropout, which no tensor does.
    assert repr(timm_of_row(name, variant)) == repr(timm_of_row(LEADERS[variant], variant))


@pytest.mark.parametrize("name", FULL)
def test_weights_travel_both_ways_and_compute_the_same(name):
    variant = COMPARED[name]
    assert_weights_travel_both_ways(on_meta(variant), timm_of_row(name, variant))


@pytest.mark.parametrize("name", DEEP)
def test_one_block_of_a_deep_model_computes_the_same(name):
    variant = replace(COMPARED[name], depth=1)
    # In fp32 timm's patch convolution alone is off by 1e-5, four times our product of matrices.
    assert_weights_travel_both_ways(on_meta(variant), timm_of_row(name, variant), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DEEP if name != "vit_4b_patch14_224"])  # 16 GB
def test_a_deep_model_computes_the_same(name):
    variant = COMPARED[name]
    assert_weights_travel_both_ways(on_meta(variant), timm_of_row(name, variant), torch.float64)


@torch.no_grad()
def test_a_distilled_model_in_training_gives_both_logits():
    name = "deit_tiny_distilled_patch16_224"
    ours, theirs = on_meta(COMPARED[name]), timm_of_row(name, COMPARED[name])
    randomise(ours.to_empty(device="cpu"))
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    theirs.set_distilled_training(True)
    images = images_for(ours, batch=1)
    by_head = ours.train()(images)
    for logits, expected in zip(by_head, theirs.train()(images), strict=True):
        assert (logits - expected).abs().max().item() <= TOLERANCE
    assert (by_head[0] - by_head[1]).abs().max() > 0.01
    assert torch.equal(ours.eval()(images), (by_head[0] + by_head[1]) / 2)


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.timm_name])
def test_preprocessing_and_weights_are_those_of_timms_entry(name):
    entry, expected = TABLE[name], timm.get_pretrained_cfg(TABLE[name].timm_name)
    pixels = entry.preprocessing
    assert (3, *entry.variant.image_px) == expected.input_size
    assert (pixels.mean, pixels.std) == (expected.mean, expected.std)
    assert (pixels.crop, pixels.interpolation) == (expected.crop_pct, expected.interpolation)
    if expected.url and "miil" not in name:  # timm keeps a copy of those
        assert (entry.weights_url, entry.variant.num_classes) == (expected.url, expected.num_classes)
