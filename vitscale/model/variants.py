"""The table of Vision Transformers this package builds, and the numbers that follow from a row.

Shapes are those of the ViT paper (Dosovitskiy et al. 2021) for Ti to H and of Scaling Vision Transformers
(Zhai et al. 2022) for g and G.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from vitscale.errors import ConfigError

Pool = Literal["token", "avg"]


@dataclass(frozen=True)
class Variant:
    """All that fixes the shapes of a Vision Transformer's tensors.

    Raises:
        ConfigError: the image is no whole number of patches, or the width no whole number of heads.
    """

    patch_size: int
    """Side of a patch in pixels."""
    embed_dim: int
    """Width of a token."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads of a block."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over `embed_dim`; `mlp_hidden` is the rounded product."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    representation_size: int = 0
    """Width of the layer between pooling and head; 0 for none."""
    num_classes: int = 1000
    """Outputs of the head; 0 for no head."""
    img_size: int = 224
    """Side of the square input in pixels."""
    in_chans: int = 3
    """Channels of the input."""
    pool: Pool = "token"
    """What the head reads: the class token, or the mean of the patch tokens of a model without one."""

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            nearest = _multiples_around(self.img_size, self.patch_size)
            raise ConfigError(
                f"model.img_size {self.img_size} is no multiple of model.patch_size {self.patch_size}: "
                f"use model.img_size={nearest}"
            )
        if self.embed_dim % self.num_heads:
            nearest = _multiples_around(self.embed_dim, self.num_heads)
            raise ConfigError(
                f"model.embed_dim {self.embed_dim} is no multiple of model.num_heads {self.num_heads}: "
                f"use model.embed_dim={nearest}, or another model.num_heads"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.img_size // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: 1 with a class token, else 0."""
        return 1 if self.pool == "token" else 0

    @property
    def tokens(self) -> int:
        """Length of the sequence that the blocks see."""
        return self.grid**2 + self.prefix_tokens

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP: rounded, because no float is 48/11 or 64/13 and cutting off could lose a unit."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def head_input(self) -> int:
        """Width of what the head reads."""
        return self.representation_size or self.embed_dim


def _multiples_around(value: int, unit: int) -> str:
    below = value // unit * unit
    return " or ".join(str(multiple) for multiple in (below, below + unit) if multiple)


_TINY = Variant(patch_size=16, embed_dim=192, depth=12, num_heads=3)
_SMALL = Variant(patch_size=16, embed_dim=384, depth=12, num_heads=6)
_BASE = Variant(patch_size=16, embed_dim=768, depth=12, num_heads=12)
_LARGE = Variant(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
_HUGE = Variant(patch_size=14, embed_dim=1280, depth=32, num_heads=16)
_GIANT = Variant(patch_size=14, embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11)
_GIGANTIC = Variant(patch_size=14, embed_dim=1664, depth=48, num_heads=16, mlp_ratio=64 / 13)

IN21K_CLASSES = 21_843
"""Classes of the full ImageNet-21k release."""

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "vit_tiny_patch16_224": _TINY,
        "vit_small_patch16_224": _SMALL,
        "vit_base_patch16_224": _BASE,
        "vit_large_patch16_224": _LARGE,
        "vit_huge_patch14_224": _HUGE,
        "vit_giant_patch14_224": _GIANT,
        "vit_gigantic_patch14_224": _GIGANTIC,
        "vit_tiny_patch16_224_in21k": replace(_TINY, num_classes=IN21K_CLASSES),
        "vit_small_patch16_224_in21k": replace(_SMALL, num_classes=IN21K_CLASSES),
        "vit_base_patch16_224_in21k": replace(_BASE, num_classes=IN21K_CLASSES),
        "vit_large_patch16_224_in21k": replace(_LARGE, num_classes=IN21K_CLASSES),
        "vit_huge_patch14_224_in21k": replace(_HUGE, num_classes=IN21K_CLASSES, representation_size=1280),
    }
)
"""Every variant by its name; `num_classes` is that of the published weights of this name."""


def resolve_variant(name: str, **changes: Any) -> Variant:
    """The variant of this name with the given fields changed; a change to None leaves the variant's own value.

    Raises:
        ConfigError: no variant has this name (the message names the nearest), or the changed shape is none.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
        mend = f"did you mean {' or '.join(near)}?" if near else f"the variants are {', '.join(VARIANTS)}"
        raise ConfigError(f"model.name {name!r} is unknown: {mend}")
    return replace(VARIANTS[name], **{field: value for field, value in changes.items() if value is not None})
