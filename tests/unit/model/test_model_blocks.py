from functools import partial

import pytest
import torch
from small_models import randomise
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ParallelScalingBlock
from timm_twins import parallel_for_timm
from torch import nn

from vitscale.model import Block, ParallelBlock, Variant
from vitscale.model.blocks import LayerScale, PatchEmbed

BLOCKS = {"serial": Block, "parallel": ParallelBlock}
OPTIONS = {
    "plain": {},
    "tanh GELU": {"act": "gelu_tanh"},
    "SwiGLU": {"act": "swiglu"},
    "layer scale": {"layer_scale": 0.3},
    "qk norm": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "no norm bias": {"norm_bias": False},
    "norm epsilon": {"norm_eps": 1e-2},
    "all": {"act": "gelu_tanh", "layer_scale": 0.3, "qk_norm": True, "qkv_bias": False, "norm_bias": False},
    "all with SwiGLU": {"act": "swiglu", "layer_scale": 0.3, "qk_norm": True, "qkv_bias": False, "norm_bias": False},
}


def variant_of(**options):
    return Variant(**{"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4, "mlp_ratio": 3, **options})


def timm_arguments(variant):
    return {
        "mlp_ratio": variant.mlp_ratio,
        "qkv_bias": variant.qkv_bias,
        "qk_norm": variant.qk_norm,
        "init_values": variant.layer_scale or None,
        "act_layer": partial(nn.GELU, approximate="tanh" if variant.act == "gelu_tanh" else "none"),
        "norm_layer": partial(nn.LayerNorm, eps=variant.norm_eps, bias=variant.norm_bias),
    }


# One at a time: drop path is drawn before the block here, between its dropouts in timm.
@pytest.mark.parametrize(("drop_rate", "drop_path_rate"), [(0.2, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_serial_block_equals_timms_with_dropout_or_drop_path_active(options, drop_rate, drop_path_rate):
    variant = variant_of(**options)
    ours = randomise(Block(variant, drop_rate=drop_rate, drop_path_rate=drop_path_rate))
    arguments = timm_arguments(variant)
    if variant.act == "swiglu":
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * variant.mlp_ratio}
    theirs = TimmBlock(32, 4, proj_drop=drop_rate, drop_path=drop_path_rate, **arguments)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(8, 5, 32)
    torch.manual_seed(1)
    expected = theirs.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.train()(x), expected, rtol=0, atol=1e-6)


# timm's parallel block has no SwiGLU, and its dropout another place.
@pytest.mark.parametrize(
    "options", [o for o in OPTIONS.values() if o.get("act") != "swiglu"], ids=[o for o in OPTIONS if "SwiGLU" not in o]
)
def test_a_parallel_block_equals_timms_with_drop_path_active(options):
    variant = variant_of(**options)
    ours = randomise(ParallelBlock(variant, drop_path_rate=0.5))
    theirs = ParallelScalingBlock(32, 4, drop_path=0.5, **timm_arguments(variant))
    theirs.load_state_dict(parallel_for_timm(ours.state_dict()), strict=True)
    x = torch.randn(8, 5, 32)
    torch.manual_seed(1)
    expected = theirs.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.train()(x), expected, rtol=0, atol=2e-6)


def test_a_parallel_block_with_swiglu_is_the_sum_of_its_branches():
    block = randomise(ParallelBlock(variant_of(act="swiglu"))).double()
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    y = block.norm1(x)
    gate, value = block.mlp.fc1(y).chunk(2, dim=-1)
    expected = x + block.attn(y) + block.mlp.fc2(gate / (1 + torch.exp(-gate)) * value)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", BLOCKS)
def test_dropout_acts_on_both_branches(kind):
    block = randomise(BLOCKS[kind](variant_of(), drop_rate=0.5))
    x = torch.randn(2, 5, 32)
    torch.manual_seed(1)
    assert not torch.equal(block.train()(x), block.eval()(x))
    drops = {name: module.p for name, module in block.named_modules() if isinstance(module, nn.Dropout)}
    assert drops == {"attn.proj_drop": 0.5, "mlp.drop": 0.5}


def test_patches_are_whole_and_in_row_major_order():
    embed = PatchEmbed(variant_of(patch_size=(2, 4), img_size=(4, 8), embed_dim=1, num_heads=1, in_chans=1), "jax")
    nn.init.ones_(embed.proj.weight)
    images = torch.arange(32.0).reshape(1, 1, 4, 8)
    expected = [images[..., top : top + 2, left : left + 4].sum() for top in (0, 2) for left in (0, 4)]
    assert embed(images).flatten().tolist() == [total.item() for total in expected]


@pytest.mark.parametrize("height", [9, 12])
def test_another_image_size_is_refused(height):
    with pytest.raises(AssertionError, match=rf"\(1, 3, {height}, 8\) is not \(8, 8\) px"):
        PatchEmbed(variant_of(img_size=8), "jax")(torch.zeros(1, 3, height, 8))


def test_layer_scale_scales_each_feature():
    scale = LayerScale(3, 0.5)
    assert scale.gamma.tolist() == [0.5, 0.5, 0.5]
    scale.gamma.data = torch.tensor([1.0, 2.0, 3.0])
    assert scale(torch.full((1, 2, 3), 2.0)).tolist() == [[[2.0, 4.0, 6.0]] * 2]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["plain", "tanh GELU", "SwiGLU", "layer scale", "qk norm", "all", "all with SwiGLU"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_compiles_to_one_graph(kind, name, training):
    torch._dynamo.reset()
    module = randomise(BLOCKS[kind](variant_of(**OPTIONS[name]), drop_rate=0.1, drop_path_rate=0.5)).train(training)
    x = torch.randn(4, 5, 32)
    torch.manual_seed(1)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    assert torch.equal(compiled(x), expected)
