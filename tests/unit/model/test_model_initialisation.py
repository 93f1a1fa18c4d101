import math

import pytest
import torch
from small_models import tiny

from vitscale.model import Variant
from vitscale.model.blocks import Block, ParallelBlock, PatchEmbed
from vitscale.model.heads import AttentionPool, Classifier, PreLogits
from vitscale.model.initialisation import Linear

TRUNCATED_STD = 0.8796256610342398  # of a unit normal cut off at -2 and 2
WIDTH = 128
JAX = pytest.mark.parametrize("scheme", ["jax", "jax_nlhb"])


def variant_of(**options):
    return Variant(**{"patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 4, "mlp_ratio": 3, **options})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def has_std(tensor, std):
    """Whether the tensor's deviation is std, within five times the error that the number of draws leaves."""
    return abs(tensor.std().item() / std - 1) < 5 / math.sqrt(2 * tensor.numel())


def is_xavier_uniform(matrix):
    bound = math.sqrt(6 / sum(matrix.shape))
    most = matrix.abs().max().item()
    return has_std(matrix, bound / math.sqrt(3)) and (1 - 20 / matrix.numel()) * bound < most <= bound


def is_lecun_normal(weight):
    std = 1 / math.sqrt(weight[0].numel())
    return has_std(weight, std) and 1.8 * std / TRUNCATED_STD < weight.abs().max().item() <= 2 * std / TRUNCATED_STD


def is_trunc_normal(weight):
    return has_std(weight, 0.02) and weight.abs().max().item() > 3 * 0.02


@JAX
@pytest.mark.parametrize("block", [Block, ParallelBlock])
def test_queries_keys_and_values_start_xavier_uniform_each_apart(block, scheme):
    attn = block(variant_of(), scheme=scheme).attn
    assert all(is_xavier_uniform(matrix) for matrix in (*attn.qkv.weight.chunk(3), attn.proj.weight))
    assert not attn.qkv.bias.any()
    assert not attn.proj.bias.any()


@JAX
@pytest.mark.parametrize(("act", "halves"), [("gelu", 1), ("gelu_tanh", 1), ("swiglu", 2)])
def test_the_mlp_starts_xavier_uniform_in_halves_with_tiny_biases(act, halves, scheme):
    mlp = Block(variant_of(act=act), scheme=scheme).mlp
    assert mlp.fc1.weight.shape == (halves * 3 * WIDTH, WIDTH)
    assert all(is_xavier_uniform(matrix) for matrix in (*mlp.fc1.weight.chunk(halves), mlp.fc2.weight))
    assert has_std(mlp.fc1.bias, 1e-6)
    assert has_std(mlp.fc2.bias, 1e-6)


@JAX
def test_attention_pooling_starts_xavier_uniform_keys_and_values_apart(scheme):
    pool = AttentionPool(variant_of(), scheme)
    assert all(is_xavier_uniform(m) for m in (pool.q.weight, *pool.kv.weight.chunk(2), pool.proj.weight))
    assert not any(layer.bias.any() for layer in (pool.q, pool.kv, pool.proj))
    assert is_xavier_uniform(pool.mlp.fc1.weight)
    assert has_std(pool.mlp.fc1.bias, 1e-6)


@pytest.mark.parametrize("scheme", ["jax", "jax_nlhb", "trunc_normal"])
def test_the_probe_starts_xavier_uniform_as_one_row(scheme):
    # JAX counts the fans of [1, 1, D] as 1 input and D outputs.
    probe = AttentionPool(variant_of(embed_dim=1024), scheme).latent
    assert is_xavier_uniform(probe[0])


@JAX
def test_patch_embedding_and_representation_layer_start_lecun_normal(scheme):
    proj, fc = PatchEmbed(variant_of(), scheme).proj, PreLogits(WIDTH, 512, scheme).fc
    for layer in (proj, fc):
        assert is_lecun_normal(layer.weight)
        assert not layer.bias.any()


@pytest.mark.parametrize("scheme", ["jax", "jax_nlhb", "trunc_normal"])
def test_every_convolution_of_a_stem_starts_lecun_normal(scheme):
    backbone = PatchEmbed(variant_of(stem=(1, 1), img_size=64), scheme).backbone
    convolutions = [module.weight for module in backbone.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 4
    assert all(is_lecun_normal(weight) for weight in convolutions)


@pytest.mark.parametrize(
    ("scheme", "bias_init", "bias"),
    [
        ("jax", None, 0.0),
        ("jax", -10.0, -10.0),
        ("jax_nlhb", None, -math.log(50)),
        ("jax_nlhb", -10.0, -10.0),
        ("jax_nlhb", 0.0, 0.0),
        ("trunc_normal", None, 0.0),
        ("trunc_normal", -10.0, -10.0),
    ],
)
def test_the_classifier_starts_from_its_bias(scheme, bias_init, bias):
    head = Classifier(WIDTH, 50, scheme, bias_init)
    assert torch.equal(head.bias, torch.full((50,), bias))
    if scheme == "trunc_normal":
        assert is_trunc_normal(head.weight)
    else:
        assert torch.equal(head(torch.randn(4, WIDTH)), torch.full((4, 50), bias))


@pytest.mark.parametrize("options", [{}, {"distilled": True}])
def test_every_head_of_a_model_gets_the_bias(options):
    def biases(**arguments):
        model = tiny(**options, **arguments)
        heads = model.get_classifier()
        return {head.bias[0].item() for head in (heads if isinstance(heads, tuple) else (heads,))}

    assert biases() == {0.0}
    assert biases(weight_init="jax_nlhb") == {torch.tensor(-math.log(7)).item()}
    assert biases(weight_init="jax_nlhb", head_bias_init=-10.0) == {-10.0}


def test_under_trunc_normal_every_weight_has_deviation_002_and_every_bias_is_zero():
    model = tiny(
        weight_init="trunc_normal", embed_dim=WIDTH, depth=1, pool="map", representation_size=200, num_classes=300
    )
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    # Patch embedding, 4 in the block, 5 in the pool, representation layer, head.
    assert len(weights) == 12
    assert all(is_trunc_normal(weight) for weight in weights)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 12 + 4  # and the norms'
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("scheme", ["jax", "jax_nlhb", "trunc_normal"])
def test_tokens_start_at_zero_norms_at_one_and_positions_normal(scheme):
    model = tiny(weight_init=scheme, distilled=True, reg_tokens=3, qk_norm=True, img_size=128, embed_dim=64)
    assert model.reg_token.shape == (1, 3, 64)
    assert not any(token.any() for token in (model.cls_token, model.dist_token, model.reg_token))
    assert has_std(model.pos_embed, 0.02)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 3 * 4 + 1
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


@pytest.mark.parametrize(("parallel", "scales"), [(False, 6), (True, 3)])
def test_layer_scale_starts_at_its_value(parallel, scales):
    model = tiny(layer_scale=1e-4, parallel=parallel)
    gammas = [p for name, p in model.named_parameters() if name.endswith(".gamma")]
    assert len(gammas) == scales
    assert all(torch.equal(gamma, torch.full((48,), 1e-4)) for gamma in gammas)
    assert not [name for name, _ in tiny(parallel=parallel).named_parameters() if "gamma" in name]


def test_stacked_matrices_are_drawn_apart_not_as_one():
    assert is_xavier_uniform(Linear(WIDTH, 3 * WIDTH, scheme="jax").weight)
    assert not is_xavier_uniform(Linear(WIDTH, 3 * WIDTH, scheme="jax", matrices=3).weight)
