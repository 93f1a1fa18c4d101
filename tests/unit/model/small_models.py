"""Models small enough for a test of every option, and weights and images that leave nothing to chance."""

import torch

from vitscale.model import create_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}

# Everything that changes which tensors a model has or what it computes with them.
OPTIONS = {
    "plain": {},
    "avg": {"pool": "avg"},
    "map": {"pool": "map"},
    "registers": {"reg_tokens": 3},
    "map with registers": {"pool": "map", "reg_tokens": 2},
    "distilled": {"distilled": True},
    "distilled with registers": {"distilled": True, "reg_tokens": 2},
    "layer scale": {"layer_scale": 0.1},
    "qk norm": {"qk_norm": True},
    "parallel": {"parallel": True},
    "ViT-22B": {"parallel": True, "pool": "map", "qk_norm": True, "qkv_bias": False, "norm_bias": False},
    "tanh GELU": {"act": "gelu_tanh"},
    "SwiGLU": {"act": "swiglu", "mlp_ratio": 8 / 3},
    "SwiGLU with map": {"act": "swiglu", "pool": "map"},
    "no qkv bias": {"qkv_bias": False},
    "no norm bias": {"norm_bias": False},
    "norm epsilon": {"norm_eps": 1e-3},
    "odd MLP": {"mlp_ratio": 48 / 11},
    "one channel": {"in_chans": 1},
    "four channels": {"in_chans": 4},
    "oblong": {"img_size": (32, 48), "patch_size": (8, 16)},
    "representation": {"representation_size": 20},
    "map with representation": {"pool": "map", "representation_size": 20},
    "no head": {"num_classes": 0},
    "distilled without head": {"distilled": True, "num_classes": 0},
    "ResNet root": {"stem": (), "patch_size": 2},
    "ResNet stem": {"stem": (1, 2), "patch_size": 1, "reg_tokens": 1},
    "jax_nlhb": {"weight_init": "jax_nlhb", "representation_size": 20},
    "trunc_normal": {"weight_init": "trunc_normal", "pool": "map", "representation_size": 20, "act": "swiglu"},
}


def tiny(**arguments):
    return create_model("vit_tiny_patch16_224", **{"num_classes": 7, **TINY, **arguments})


def randomise(model, seed=0):
    """Give every tensor values that tell it from every other, the norms and the zero head too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # A norm's scale or LayerScale near 0 would hide the branch behind it.
        mean = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("gamma") else 0.0
        parameter.data.normal_(mean, 0.05, generator=generator)
    return model.eval()


def images_for(model, batch=2):
    shape = (batch, model.variant.in_chans, *model.variant.image_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())
