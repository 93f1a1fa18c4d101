"""Norms by part of the model."""

import pytest
import torch

from vitscale.engine import PARTS, model_part
from vitscale.engine.norms import PartNorms
from vitscale.model import create_model
from vitscale.optim import Flat, Segment

OPTIONS = (
    {"representation_size": 16},
    {"pool": "map", "layer_scale": 0.1, "qk_norm": True, "reg_tokens": 2},
    {"distilled": True},
    {"pool": "avg", "parallel": True, "act": "swiglu", "layer_scale": 0.1},
    {"stem": (1,), "patch_size": 2},
)


def names(**options):
    with torch.device("meta"):
        model = create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2, **options)
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_belongs_to_a_part(options):
    assert {model_part(name) for name in names(**options)} <= set(PARTS)


def test_no_part_is_without_parameters():
    assert {model_part(name) for options in OPTIONS for name in names(**options)} == set(PARTS)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("cls_token", "tokens"),
        ("patch_embed.proj.weight", "patch_embed"),
        ("blocks.11.attn.q_norm.weight", "blocks.attn"),
        ("blocks.0.norm2.bias", "blocks.norm"),
        ("blocks.10.ls1.gamma", "blocks.ls"),
        ("blocks.3.mlp.fc1.weight", "blocks.mlp"),
        ("attn_pool.norm.weight", "attn_pool"),
        ("norm.weight", "norm"),
        ("head_dist.bias", "head"),
    ],
)
def test_parts_are_what_their_names_say(name, part):
    assert model_part(name) == part


def test_pieces_of_a_flat_tensor_are_told_apart_and_padding_is_not_counted():
    flat = torch.tensor([3.0, 4.0, 2.0, 100.0])
    segments = (
        Segment("norm.weight", (2,), 0, 0, 2),
        Segment("head.bias", (4,), 1, 2, 1),
        Segment("cls_token", (1, 1, 4), 0, 0, 0),  # on another rank
    )
    norms = PartNorms([Flat(flat, segments)], None, torch.device("cpu"))
    flat.grad = flat.clone()
    norms.before([flat], torch.tensor(2.0))
    flat[0] += 1.0
    norms.after([flat])
    found = {key: float(value) for key, value in norms.read().items()}
    assert found == pytest.approx(
        {
            "grad_norm/tokens": 0.0,
            "grad_norm/norm": 10.0,
            "grad_norm/head": 4.0,
            "update_norm/tokens": 0.0,
            "update_norm/norm": 1.0,
            "update_norm/head": 0.0,
            "weight_norm/tokens": 0.0,
            "weight_norm/norm": 32.0**0.5,
            "weight_norm/head": 2.0,
        }
    )
