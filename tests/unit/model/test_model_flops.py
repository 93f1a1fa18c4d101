import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.model import create_model, forward_flops, resolve_variant, train_flops


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("representation_size", [0, 20])
@pytest.mark.parametrize("num_classes", [0, 11])
def test_formula_equals_torchs_counter(pool, representation_size, num_classes):
    model = create_model(
        "vit_tiny_patch16_224",
        num_classes=num_classes,
        img_size=24,
        patch_size=8,
        in_chans=2,
        embed_dim=32,
        depth=3,
        num_heads=4,
        mlp_ratio=2.5,
        representation_size=representation_size,
        pool=pool,
    )
    images = torch.zeros(2, 2, 24, 24)
    # torch has no count for the CPU's fused attention; the plain backend shows it the two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() == 2 * forward_flops(model.variant)


@pytest.mark.parametrize(
    ("name", "pool", "forward_gf", "train_tf"),
    [
        ("vit_base_patch16_224", "token", "35.16", "0.1055"),
        ("vit_large_patch16_224", "token", "123.15", "0.3695"),
        ("vit_huge_patch14_224", "token", "334.64", "1.0039"),
        ("vit_huge_patch14_224", "avg", "333.30", "0.9999"),
        ("vit_giant_patch14_224", "token", "534.12", "1.6024"),
        ("vit_giant_patch14_224", "avg", "531.99", "1.5960"),
        ("vit_gigantic_patch14_224", "token", "967.56", "2.9027"),
        ("vit_gigantic_patch14_224", "avg", "963.72", "2.8912"),
    ],
)
def test_published_shapes_with_in21k_head(name, pool, forward_gf, train_tf):
    variant = resolve_variant(name, num_classes=21_843, pool=pool)
    assert f"{forward_flops(variant) / 1e9:.2f}" == forward_gf
    assert f"{train_flops(variant) / 1e12:.4f}" == train_tf
