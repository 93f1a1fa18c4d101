import math

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock

from vitscale.model.blocks import Block, DropPath, PatchEmbed


def block(drop_rate=0.0, drop_path_rate=0.0, qkv_bias=True, dim=32):
    return Block(dim, 4, 3 * dim, qkv_bias=qkv_bias, drop_rate=drop_rate, drop_path_rate=drop_path_rate)


def within(tensor, std):
    """Whether the tensor's deviation is std, within five times the error that the number of draws leaves."""
    return abs(tensor.std().item() / std - 1) < 5 / math.sqrt(2 * tensor.numel())


def test_attention_starts_with_q_k_and_v_each_xavier_uniform():
    torch.manual_seed(0)
    dim = 128
    attn = block(dim=dim).attn
    bound = math.sqrt(6 / (dim + dim))
    for part in (*attn.qkv.weight.chunk(3), attn.proj.weight):
        assert within(part, bound / math.sqrt(3))
        assert 0.999 * bound < part.abs().max().item() <= bound
    assert not attn.qkv.bias.any()
    assert not attn.proj.bias.any()


def test_mlp_starts_xavier_uniform_with_tiny_biases():
    torch.manual_seed(0)
    mlp = block(dim=128).mlp
    for layer in (mlp.fc1, mlp.fc2):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert within(layer.weight, bound / math.sqrt(3))
        assert 0.999 * bound < layer.weight.abs().max().item() <= bound
        assert within(layer.bias, 1e-6)


def test_patch_embedding_starts_lecun_normal():
    torch.manual_seed(0)
    proj = PatchEmbed(16, 8, 3, 256).proj
    fan_in = 3 * 8 * 8
    assert within(proj.weight, 1 / math.sqrt(fan_in))
    assert proj.weight.abs().max().item() <= 2 / math.sqrt(fan_in) / 0.8796
    assert not proj.bias.any()


def test_patches_are_whole_and_in_row_major_order():
    embed = PatchEmbed(8, 4, 1, 1)
    torch.nn.init.ones_(embed.proj.weight)
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    expected = [images[..., top : top + 4, left : left + 4].sum() for top in (0, 4) for left in (0, 4)]
    assert embed(images).flatten().tolist() == [total.item() for total in expected]


def test_another_image_size_is_refused():
    with pytest.raises(AssertionError, match="is not 8 px"):
        PatchEmbed(8, 4, 1, 1)(torch.zeros(1, 1, 9, 9))


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_block_equals_timms_with_dropout_and_drop_path_active(qkv_bias):
    torch.manual_seed(0)
    ours = block(drop_rate=0.2, drop_path_rate=0.5, qkv_bias=qkv_bias)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs = TimmBlock(32, 4, mlp_ratio=3, qkv_bias=qkv_bias, proj_drop=0.2, drop_path=0.5)
    for norm in (theirs.norm1, theirs.norm2):
        norm.eps = 1e-6
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(8, 5, 32)
    torch.manual_seed(1)
    expected = theirs.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.train()(x), expected, rtol=1e-5, atol=1e-5)


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    rate, samples = 0.25, 4000
    out = DropPath(rate).train()(torch.ones(samples, 2, 3))
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, (kept / (1 - rate)).reshape(-1, 1, 1).expand(-1, 2, 3))
    # Five standard errors of a binomial share.
    assert abs(kept.float().mean().item() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / samples)


def test_drop_path_is_the_identity_in_evaluation():
    x = torch.randn(4, 2, 3)
    assert DropPath(0.5).eval()(x) is x


@pytest.mark.parametrize("training", [True, False])
def test_block_compiles_to_one_graph(training):
    torch.manual_seed(0)
    module = block(drop_rate=0.1, drop_path_rate=0.5).train(training)
    x = torch.randn(4, 5, 32)
    torch.manual_seed(1)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    assert torch.equal(compiled(x), expected)
    torch._dynamo.reset()
