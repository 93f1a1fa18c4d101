"""What forward leaves for backward, counted storage by storage, against the formulas of every policy and option."""

from dataclasses import replace

import pytest
import torch
from storage_meter import StorageMeter

from vitscale.losses import classification_loss
from vitscale.model import VARIANTS, Execution, VisionTransformer
from vitscale.planning import ActivationRule, activation_bytes

IMAGES = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASE = replace(
    VARIANTS["vit_tiny_patch16_224"], embed_dim=64, num_heads=2, depth=4, img_size=32, patch_size=8, num_classes=50
)
OPTIONS = {
    "plain": {},
    "layer_scale": {"layer_scale": 0.1},
    "qk_norm": {"qk_norm": True},
    "swiglu": {"act": "swiglu"},
    "gelu_tanh": {"act": "gelu_tanh"},
    "parallel": {"parallel": True},
    "parallel_layer_scale": {"parallel": True, "layer_scale": 0.1},
    "no_norm_bias": {"norm_bias": False, "qkv_bias": False},
    "avg": {"pool": "avg"},
    "map": {"pool": "map"},
    "map_registers": {"pool": "map", "reg_tokens": 3, "act": "swiglu"},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 3},
    "representation": {"representation_size": 48},
    "vit_22b": {"parallel": True, "qk_norm": True, "norm_bias": False, "qkv_bias": False, "pool": "map"},
}
POLICIES = {
    "none": {},
    "full": {"recompute": "full"},
    "every_2": {"recompute": "every_k", "every": 2},
    "every_3": {"recompute": "every_k", "every": 3},
    "selective": {"recompute": "selective"},
}
DROPS = {
    "dropout": {"drop_rate": 0.1},
    "mask": {"drop_path_rate": 0.4},
    "subset": {"drop_path_rate": 0.4, "drop_path_subset": True},
}


def counted(variant, rule, images=IMAGES):
    """Bytes after forward beyond those before it, the images among them; and at the height of backward."""
    torch.manual_seed(0)
    dtype = DTYPES[rule.precision]
    model = VisionTransformer(
        variant,
        drop_rate=rule.drop_rate,
        drop_path_rate=rule.drop_path_rate,
        drop_path_mode="subset" if rule.drop_path_subset else "mask",
    )
    model.to(dtype).train().set_execution(Execution(recompute=rule.recompute, every=rule.every))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # where backward leaves it is another table's
    labels = torch.randint(variant.num_classes, (images,))
    loss_fn = classification_loss("softmax", 0.1)
    with StorageMeter() as meter:
        inputs = torch.randn(images, variant.in_chans, *variant.image_px, dtype=dtype)
        loss = loss_fn(model(inputs), labels)
        kept = meter.live
        meter.lap()
        if rule.precision == "fp32":  # bf16 is slow here, and counts the same
            loss.backward()
        del loss
    return kept, meter.lap()


def rule(**changes):
    return ActivationRule(on_gpu=False, **changes)


CASES = [(option, policy, "fp32") for option in OPTIONS for policy in POLICIES]
CASES += [(option, policy, "bf16") for option in ("plain", "vit_22b") for policy in POLICIES]


@pytest.mark.parametrize(("option", "policy", "precision"), CASES)
def test_every_option_under_every_policy(option, policy, precision):
    variant = replace(BASE, **OPTIONS[option])
    asked = rule(precision=precision, **POLICIES[policy])
    kept, _ = counted(variant, asked)
    assert activation_bytes(variant, IMAGES, asked).kept == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("option", ["plain", "layer_scale", "swiglu", "parallel"])
@pytest.mark.parametrize("drop", DROPS)
def test_dropout_and_drop_path(drop, option, policy):
    variant = replace(BASE, **OPTIONS[option])
    asked = rule(precision="fp32", **POLICIES[policy], **DROPS[drop])
    kept, _ = counted(variant, asked)
    assert activation_bytes(variant, IMAGES, asked).kept == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    ("name", "none_mb", "budget_mb", "full_mb"),
    [
        ("vit_huge_patch14_224", 337, 168, 21),
        ("vit_giant_patch14_224", 485, 242, 29),
        ("vit_gigantic_patch14_224", 733, 366, 41),
    ],
)
def test_the_large_shapes_keep_what_was_published_of_them(name, none_mb, budget_mb, full_mb):
    """Megabytes of the blocks an image in bf16, by the formula 16d + 4f + 4h, which leaves out norms' statistics."""
    for policy, megabytes in (("none", none_mb), ("budget", budget_mb), ("full", full_mb)):
        asked = ActivationRule(recompute=policy, budget=0.5)
        assert activation_bytes(VARIANTS[name], 1, asked).blocks / 1e6 == pytest.approx(megabytes, rel=0.02)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("option", ["plain", "layer_scale", "qk_norm", "swiglu", "parallel", "avg"])
def test_the_height_of_backward(option, policy):
    variant = replace(BASE, **OPTIONS[option])
    asked = rule(precision="fp32", **POLICIES[policy])
    _, peak = counted(variant, asked, images=48)  # so that gradients of parameters hardly count
    assert activation_bytes(variant, 48, asked).peak == pytest.approx(peak, rel=0.05)


def test_a_gpu_keeps_statistics_in_fp32_and_masks_in_bytes():
    per_token = {
        on_gpu: activation_bytes(BASE, 1, ActivationRule(drop_rate=0.1, on_gpu=on_gpu)).blocks
        / BASE.depth
        / BASE.tokens
        for on_gpu in (True, False)
    }
    width, hidden, heads = BASE.embed_dim, BASE.mlp_hidden, BASE.num_heads
    assert per_token[True] == 16 * width + 4 * hidden + 4 * heads + 16 + (hidden + 2 * width)
    assert per_token[False] == 16 * width + 4 * hidden + 4 * heads + 8 + 2 * (hidden + 2 * width)


def test_a_whole_micro_batch_is_the_sum_of_its_images():
    for changes in POLICIES.values():
        asked = ActivationRule(**changes)
        one, many = (activation_bytes(BASE, images, asked) for images in (1, 6))
        assert many.kept == 6 * one.kept
        assert many.peak == 6 * one.peak
