import inspect

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from vitscale.config import ModelSection
from vitscale.model import VARIANTS, create_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}


def tiny(**arguments):
    return create_model("vit_tiny_patch16_224", **{"num_classes": 7, **TINY, **arguments})


def randomise(model, seed=0):
    """Give every tensor values that tell it from every other, the norms and the zero head too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("weight") and "norm" in name else 0.0
        parameter.data.normal_(mean, 0.05, generator=generator)
    return model.eval()


def timm_twin(model, **arguments):
    """timm's model of the same shape, its tensors still unset."""
    variant = model.variant
    with torch.device("meta"):
        twin = TimmViT(
            img_size=variant.img_size,
            patch_size=variant.patch_size,
            in_chans=variant.in_chans,
            embed_dim=variant.embed_dim,
            depth=variant.depth,
            num_heads=variant.num_heads,
            mlp_ratio=variant.mlp_hidden / variant.embed_dim,
            qkv_bias=variant.qkv_bias,
            num_classes=variant.num_classes,
            class_token=variant.pool == "token",
            global_pool=variant.pool,
            fc_norm=False,
            weight_init="skip",
            **arguments,
        )
    return twin.to_empty(device="cpu").eval()


def images_for(model, batch=2):
    variant = model.variant
    shape = (batch, variant.in_chans, variant.img_size, variant.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_equal_to_timm(model):
    twin = timm_twin(model)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert_same_output(model, twin)
    randomise(twin, seed=2)
    model.load_state_dict(twin.state_dict(), strict=True)
    assert_same_output(model, twin)


@torch.no_grad()
def assert_same_output(model, twin):
    images = images_for(model)
    ours, theirs = model.forward_features(images), twin.forward_features(images)
    assert (ours - theirs).abs().max().item() <= 1e-5
    ours, theirs = model.forward_head(ours), twin.forward_head(theirs)
    assert theirs.std() > 0.01  # the comparison is not one of zeros
    assert (ours - theirs).abs().max().item() <= 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_224"])
def test_logits_equal_timms_at_full_size(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=1000)
    assert_equal_to_timm(randomise(model.to_empty(device="cpu")))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", ["vit_huge_patch14_224", "vit_giant_patch14_224", "vit_gigantic_patch14_224"])
def test_logits_equal_timms_at_reduced_depth(name, pool):
    assert_equal_to_timm(randomise(create_model(name, num_classes=13, depth=1, img_size=42, pool=pool)))


@pytest.mark.parametrize("arguments", [{"pool": "avg"}, {"qkv_bias": False}, {"in_chans": 1}, {"mlp_ratio": 2.5}])
def test_logits_equal_timms_with(arguments):
    assert_equal_to_timm(randomise(tiny(**arguments)))


def test_training_output_equals_timms_with_dropout_and_drop_path():
    model = randomise(tiny(drop_rate=0.2, drop_path_rate=0.5)).train()
    twin = timm_twin(model, pos_drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.5).train()
    twin.load_state_dict(model.state_dict(), strict=True)
    images = images_for(model, batch=8)
    torch.manual_seed(3)
    expected = twin(images)
    torch.manual_seed(3)
    assert (model(images) - expected).abs().max().item() <= 1e-5


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_representation_head_on_timms_features_in_float64(pool):
    model = randomise(tiny(representation_size=20, pool=pool))
    twin = timm_twin(model)
    state = model.state_dict()
    twin.load_state_dict({k: v for k, v in state.items() if not k.startswith(("pre_logits.", "head."))}, strict=False)
    images = images_for(model)
    with torch.no_grad():
        tokens = twin.double().forward_features(images.double())
        pooled = tokens[:, 0] if pool == "token" else tokens.mean(1)
        hidden = pooled @ state["pre_logits.fc.weight"].double().T + state["pre_logits.fc.bias"].double()
        expected = torch.tanh(hidden) @ state["head.weight"].double().T + state["head.bias"].double()
        assert (model(images).double() - expected).abs().max().item() <= 1e-5
        without_head = randomise(tiny(representation_size=20, pool=pool, num_classes=0))
        without_head.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")}, strict=True)
        assert (without_head(images).double() - torch.tanh(hidden)).abs().max().item() <= 1e-5


# For each argument of create_model: a value that differs from the default, and what the model shows of it.
ARGUMENTS = {
    "name": ("vit_small_patch16_224", lambda model: model.patch_embed.proj.out_channels, 384),
    "num_classes": (5, lambda model: model.head.out_features, 5),
    "img_size": (48, lambda model: model.pos_embed.shape[1], 10),
    "in_chans": (4, lambda model: model.patch_embed.proj.in_channels, 4),
    "patch_size": (8, lambda model: model.patch_embed.proj.kernel_size, (8, 8)),
    "embed_dim": (96, lambda model: model.blocks[0].attn.qkv.in_features, 96),
    "depth": (2, lambda model: len(model.blocks), 2),
    "num_heads": (6, lambda model: model.blocks[0].attn.num_heads, 6),
    "mlp_ratio": (48 / 11, lambda model: model.blocks[0].mlp.fc1.out_features, 838),
    "representation_size": (31, lambda model: (model.pre_logits.fc.out_features, model.head.in_features), (31, 31)),
    "pool": ("avg", lambda model: model.cls_token, None),
    "qkv_bias": (False, lambda model: model.blocks[0].attn.qkv.bias, None),
    "drop_rate": (0.3, lambda model: {m.p for m in model.modules() if isinstance(m, nn.Dropout)}, {0.3}),
    "drop_path_rate": (0.4, lambda model: model.blocks[-1].drop_path.rate, 0.4),
    "head_bias_init": (-10.0, lambda model: set(model.head.bias.tolist()), {-10.0}),
}


@pytest.mark.parametrize("argument", inspect.signature(create_model).parameters)
def test_every_argument_reaches_the_module(argument):
    value, shown, expected = ARGUMENTS[argument]
    plain = {"name": "vit_tiny_patch16_224", "num_classes": 7}
    changed = create_model(**{**plain, argument: value})
    assert shown(changed) == expected
    if argument != "representation_size":  # a model without one has nothing to show
        assert shown(create_model(**plain)) != expected


def test_the_configs_model_section_is_the_factorys_arguments():
    section = ModelSection(name="vit_tiny_patch16_224", num_classes=7)
    own = inspect.signature(create_model).parameters
    assert {name: own[name].default for name in ModelSection.model_fields if name not in {"name", "num_classes"}} == {
        name: value for name, value in section.model_dump().items() if name not in {"name", "num_classes"}
    }
    assert set(own) - set(ModelSection.model_fields) == {"head_bias_init"}  # the loss decides it


def test_drop_path_grows_linearly_from_zero():
    assert [block.drop_path.rate for block in tiny(drop_path_rate=0.3).blocks] == [0.0, 0.15, 0.3]
    assert [block.drop_path.rate for block in tiny(drop_path_rate=0.3, depth=1).blocks] == [0.0]


def test_token_and_position_embedding_start():
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=7)
    assert not model.cls_token.any()
    # 37,824 draws: five times the relative error of the deviation.
    assert abs(model.pos_embed.std().item() / 0.02 - 1) < 5 / (2 * model.pos_embed.numel()) ** 0.5
    assert not model.head.weight.any()


