import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from vitscale.model import create_model
from vitscale.optim import parameter_groups

SIZE = {"num_classes": 5, "img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 2}


def model():
    return create_model("vit_tiny_patch16_224", **SIZE, representation_size=6)


def names(groups, module):
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    return {group["name"]: [name_of[id(parameter)] for parameter in group["params"]] for group in groups}


def decayed_by_hand(depth):
    blocks = [
        f"blocks.{index}.{part}.weight"
        for index in range(depth)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    return ["patch_embed.proj.weight", *blocks, "pre_logits.fc.weight", "head.weight"]


def test_exactly_the_matrices_decay():
    module = model()
    groups = parameter_groups(module, 0.03)
    found = names(groups, module)
    assert found["decay"] == decayed_by_hand(2)
    everything = [name for name, _ in module.named_parameters()]
    assert found["no_decay"] == [name for name in everything if name not in found["decay"]]
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} <= set(found["no_decay"])
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.03), ("no_decay", 0.0)]


def test_parameters_that_zero3_partitioned_are_judged_by_their_true_shape():
    module = model()
    whole = names(parameter_groups(module, 0.03), module)
    for parameter in module.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert names(parameter_groups(module, 0.03), module) == whole


def test_names_the_model_exempts_do_not_decay():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.probe = nn.Parameter(torch.zeros(2, 2))
            self.weight = nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"probe"}

    module = Custom()
    assert names(parameter_groups(module, 1.0), module) == {"decay": ["weight"], "no_decay": ["probe"]}


def test_heads_decay_by_a_strength_of_their_own():
    module = create_model("vit_tiny_patch16_224", **SIZE, distilled=True)
    groups = parameter_groups(module, 0.03, 3.0)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("decay", 0.03),
        ("head_decay", 3.0),
        ("no_decay", 0.0),
    ]
    found = names(groups, module)
    assert found["head_decay"] == ["head.weight", "head_dist.weight"]
    assert found["no_decay"] == names(parameter_groups(module, 0.03), module)["no_decay"]


def test_the_probe_of_attention_pooling_does_not_decay():
    module = create_model("vit_tiny_patch16_224", **SIZE, pool="map")
    found = names(parameter_groups(module, 0.03), module)
    assert "attn_pool.latent" in found["no_decay"]
    assert {"attn_pool.q.weight", "attn_pool.kv.weight"} <= set(found["decay"])


def test_frozen_parameters_and_empty_groups_are_left_out():
    module = model()
    for name, parameter in module.named_parameters():
        parameter.requires_grad = name == "head.weight"
    assert names(parameter_groups(module, 0.03), module) == {"decay": ["head.weight"]}


@pytest.mark.parametrize("pool", ["token", "map"])
def test_rates_by_layer_are_those_of_timm(pool):
    ours = create_model("vit_tiny_patch16_224", **SIZE, pool=pool, layer_scale=0.1, reg_tokens=2)
    options = {"class_token": False, "global_pool": "map"} if pool == "map" else {}
    theirs = timm.create_model("vit_tiny_patch16_224", **SIZE, init_values=0.1, reg_tokens=2, **options)
    oracle = param_groups_layer_decay(theirs, 0.03, theirs.no_weight_decay() | {"attn_pool.latent"}, layer_decay=0.7)

    def settings(groups, module):
        name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        return {
            name_of[id(parameter)]: (pytest.approx(group["lr_scale"]), group["weight_decay"])
            for group in groups
            for parameter in group["params"]
        }

    expected = settings(oracle, theirs)
    # timm has the last norm learn like the last block; BEiT and EVA, from whom the scheme is, like the head.
    expected |= {"norm.weight": (1.0, 0.0), "norm.bias": (1.0, 0.0)}
    assert settings(parameter_groups(ours, 0.03, layer_decay=0.7), ours) == expected


def test_groups_by_layer_are_in_order_and_named():
    module = model()
    groups = parameter_groups(module, 0.03, 0.1, 0.5)
    assert [(group["name"], group["lr_scale"]) for group in groups] == [
        ("layer_0_decay", 0.125),
        ("layer_0_no_decay", 0.125),
        ("layer_1_decay", 0.25),
        ("layer_1_no_decay", 0.25),
        ("layer_2_decay", 0.5),
        ("layer_2_no_decay", 0.5),
        ("layer_3_decay", 1.0),
        ("layer_3_head_decay", 1.0),
        ("layer_3_no_decay", 1.0),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
