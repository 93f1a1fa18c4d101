"""Models small enough for a test of every format, with weights that tell every tensor from every other."""

from dataclasses import replace

import torch

from vitscale.checkpoint import Origin, PortableModel
from vitscale.model import Preprocessing, VisionTransformer, resolve_variant

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
PIXELS = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=0.8, interpolation="bilinear")


def random_portable(name="vit_tiny_patch16_224", *, seed=0, **changes) -> PortableModel:
    """A model of the table, made small and changed, with random weights and labels for its classes."""
    return randomised(name, resolve_variant(name, **{**SMALL, **changes}), seed)


def randomised(name, variant, seed=0) -> PortableModel:
    """A model of this architecture with random weights and labels."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, tensor in VisionTransformer(variant).state_dict().items():
        # A norm's scale or LayerScale near 0 would hide the branch behind it.
        scales = ("norm" in key and key.endswith("weight")) or key.endswith("gamma")
        weights[key] = torch.empty_like(tensor).normal_(float(scales), 0.1, generator=generator)
    labels = tuple(f"n{index:08}" for index in range(variant.num_classes))
    return PortableModel(name, variant, weights, PIXELS, Origin("run/step-00000001", "a" * 64), labels)


def with_weights(model: PortableModel, **tensors) -> PortableModel:
    """The model with some tensors replaced; double underscores in a name stand for dots."""
    return replace(model, weights={**model.weights, **{k.replace("__", "."): t for k, t in tensors.items()}})


def images_for(model: PortableModel, dtype=torch.float64, batch=2) -> torch.Tensor:
    """Noise, as normalised pixels are."""
    shape = (batch, model.variant.in_chans, *model.variant.image_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
