import torch
from torch import nn

from vitscale.model import create_model
from vitscale.optim import parameter_groups


def model():
    return create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=32, embed_dim=12, depth=2, num_heads=2, representation_size=6
    )


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
