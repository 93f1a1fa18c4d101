import inspect
import math
from typing import get_args

import pytest
import torch
from small_models import OPTIONS, count, images_for, randomise, shapes, tiny
from timm_twins import TOLERANCE, assert_close, assert_weights_travel_both_ways, outputs, state_for_timm, timm_of_class
from torch import nn

from vitscale.config import ModelSection
from vitscale.errors import ConfigError
from vitscale.model import Act, Block, ParallelBlock, Pool, Scheme, create_model, resolve_variant
from vitscale.model.blocks import LayerScale
from vitscale.model.heads import AttentionPool

# timm's class has no such thing, or the same under options that another test compares.
NOT_TIMMS = {"distilled with registers", "SwiGLU with map", "ResNet root", "ResNet stem"}
LIKE_TIMMS = {
    name: options
    for name, options in OPTIONS.items()
    if name not in NOT_TIMMS and not {"representation_size", "weight_init"} & set(options)
}
SERIAL = {name: options for name, options in LIKE_TIMMS.items() if not options.get("parallel")}
PARALLEL = {name: options for name, options in LIKE_TIMMS.items() if options.get("parallel")}


def tiny_on_meta(**options):
    with torch.device("meta"):
        return tiny(**options)


def twin_of(model, **arguments):
    """timm's class with the model's weights."""
    twin = timm_of_class(model.variant, **arguments)
    twin.load_state_dict(state_for_timm(model), strict=True, assign=True)
    return twin


@pytest.mark.parametrize("options", SERIAL.values(), ids=SERIAL)
def test_every_option_of_timms_class_computes_the_same_with_weights_of_either(options):
    model = tiny_on_meta(**options).eval()
    assert_weights_travel_both_ways(model, timm_of_class(model.variant))


@pytest.mark.parametrize("options", PARALLEL.values(), ids=PARALLEL)
def test_parallel_blocks_compute_what_timms_do(options):
    model = randomise(tiny(**options))
    twin = twin_of(model)
    assert count(twin) == count(model)
    assert_close(outputs(model, images_for(model)), outputs(twin, images_for(model)))


# One at a time: a block draws its drop path before its dropouts, timm's between them. Dropout draws in the order of
# memory, and in timm's the patches lie channel by channel as long as no class token is put before them.
@pytest.mark.parametrize(
    ("pool", "drop_rate", "drop_path_rate"),
    [("token", 0.2, 0.0), ("token", 0.0, 0.5), ("avg", 0.0, 0.5), ("map", 0.0, 0.5)],
)
def test_training_output_equals_timms_with_dropout_or_drop_path(pool, drop_rate, drop_path_rate):
    model = randomise(tiny(pool=pool, drop_rate=drop_rate, drop_path_rate=drop_path_rate)).train()
    rates = {"pos_drop_rate": drop_rate, "proj_drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    twin = twin_of(model, **rates).train()
    images = images_for(model, batch=8)
    torch.manual_seed(3)
    expected = twin(images)
    torch.manual_seed(3)
    assert (model(images) - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("num_classes", [7, 0])
@torch.no_grad()
def test_a_distilled_model_gives_both_logits_in_training_and_their_mean_in_evaluation(num_classes):
    model = randomise(tiny(distilled=True, num_classes=num_classes))
    twin = twin_of(model)
    twin.set_distilled_training(True)
    images = images_for(model)
    by_label, by_teacher = model.train()(images)
    for ours, theirs in zip((by_label, by_teacher), twin.train()(images), strict=True):
        assert (ours - theirs).abs().max().item() <= TOLERANCE
    assert (by_label - by_teacher).abs().max() > 0.01
    assert torch.equal(model.eval()(images), (by_label + by_teacher) / 2)


@pytest.mark.parametrize("options", [{}, {"pool": "avg", "reg_tokens": 2}, {"pool": "map"}])
@torch.no_grad()
def test_representation_head_on_timms_features_in_float64(options):
    model = randomise(tiny(representation_size=20, **options))
    state = model.state_dict()
    twin = timm_of_class(tiny_on_meta(num_classes=0, **options).variant)
    twin.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith(("pre_logits.", "head."))}, strict=True, assign=True
    )
    images = images_for(model)
    pooled = twin.double()(images.double())
    hidden = pooled @ state["pre_logits.fc.weight"].double().T + state["pre_logits.fc.bias"].double()
    expected = torch.tanh(hidden) @ state["head.weight"].double().T + state["head.bias"].double()
    assert (model(images).double() - expected).abs().max().item() <= 1e-5
    without_head = tiny(representation_size=20, num_classes=0, **options).eval()
    without_head.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")}, strict=True)
    assert (without_head(images).double() - torch.tanh(hidden)).abs().max().item() <= 1e-5


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"distilled": True}, {"pool": "avg", "img_size": (32, 16)}])
@pytest.mark.parametrize("n", [1, 3, [2, 0], (-3, 1, 1)], ids=str)
@pytest.mark.parametrize("reshape", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_intermediate_layers_equal_timms(options, n, reshape, norm):
    model = randomise(tiny(**options))
    twin, images = twin_of(model), images_for(model)
    ours = model.get_intermediate_layers(images, n, reshape=reshape, norm=norm)
    theirs = twin.get_intermediate_layers(images, n, reshape=reshape, norm=norm)
    assert len(ours) == len(theirs) > 0
    for layer, expected in zip(ours, theirs, strict=True):
        assert layer.shape == expected.shape
        assert (layer - expected).abs().max().item() <= TOLERANCE
    with_prefix = model.get_intermediate_layers(images, n, reshape=reshape, norm=norm, return_prefix_tokens=True)
    expected = twin.get_intermediate_layers(images, n, reshape=reshape, norm=norm, return_prefix_tokens=True)
    for (layer, prefix), same, theirs in zip(with_prefix, ours, expected, strict=True):
        assert torch.equal(layer, same)
        # A model of timm without such tokens gives the patches alone.
        expected_prefix = theirs[1] if model.variant.prefix_tokens else torch.empty(2, 0, 48)
        torch.testing.assert_close(prefix, expected_prefix, rtol=0, atol=TOLERANCE)


def test_the_last_intermediate_layer_is_what_the_head_reads():
    model = randomise(tiny())
    images = images_for(model)
    [(patches, prefix)] = model.get_intermediate_layers(images, norm=True, return_prefix_tokens=True)
    assert torch.equal(torch.cat([prefix, patches], dim=1), model.forward_features(images))


def test_blocks_behind_the_last_wanted_one_are_not_computed():
    model = randomise(tiny())
    computed = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: computed.append(index))
    model.get_intermediate_layers(images_for(model), [1, 0])
    assert computed == [0, 1]
    assert model.get_intermediate_layers(images_for(model), []) == []
    assert computed == [0, 1]


