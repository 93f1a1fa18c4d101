from unittest import mock

import pytest
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from torch import nn

from vitscale.model import create_model
from vitscale.train.pictures import attention_maps, recorded


def model_of(**changes):
    """A model of 3 x 2 patches whose weights are all random."""
    torch.manual_seed(0)
    shape = {"num_classes": 5, "img_size": (24, 16), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = create_model("vit_tiny_patch16_224", **shape | changes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.train()


def images(batch=3, height=24, width=16):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [{}, {"depth": 1}, {"pool": "avg"}, {"pool": "avg", "reg_tokens": 3}, {"reg_tokens": 2, "qk_norm": True}],
    ids=str,
)
def test_attention_is_that_of_timm(changes):
    ours = model_of(**changes)
    variant = ours.variant
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=(24, 16), patch_size=8, num_classes=5, embed_dim=32, depth=variant.depth, num_heads=4,
        mlp_ratio=variant.mlp_hidden / 32, class_token=variant.pool == "token", global_pool=variant.pool, fc_norm=False,
        reg_tokens=variant.reg_tokens, qk_norm=variant.qk_norm,
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    last, seen = theirs.blocks[-1].attn, []
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda _module, _inputs, weights: seen.append(weights))
    with torch.no_grad():
        theirs(images())
    (weights,) = seen  # [B, H, S, S]
    looking = weights[:, :, :1] if variant.pool == "token" else weights[:, :, variant.prefix_tokens :]
    wanted = looking[..., variant.prefix_tokens :].mean(dim=2).reshape(3, 4, 3, 2)
    found = attention_maps(ours, images())
    assert found.shape == (3, 4, 3, 2)
    assert found.std() > 0.003  # the comparison is not one of evenly spread attention
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{"pool": "map"}, {"parallel": True}, {"distilled": True}], ids=str)
def test_attention_is_what_the_model_multiplies_its_values_by(changes):
    model = model_of(**changes).eval()
    calls = []

    def spying(query, key, value):
        calls.append((query.double(), key.double()))
        return F.scaled_dot_product_attention(query, key, value)

    with (
        mock.patch("vitscale.model.blocks.F", wraps=F) as blocks,
        mock.patch("vitscale.model.heads.F", wraps=F) as heads,
    ):
        blocks.scaled_dot_product_attention = heads.scaled_dot_product_attention = spying
        with torch.no_grad():
            model(images())
    query, key = calls[-1]
    weights = (query[:, :, :1] @ key.transpose(-2, -1) / 8**0.5).softmax(dim=-1)[:, :, 0]
    wanted = weights[..., weights.shape[-1] - 6 :].reshape(3, 4, 3, 2).float()
    torch.testing.assert_close(attention_maps(model, images()), wanted, rtol=0, atol=1e-6)


def test_looking_leaves_the_model_as_it_was():
    model = model_of(drop_rate=0.5, drop_path_rate=0.5)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    torch.testing.assert_close(attention_maps(model, images()), attention_maps(model, images()), rtol=0, atol=0)
    assert model.training
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(hooks)


@pytest.mark.parametrize("changes", [{}, {"pool": "map"}, {"reg_tokens": 2}], ids=str)
def test_the_position_embedding_is_the_stored_one_of_the_patches(changes):
    model = model_of(**changes)
    model.set_input_size((40, 16))
    with recorded(model) as recording:
        model(images(height=40))
    wanted = model.pos_embed[0, -6:].reshape(3, 2, 32)
    torch.testing.assert_close(recording.position_embedding(), wanted.detach(), rtol=0, atol=0)
    # The maps have the size of the images, whatever the model's own.
    assert recording.attention().shape == (3, 4, 5, 2)


def test_compiled_blocks_are_looked_at_without_compiling_again():
    model = model_of().eval()
    wanted = attention_maps(model, images(batch=2))
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        before = model(images())
        count = len(compiled)
        assert count > 0
        torch.testing.assert_close(attention_maps(model, images(batch=2)), wanted, rtol=0, atol=0)
        assert len(compiled) == count
        torch.testing.assert_close(model(images()), before, rtol=0, atol=0)
    assert len(compiled) == count