def test_no_parameter_is_written_after_its_module_is_built(monkeypatch):
    """ZeRO stage 3 takes the parameters away as soon as the module's `__init__` returns."""
    built = []

    def watch(cls):
        plain = cls.__init__

        def watched(self, *args, **kwargs):
            plain(self, *args, **kwargs)
            if type(self) is cls:
                built.extend((p, p._version, p.detach().clone()) for p in self.parameters(recurse=False))

        monkeypatch.setattr(cls, "__init__", watched)

    for cls in {type(module) for module in tiny(representation_size=20).modules()}:
        watch(cls)
    model = tiny(representation_size=20, head_bias_init=-10.0)
    assert {id(p) for p, _, _ in built} == {id(p) for p in model.parameters()}
    assert all(p._version == version and torch.equal(p, value) for p, version, value in built)


def test_a_meta_model_has_the_same_tensors_and_no_memory():
    with torch.device("meta"):
        model = tiny(representation_size=20, drop_path_rate=0.1)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = {name: tensor.shape for name, tensor in tiny(representation_size=20).state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected


def test_the_seed_decides_every_weight():
    def state(seed):
        torch.manual_seed(seed)
        return tiny(representation_size=20).state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_activation_checkpointing_keeps_gradients_bitwise_and_recomputes():
    model = randomise(tiny(drop_rate=0.2, drop_path_rate=0.5)).train()
    images = images_for(model, batch=8)
    calls = []
    # The recomputation stops at the last tensor that is needed, before a block's forward ends.
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients(checkpointing):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        calls.clear()
        torch.manual_seed(3)
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()], len(calls)

    kept, kept_calls = gradients(False)
    recomputed, recomputed_calls = gradients(True)
    assert (kept_calls, recomputed_calls) == (1, 2)
    assert all(grad.any() for grad in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


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


def test_reset_classifier_to_no_head():
    model = randomise(tiny())
    images = images_for(model)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(images), model.forward_features(images)[:, 0])


def test_get_classifier_is_the_head():
    model = tiny()
    assert model.get_classifier() is model.head


def test_forward_is_head_of_features():
    model = randomise(tiny())
    images = images_for(model)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images)))


def test_no_weight_decay_names_parameters_of_the_model():
    model = tiny()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_classifies_images_of_its_own_size(name):
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = create_model(name, num_classes=variant.num_classes, depth=1)
        assert model(torch.empty(2, 3, variant.img_size, variant.img_size)).shape == (2, variant.num_classes)
        assert create_model(name, num_classes=variant.num_classes).variant == variant