@pytest.mark.parametrize("n", [4, 6, 7, 0, -1, [3], [0, -4]])
def test_blocks_that_are_not_there_are_refused(n):
    model = tiny()
    with pytest.raises(ConfigError) as caught:
        model.get_intermediate_layers(images_for(model), n)
    assert str(caught.value) == (f"get_intermediate_layers: n={n} asks for blocks that are not there: the model has 3")


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


def stages_of(model):
    return model.patch_embed.backbone.stages if model.patch_embed.backbone else ()


DISTILLED = ["dist_token", "head_dist.weight", "head_dist.bias"]
# For each argument of create_model: a value that differs from the default, and what the model shows of it.
ARGUMENTS = {
    "name": ("vit_small_patch16_224", lambda model: model.patch_embed.proj.out_channels, 384),
    "num_classes": (5, lambda model: model.head.out_features, 5),
    "img_size": (48, lambda model: model.pos_embed.shape[1], 145),
    "in_chans": (4, lambda model: model.patch_embed.proj.in_channels, 4),
    "patch_size": (8, lambda model: model.patch_embed.proj.kernel_size, (8, 8)),
    "embed_dim": (96, lambda model: model.blocks[0].attn.qkv.in_features, 96),
    "depth": (2, lambda model: len(model.blocks), 2),
    "num_heads": (6, lambda model: model.blocks[0].attn.num_heads, 6),
    "mlp_ratio": (48 / 11, lambda model: model.blocks[0].mlp.fc1.out_features, 838),
    "representation_size": (31, lambda model: (model.pre_logits.fc.out_features, model.head.in_features), (31, 31)),
    "pool": ("avg", lambda model: model.cls_token, None),
    "qkv_bias": (False, lambda model: model.blocks[0].attn.qkv.bias, None),
    "distilled": (True, lambda model: [name for name, _ in model.named_parameters() if "dist" in name], DISTILLED),
    "reg_tokens": (3, lambda model: getattr(model.reg_token, "shape", None), (1, 3, 192)),
    "layer_scale": (0.25, lambda model: {m.gamma[0].item() for m in model.modules() if type(m) is LayerScale}, {0.25}),
    "qk_norm": (True, lambda model: getattr(model.blocks[0].attn.q_norm, "normalized_shape", None), (64,)),
    "parallel": (True, lambda model: {type(block) for block in model.blocks}, {ParallelBlock}),
    "act": ("gelu_tanh", lambda model: {block.mlp.act for block in model.blocks}, {"gelu_tanh"}),
    "norm_bias": (False, lambda model: {m.bias is None for m in norms_of(model)}, {True}),
    "norm_eps": (1e-3, lambda model: {m.eps for m in norms_of(model)}, {1e-3}),
    "stem": ([1, 2], lambda model: [len(stage.blocks) for stage in stages_of(model)], [1, 2]),
    "weight_init": ("trunc_normal", lambda model: bool(model.head.weight.any()), True),
    "drop_rate": (0.3, lambda model: {m.p for m in model.modules() if isinstance(m, nn.Dropout)}, {0.3}),
    "drop_path_rate": (0.4, lambda model: model.blocks[-1].drop_path.rate, 0.4),
    "drop_path_mode": ("subset", lambda model: {block.drop_path.mode for block in model.blocks}, {"subset"}),
    "head_bias_init": (-10.0, lambda model: set(model.head.bias.tolist()), {-10.0}),
    "head_multiple": (64, lambda model: model.head.multiple, 64),
}


