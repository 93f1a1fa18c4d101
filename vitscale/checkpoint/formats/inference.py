"""What a file of weights tells of its architecture by the shapes of its tensors, and what it does not."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitscale.checkpoint.portable import Hints, Shapes
from vitscale.errors import CheckpointError
from vitscale.model import TABLE, VARIANTS, Variant, first_convolution, resolve_variant


def variant_of_state_dict(shapes: Shapes, where: str, hints: Hints) -> Variant:
    """Architecture of a state dict with timm's names, which the user says to be `hints.name`.

    What a fine-tuning may change (classes, image size, channels, representation layer, registers) is taken
    from the shapes all the same.

    Raises:
        CheckpointError: no name was given (shapes tell neither the number of heads nor the pixels that the
            weights expect; the message lists the variants they fit), or this is no Vision Transformer.
    """
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in shapes:
            raise CheckpointError(f"{where}: {key} is missing: this is no Vision Transformer with timm's names")
    if hints.name is None:
        fitting = [name for name, variant in VARIANTS.items() if _has_trunk(variant, shapes)]
        which = f"its shapes fit {', '.join(fitting)}" if fitting else "its shapes fit no variant of the table"
        raise CheckpointError(
            f"{where}: a file without a config tells neither its attention heads nor the pixels it expects: "
            f"say what it is with --model ({which})"
        )
    first = first_convolution(shapes)
    check_dimensions(shapes, where, {first: 4, "pos_embed": 3, "reg_token": 3})
    check_dimensions(shapes, where, {"pre_logits.fc.weight": 2, "head.weight": 2})
    in_chans = shapes[first][1]
    found: dict[str, Any] = {
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "in_chans": in_chans,
        "representation_size": shapes.get("pre_logits.fc.weight", (0,))[0],
        "reg_tokens": shapes["reg_token"][1] if "reg_token" in shapes else 0,
    }
    variant = resolve_variant(hints.name, **{**found, **hints.changes})
    return at_tokens(variant, shapes["pos_embed"][1], where, "img_size" in hints.changes)


def check_dimensions(shapes: Shapes, where: str, dimensions: Mapping[str, int]) -> None:
    """See that the tensors which tell the architecture, as far as they are there, have so many dimensions.

    Raises:
        CheckpointError: one has others, or one of 0.
    """
    for key, expected in dimensions.items():
        if key in shapes and (len(shapes[key]) != expected or 0 in shapes[key]):
            raise CheckpointError(
                f"{where}: {key} has shape {list(shapes[key])}, where {expected} dimensions were expected: "
                "this is another model"
            )


def nearest_name(variant: Variant) -> str:
    """The first name of the table with the same trunk, at the same image size if one has it; else that of B/16."""
    trunk = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_hidden", "stem")
    wanted = [getattr(variant, field) for field in trunk]
    matches = [name for name, known in VARIANTS.items() if [getattr(known, field) for field in trunk] == wanted]
    at_size = [name for name in matches if VARIANTS[name].img_size == variant.img_size]
    return next(iter([*at_size, *matches]), "vit_base_patch16_224")


def architecture_name(timm_architecture: str) -> str | None:
    """The first name of the table that timm gives this architecture, or None."""
    named = ((name, entry.timm_name or name) for name, entry in TABLE.items())
    return next((name for name, timm_name in named if timm_name.split(".")[0] == timm_architecture), None)


def at_tokens(variant: Variant, tokens: int, where: str, told: bool = False) -> Variant:
    """The variant at the square image that the length of a position embedding tells; its own image where it fits.

    Raises:
        CheckpointError: the patches are no square, or the image size was told (`told`) and does not fit.
    """
    if variant.tokens == tokens:
        return variant
    if told:
        raise CheckpointError(
            f"{where}: model.img_size={variant.img_size} makes {variant.tokens} tokens, "
            f"the position embedding has {tokens}"
        )
    patches = tokens - variant.prefix_tokens
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
        raise CheckpointError(
            f"{where}: the position embedding of {tokens} tokens leaves {max(patches, 0)} patches, which are no square "
            "grid: it is of another model, or of images that were not square (say their size with model.img_size=[H,W])"
        )
    height, width = variant.patch_px
    return replace(variant, img_size=(side * height, side * width))


def _has_trunk(variant: Variant, shapes: Shapes) -> bool:
    depth = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key)))
    return (
        depth == variant.depth
        and shapes["blocks.0.mlp.fc1.weight"] == (variant.mlp_hidden, variant.embed_dim)
        and shapes["patch_embed.proj.weight"][2:] == variant.patch_kernel
        and ("dist_token" in shapes) == variant.distilled
        and ("blocks.0.attn.qkv.bias" in shapes) == variant.qkv_bias
        and (first_convolution(shapes) != "patch_embed.proj.weight") == (variant.stem is not None)
    )
