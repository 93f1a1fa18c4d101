from functools import partial

import numpy as np
import pytest
import torch
from small_models import images_for, randomise, shapes, tiny
from timm.layers import AttentionPoolLatent
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitscale.errors import ConfigError
from vitscale.model import Variant
from vitscale.model.heads import AttentionPool, Classifier, PreLogits

POOLS = {
    "plain": {},
    "tanh GELU": {"act": "gelu_tanh"},
    "no norm bias": {"norm_bias": False},
    "norm epsilon": {"norm_eps": 1e-2},
    "odd MLP": {"mlp_ratio": 48 / 11},
    "SwiGLU": {"act": "swiglu"},
}


def pool(**options):
    variant = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4, "pool": "map", **options}
    return randomise(AttentionPool(Variant(**variant), "jax"))


@pytest.mark.parametrize("name", [name for name in POOLS if name != "SwiGLU"])  # timm's has none
def test_attention_pooling_equals_timms(name):
    options = POOLS[name]
    ours = pool(**options)
    theirs = AttentionPoolLatent(
        32,
        num_heads=4,
        mlp_ratio=ours.mlp.fc1.out_features / 32,
        act_layer=partial(nn.GELU, approximate="tanh" if options.get("act") == "gelu_tanh" else "none"),
        norm_layer=partial(nn.LayerNorm, eps=options.get("norm_eps", 1e-6), bias=options.get("norm_bias", True)),
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = torch.randn(3, 7, 32)
    torch.testing.assert_close(ours(tokens), theirs.eval()(tokens), rtol=0, atol=1e-6)


def test_attention_pooling_with_swiglu_against_its_definition_in_float64():
    ours = pool(act="swiglu").double()
    tokens = torch.randn(3, 7, 32, dtype=torch.float64)
    k, v = ours.kv(tokens).chunk(2, dim=-1)
    heads = []
    for q, keys, values in zip(ours.q(ours.latent)[0, 0].split(8), k.split(8, -1), v.split(8, -1), strict=True):
        weights = (keys @ q / 8**0.5).softmax(dim=1)
        heads.append((weights.unsqueeze(-1) * values).sum(1))
    pooled = ours.proj(torch.cat(heads, dim=-1))
    gate, value = ours.mlp.fc1(ours.norm(pooled)).chunk(2, dim=-1)
    expected = pooled + ours.mlp.fc2(gate * torch.sigmoid(gate) * value)
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-12)


def test_attention_pooling_does_not_care_about_the_order_of_tokens():
    ours = pool().double()
    tokens = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(tokens), ours(tokens.flip(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_attention_pooling_compiles_to_one_graph(options):
    torch._dynamo.reset()
    module = pool(**options)
    tokens = torch.randn(3, 7, 32)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(tokens), module(tokens))


def test_representation_layer_and_classifier_against_float64():
    torch.manual_seed(0)
    pre_logits, head = PreLogits(12, 20, "jax"), Classifier(20, 5, "jax", bias_init=-10.0)
    nn.init.normal_(head.weight)
    features = torch.randn(7, 12)
    w1, b1, w2, b2, x = (
        tensor.detach().double().numpy()
        for tensor in (pre_logits.fc.weight, pre_logits.fc.bias, head.weight, head.bias, features)
    )
    expected = np.tanh(x @ w1.T + b1) @ w2.T + b2
    np.testing.assert_allclose(head(pre_logits(features)).detach().numpy(), expected, rtol=0, atol=1e-5)


class Products(TorchDispatchMode):
    """Shapes of the results of matrix products with a bias."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            self.shapes.append(tuple(result.shape))
        return result


def padded_pair(**options):
    """The same model without and with a padded head."""
    plain, padded = (randomise(tiny(**options, head_multiple=multiple)).double() for multiple in (1, 64))
    padded.load_state_dict(plain.state_dict(), strict=True)
    return plain, padded


@pytest.mark.parametrize("options", [{}, {"representation_size": 20}, {"distilled": True}], ids=str)
def test_a_padded_head_has_the_same_parameters_logits_and_gradients(options):
    plain, padded = padded_pair(**options)
    assert shapes(padded) == shapes(plain)
    results = []
    for model in (plain, padded):
        logits = model(images_for(model).double())
        logits[:, 0].mul(2).sum().add(logits.square().sum()).backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_the_padded_product_has_the_multiple_and_the_logits_do_not():
    plain, padded = padded_pair()
    for model, product in ((plain, (2, 7)), (padded, (2, 64))):
        with Products() as seen:
            logits = model(images_for(model).double())
        assert logits.shape == (2, 7)
        assert seen.shapes[-1] == product
    padded.reset_classifier(128)
    with Products() as seen:
        padded(images_for(padded).double())
    assert seen.shapes[-1] == (2, 128), "a multiple is not padded"
    padded.reset_classifier(129)
    assert padded.head.multiple == 64


def test_a_multiple_below_1_is_refused():
    with pytest.raises(ConfigError, match=r"^model.head_multiple 0: 1 or more is wanted$"):
        tiny(head_multiple=0)