@pytest.mark.parametrize("argument", inspect.signature(create_model).parameters)
def test_every_argument_reaches_the_module(argument):
    value, shown, expected = ARGUMENTS[argument]
    plain = {"name": "vit_tiny_patch16_224", "num_classes": 7, "img_size": 128, "patch_size": 4, "depth": 3}
    changed = create_model(**{**plain, argument: value})
    assert shown(changed) == expected
    if argument != "representation_size":  # a model without one has nothing to show
        assert shown(create_model(**plain)) != expected


def test_the_configs_model_section_is_the_factorys_arguments():
    section = ModelSection(name="vit_tiny_patch16_224", num_classes=7)
    own = inspect.signature(create_model).parameters
    required = {"name", "num_classes"}
    defaults = {name: field.default for name, field in ModelSection.model_fields.items() if name not in required}
    assert {name: own[name].default for name in defaults} == defaults
    assert set(own) - set(ModelSection.model_fields) == {"head_bias_init"}  # the loss decides it
    assert create_model(**section.model_dump()).variant == resolve_variant("vit_tiny_patch16_224", num_classes=7)


@pytest.mark.parametrize(("field", "kind"), [("pool", Pool), ("act", Act), ("weight_init", Scheme)])
def test_the_config_lets_through_the_choices_that_the_model_has(field, kind):
    annotation = ModelSection.model_fields[field].annotation
    choices = {choice for part in get_args(annotation) for choice in get_args(part) or (part,)} - {type(None)}
    assert choices == set(get_args(kind))


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_drop_path_grows_linearly_from_zero(kind):
    parallel = kind is ParallelBlock
    assert [block.drop_path.rate for block in tiny(drop_path_rate=0.3, parallel=parallel).blocks] == [0.0, 0.15, 0.3]
    assert [block.drop_path.rate for block in tiny(drop_path_rate=0.3, depth=1, parallel=parallel).blocks] == [0.0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_parameter_is_written_after_its_module_is_built(options, monkeypatch):
    """ZeRO stage 3 takes the parameters away as soon as the module's `__init__` returns."""
    built = []

    def watch(cls):
        plain = cls.__init__

        def watched(self, *args, **kwargs):
            plain(self, *args, **kwargs)
            if type(self) is cls:
                built.extend((p, p._version, p.detach().clone()) for p in self.parameters(recurse=False))

        monkeypatch.setattr(cls, "__init__", watched)

    for cls in {type(module) for module in tiny(**options).modules()}:
        watch(cls)
    model = tiny(**{"head_bias_init": -10.0, **options})
    assert {id(p) for p, _, _ in built} == {id(p) for p in model.parameters()}
    assert all(p._version == version and torch.equal(p, value) for p, version, value in built)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_meta_model_has_the_same_tensors_and_no_memory(options):
    model = tiny_on_meta(**options, drop_path_rate=0.1)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert shapes(model) == shapes(tiny(**options))
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict())  # no buffers to go stale


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_seed_decides_every_weight(options):
    def state(seed):
        torch.manual_seed(seed)
        return tiny(**options).state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("representation_size", "kept", "inputs"), [(None, True, 20), (0, False, 48), (20, False, 20), (30, False, 30)]
)
def test_reset_classifier(representation_size, kept, inputs):
    model = randomise(tiny(representation_size=20, head_bias_init=-10.0)).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reset_classifier(3, representation_size=representation_size)
    after = model.state_dict()
    assert after["head.weight"].shape == (3, inputs)
    assert not after["head.weight"].any()
    assert torch.equal(after["head.bias"], torch.full((3,), -10.0, dtype=torch.float64))
    assert (model.variant.num_classes, model.variant.head_input) == (3, inputs)
    if representation_size == 0:
        assert not any(name.startswith("pre_logits") for name in after)
    else:
        assert torch.equal(after["pre_logits.fc.weight"], before["pre_logits.fc.weight"]) == kept
    trunk = [name for name in before if not name.startswith(("head", "pre_logits"))]
    assert all(torch.equal(before[name], after[name]) for name in trunk)
    assert torch.equal(model(images_for(model).double()), after["head.bias"].expand(2, 3))


