"""What fixes a Vision Transformer: one frozen value with every architectural choice, and the numbers that follow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vitscale.errors import ConfigError

Pool = Literal["token", "avg", "map"]
Act = Literal["gelu", "gelu_tanh", "swiglu"]
Size = int | tuple[int, int]
"""Pixels: the side of a square, or (height, width)."""

_ROOT_STRIDE = 4
# No size of a model is larger; a damaged config's may be.
_LARGEST = 2**31


@dataclass(frozen=True)
class Variant:
    """All that decides which tensors a Vision Transformer has and what it computes with them.

    The defaults are the ViT paper's (Dosovitskiy et al. 2021, arXiv 2010.11929); everything else is off.

    Raises:
        ConfigError: a value is none of its kind, the image is no whole number of patches, the width no whole number
            of heads, or two choices exclude each other.
    """

    patch_size: Size
    """Patch in pixels: the side of a square, or (height, width). Behind a ResNet stem, in cells of its output."""
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
    img_size: Size = 224
    """Input in pixels: the side of a square, or (height, width)."""
    in_chans: int = 3
    """Channels of the input."""
    pool: Pool = "token"
    """What the head reads: the class token, or of a model without one the mean of the patch tokens or what
    a learned probe attends to (multi-head attention pooling: Zhai et al. 2022, arXiv 2106.04560)."""
    distilled: bool = False
    """Whether there is a second token with a head of its own (DeiT: Touvron et al. 2021, arXiv 2012.12877)."""
    reg_tokens: int = 0
    """Register tokens, which nothing reads at the end (Darcet et al. 2024, arXiv 2309.16588)."""
    layer_scale: float = 0.0
    """First value of LayerScale's factors (CaiT: Touvron et al. 2021, arXiv 2103.17239); 0 for none."""
    qk_norm: bool = False
    """LayerNorm of queries and keys, head by head (ViT-22B: Dehghani et al. 2023, arXiv 2302.05442)."""
    parallel: bool = False
    """Attention and MLP side by side on one norm (ViT-22B), not one after the other."""
    act: Act = "gelu"
    """The MLP's activation: exact GELU, the tanh approximation that JAX computes, or SwiGLU (Shazeer 2020,
    arXiv 2002.05202)."""
    norm_bias: bool = True
    """Whether LayerNorms have a bias (ViT-22B's have none)."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm: the JAX code's, ten times smaller than torch's own default."""
    stem: tuple[int, ...] | None = None
    """Units of each stage of the ResNet before the patch embedding (hybrids of the ViT paper); () is the
    ResNet's root alone, None no ResNet."""

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "stem"):  # YAML and JSON have lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_values()
        for name in ("img_size", "patch_size"):
            height, width = _pair(getattr(self, name))
            if height == width:
                object.__setattr__(self, name, height)
        self._check_division()
        self._check_choices()

    def _check_values(self) -> None:
        """Annotations bind nobody, and configs of others end here."""
        for names, holds, wanted in _KINDS:
            for name in names:
                if not holds(getattr(self, name)):
                    raise ConfigError(f"model.{name} {getattr(self, name)!r}: {wanted} is wanted")

    def _check_division(self) -> None:
        cells = "" if self.stem is None else f" (cells of {self.stem_stride} px behind the stem)"
        for side, kernel, patch in zip(self.image_px, self.patch_kernel, self.patch_px, strict=True):
            if side % patch:
                raise ConfigError(
                    f"model.img_size {side} is no multiple of model.patch_size {kernel}{cells}: "
                    f"use model.img_size={_multiples_around(side, patch)}"
                )
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"model.embed_dim {self.embed_dim} is no multiple of model.num_heads {self.num_heads}: "
                f"use model.embed_dim={_multiples_around(self.embed_dim, self.num_heads)}, or another model.num_heads"
            )

        if self.mlp_hidden == 0:
            raise ConfigError(
                f"model.mlp_ratio {self.mlp_ratio} of model.embed_dim {self.embed_dim} leaves no hidden unit"
            )

    def _check_choices(self) -> None:
        if self.distilled and self.pool != "token":
            raise ConfigError(f"model.distilled needs a class token beside its own: not model.pool={self.pool}")
        if self.distilled and self.representation_size:
            raise ConfigError(
                f"model.representation_size {self.representation_size} does not go with model.distilled, whose two "
                "heads read their tokens: use model.representation_size=0"
            )

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return _pair(self.img_size)

    @property
    def patch_kernel(self) -> tuple[int, int]:
        """Height and width of the patch embedding's kernel, in cells of what it reads."""
        return _pair(self.patch_size)

    @property
    def stem_stride(self) -> int:
        """Pixels along a side of one cell of what the patch embedding reads: 1 without a ResNet stem."""
        if self.stem is None:
            return 1
        return _ROOT_STRIDE << max(len(self.stem) - 1, 0)

    @property
    def patch_px(self) -> tuple[int, int]:
        """Height and width in pixels of what becomes one token."""
        height, width = self.patch_kernel
        return height * self.stem_stride, width * self.stem_stride

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (patch_height, patch_width) = self.image_px, self.patch_px
        return height // patch_height, width // patch_width

    @property
    def patches(self) -> int:
        """Number of patches."""
        rows, columns = self.grid
        return rows * columns

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: class token, distillation token and registers, as far as there are any."""
        return (self.pool == "token") + self.distilled + self.reg_tokens

    @property
    def tokens(self) -> int:
        """Length of the sequence that the blocks see."""
        return self.patches + self.prefix_tokens

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP: rounded, because no float is 48/11 or 64/13 and cutting off could lose a unit."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def head_input(self) -> int:
        """Width of what the head reads."""
        return self.representation_size or self.embed_dim

    def arguments(self) -> dict[str, Any]:
        """The fields by name, as `create_model` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _is_count(number: Any, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and least <= number <= _LARGEST


def _is_number(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(_is_count(number, 1) for number in numbers)


_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("img_size", "patch_size"),
        lambda size: _is_count(size, 1) or (_are_counts(size) and len(size) == 2),
        "a whole number of pixels, or [height, width],",
    ),
    (("embed_dim", "depth", "num_heads", "in_chans"), lambda n: _is_count(n, 1), "a whole number from 1 on"),
    (("representation_size", "num_classes", "reg_tokens"), lambda n: _is_count(n, 0), "a whole number from 0 on"),
    (("mlp_ratio", "norm_eps"), lambda n: _is_number(n) and n > 0, "a number above 0"),
    (("layer_scale",), lambda n: _is_number(n) and n >= 0, "a number from 0 on"),
    (("pool",), lambda word: word in get_args(Pool), f"one of {', '.join(get_args(Pool))}"),
    (("act",), lambda word: word in get_args(Act), f"one of {', '.join(get_args(Act))}"),
    (
        ("qkv_bias", "distilled", "qk_norm", "parallel", "norm_bias"),
        lambda choice: isinstance(choice, bool),
        "true or false",
    ),
    (("stem",), lambda stages: stages is None or _are_counts(stages), "a list of whole numbers from 1 on, or none,"),
)


def _pair(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _multiples_around(value: int, unit: int) -> str:
    below = value // unit * unit
    return " or ".join(str(multiple) for multiple in (below, below + unit) if multiple)
