import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import count
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.model import VARIANTS, Variant, VisionTransformer, forward_flops, resolve_variant, train_flops


def counted(model):
    """torch's count for one image. It knows the products of the plain attention, not every fused kernel."""
    images = torch.empty(1, model.variant.in_chans, *model.variant.image_px, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


def on_meta(variant):
    with torch.device("meta"):
        return VisionTransformer(variant).eval()


@st.composite
def variants(draw):
    def size(most):
        return draw(st.integers(1, most)), draw(st.integers(1, most))

    stem = draw(st.sampled_from([None, None, None, (), (1,), (2, 1), (1, 1, 1, 2)]))
    stride = {None: 1, (): 4, (1,): 4, (2, 1): 8, (1, 1, 1, 2): 32}[stem]
    patch, grid = size(9 if stem is None else 2), size(4)
    heads, pool = draw(st.integers(1, 4)), draw(st.sampled_from(["token", "avg", "map"]))
    distilled = pool == "token" and draw(st.booleans())
    return Variant(
        patch_size=patch,
        img_size=(patch[0] * grid[0] * stride, patch[1] * grid[1] * stride),
        embed_dim=heads * draw(st.integers(1, 12)),
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_ratio=draw(st.floats(1.0, 6.0)),
        qkv_bias=draw(st.booleans()),
        representation_size=0 if distilled else draw(st.sampled_from([0, 1, 20])),
        num_classes=draw(st.sampled_from([0, 1, 11])),
        in_chans=draw(st.integers(1, 5)),
        pool=pool,
        distilled=distilled,
        reg_tokens=draw(st.integers(0, 3)),
        layer_scale=draw(st.sampled_from([0.0, 0.1])),
        qk_norm=draw(st.booleans()),
        parallel=draw(st.booleans()),
        act=draw(st.sampled_from(["gelu", "gelu_tanh", "swiglu"])),
        norm_bias=draw(st.booleans()),
        stem=stem,
    )


def parameters_of(v):
    """All parameters, layer by layer: the closed formula of docs and planner, written a second time."""

    def linear(inputs, outputs, bias=True):
        return inputs * outputs + bias * outputs

    def norm(width):
        return width * (1 + v.norm_bias)

    d, hidden = v.embed_dim, round(v.embed_dim * v.mlp_ratio)
    mlp = linear(d, hidden * (2 if v.act == "swiglu" else 1)) + linear(hidden, d)
    attention = linear(d, 3 * d, v.qkv_bias) + linear(d, d) + (2 * norm(d // v.num_heads) if v.qk_norm else 0)
    norms = 1 if v.parallel else 2
    block = attention + mlp + norms * (norm(d) + (d if v.layer_scale else 0))
    patch, image = [(s, s) if isinstance(s, int) else s for s in (v.patch_size, v.img_size)]
    chans, stem, stride = v.in_chans, 0, 1
    if v.stem is not None:
        stem, chans, stride = 64 * v.in_chans * 49 + 2 * 64, 64, 4 * 2 ** max(len(v.stem) - 1, 0)
        for stage, units in enumerate(v.stem):
            middle, out = 64 * 2**stage, 256 * 2**stage
            stem += chans * out + 2 * out
            for _ in range(units):
                stem += chans * middle + 9 * middle**2 + middle * out + 2 * (2 * middle + out)
                chans = out
    prefix = (v.pool == "token") + v.distilled + v.reg_tokens
    patches = math.prod(side // (p * stride) for side, p in zip(image, patch, strict=True))
    embedding = stem + linear(chans * math.prod(patch), d) + prefix * d + (patches + prefix) * d
    pool = d + 2 * linear(d, d) + linear(d, 2 * d) + norm(d) + mlp if v.pool == "map" else 0
    representation = linear(d, v.representation_size) if v.representation_size else 0
    heads = (2 if v.distilled else 1) * linear(v.representation_size or d, v.num_classes) if v.num_classes else 0
    return embedding + v.depth * block + norm(d) + pool + representation + heads


@settings(max_examples=60)
@given(variants())
def test_flops_and_parameters_of_any_variant(variant):
    model = on_meta(variant)
    assert counted(model) == forward_flops(variant)
    assert count(model) == parameters_of(variant)


# Rows that differ in their weights alone are one variant.
@pytest.mark.parametrize("name", {variant: name for name, variant in VARIANTS.items()}.values())
def test_flops_and_parameters_of_every_row(name):
    model = on_meta(VARIANTS[name])
    assert counted(model) == forward_flops(model.variant)
    assert count(model) == parameters_of(model.variant)


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