def test_reset_classifier_puts_a_representation_layer_where_there_was_none():
    model = tiny(pool="map")
    model.reset_classifier(3, representation_size=30)
    assert shapes(model) == shapes(tiny(pool="map", num_classes=3, representation_size=30))
    assert model(images_for(model)).shape == (2, 3)


def test_reset_classifier_gives_a_distilled_model_two_fresh_heads():
    model = randomise(tiny(distilled=True, weight_init="jax_nlhb")).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reset_classifier(3)
    for head in model.get_classifier():
        assert head.weight.shape == (3, 48)
        assert not head.weight.any()
        assert torch.equal(head.bias, torch.full((3,), -math.log(3)).double())
    assert model.head is not model.head_dist
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items() if "head" not in name)
    assert [logits.shape for logits in model.train()(images_for(model).double())] == [(2, 3), (2, 3)]


def test_reset_classifier_leaves_a_distilled_model_as_it_was_if_it_cannot_be():
    model = tiny(distilled=True)
    before = model.variant
    with pytest.raises(ConfigError, match=r"^model\.representation_size 20 does not go with model.distilled"):
        model.reset_classifier(3, representation_size=20)
    assert model.variant == before
    assert shapes(model) == shapes(tiny(distilled=True))


def test_reset_classifier_to_no_head():
    model = randomise(tiny())
    images = images_for(model)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(images), model.forward_features(images)[:, 0])


def test_reset_classifier_to_no_head_of_a_distilled_model():
    model = randomise(tiny(distilled=True))
    images = images_for(model)
    model.reset_classifier(0)
    assert [type(head) for head in model.get_classifier()] == [nn.Identity, nn.Identity]
    features = model.forward_features(images)
    assert torch.equal(model(images), (features[:, 0] + features[:, 1]) / 2)


def test_get_classifier_is_the_head_or_of_a_distilled_model_both():
    model = tiny()
    assert model.get_classifier() is model.head
    model = tiny(distilled=True)
    assert isinstance(model.get_classifier(), tuple)
    label, teacher = model.get_classifier()
    assert (label is model.head, teacher is model.head_dist) == (True, True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_forward_is_head_of_features(options, training):
    model = randomise(tiny(**options)).train(training)
    images = images_for(model)
    features = model.forward_features(images)
    assert features.shape == (2, model.variant.tokens, 48)
    torch.testing.assert_close(model(images), model.forward_head(features), rtol=0, atol=0)


@torch.no_grad()
def test_the_tokens_before_the_patches_are_class_distillation_and_registers_in_this_order():
    model = randomise(tiny(distilled=True, reg_tokens=2))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    images = images_for(model)
    model(images)
    tokens = [token.expand(2, -1, -1) for token in (model.cls_token, model.dist_token, model.reg_token)]
    expected = torch.cat([*tokens, model.patch_embed(images)], dim=1) + model.pos_embed
    assert torch.equal(seen[0], expected)


def test_registers_are_never_pooled():
    for pool in ("token", "avg", "map"):
        model = randomise(tiny(pool=pool, reg_tokens=3))
        tokens = torch.randn(2, model.variant.tokens, 48)
        others = tokens.clone()
        first = 1 if pool == "token" else 0
        others[:, first : first + 3] += 1.0
        assert torch.equal(model.pool(tokens), model.pool(others))
        others[:, 0 if pool == "token" else -1] += 1.0
        assert not torch.equal(model.pool(tokens), model.pool(others))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_weight_decay_names_parameters_of_the_model(options):
    model = tiny(**options)
    expected = {"pos_embed"}
    expected |= {"cls_token"} if model.variant.pool == "token" else set()
    expected |= {"dist_token"} if model.variant.distilled else set()
    expected |= {"reg_token"} if model.variant.reg_tokens else set()
    expected |= {"attn_pool.latent"} if model.variant.pool == "map" else set()
    assert model.no_weight_decay() == expected
    assert expected <= {name for name, _ in model.named_parameters()}


def test_an_initialisation_that_there_is_not_is_refused():
    with pytest.raises(ConfigError) as caught:
        tiny(weight_init="xavier")
    assert str(caught.value) == "model.weight_init 'xavier': one of jax, jax_nlhb, trunc_normal is wanted"


def test_the_parts_of_a_model_are_found_by_their_names():
    model = tiny(pool="map", parallel=True)
    assert all(type(block) is ParallelBlock for block in model.blocks)
    assert type(model.attn_pool) is AttentionPool
    assert (model.cls_token, model.dist_token, model.reg_token, model.head_dist) == (None, None, None, None)
