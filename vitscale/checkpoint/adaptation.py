"""A model made to fit another task: other images, channels, classes, registers; never another trunk."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.checkpoint.portable import LazyWeights, PortableModel, parameter_shapes, wrong_shape
from vitscale.errors import CheckpointError
from vitscale.model import Resampling, Variant, adapt_in_chans, first_convolution, resample_pos_embed

_TRUNK = (
    "patch_size", "embed_dim", "depth", "num_heads", "mlp_hidden", "qkv_bias", "layer_scale", "qk_norm",
    "parallel", "act", "norm_bias", "norm_eps", "stem",
)  # fmt: skip
# What a head depends on.
_HEAD = ("num_classes", "representation_size", "pool", "distilled")


def check_trunk(model: PortableModel, target: Variant) -> None:
    """See that a model's weights are of the trunk of another architecture.

    Raises:
        CheckpointError: naming the first difference and the config key that mends it.
    """
    for key in _TRUNK:
        ours, theirs = getattr(model.variant, key), getattr(target, key)
        if key == "layer_scale":  # the first value of factors that are loaded does not matter
            ours, theirs = bool(ours), bool(theirs)
        if ours != theirs:
            setting = "mlp_ratio" if key == "mlp_hidden" else key
            raise CheckpointError(
                f"{model.origin.path} has {key} {ours}, the model {theirs}: "
                f"set model.{setting}={_typed(getattr(model.variant, setting))}"
            )
    own = model.variant
    if target.pool not in {own.pool, "avg"}:
        raise CheckpointError(
            f"{model.origin.path} has pool {own.pool}, the model {target.pool}: set model.pool={own.pool}, "
            "or avg, which any trunk can have"
        )
    if target.distilled and not own.distilled:
        raise CheckpointError(
            f"{model.origin.path} has no distillation token, the model has one: set model.distilled=false"
        )


def adapt_to(model: PortableModel, target: Variant, method: Resampling = "timm") -> PortableModel:
    """The model with the weights that fit another architecture of the same trunk.

    The position embedding is resized, the first convolution takes other channels, and tokens, attention pooling and
    the representation layer are dropped where the target has none; registers that are new start from zero. A head
    for another number of classes, or that read something else, is dropped: the result then has none
    (`num_classes` 0) and the caller puts a fresh one.

    Args:
        model: the weights.
        target: the architecture; `num_classes` and `representation_size` are what is wanted.
        method: how the position embedding is resized.

    Raises:
        CheckpointError: the trunk is another one, or the target wants a representation layer of another width.
    """
    check_trunk(model, target)
    own = model.variant
    if target.representation_size not in {0, own.representation_size}:
        raise CheckpointError(
            f"{model.origin.path} has a representation layer of {own.representation_size}, the model of "
            f"{target.representation_size}: set model.representation_size={own.representation_size}"
        )
    keeps_head = all(getattr(target, key) == getattr(own, key) for key in _HEAD)
    variant = replace(target, num_classes=own.num_classes if keeps_head else 0)
    makers: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(_adapted, model, name, shape, variant, method)
        for name, shape in parameter_shapes(variant).items()
    }
    labels = model.labels if keeps_head else ()
    return replace(model, variant=variant, weights=LazyWeights(makers), labels=labels)


def without_head(model: PortableModel) -> PortableModel:
    """The features alone: neither representation layer nor head."""
    return adapt_to(model, replace(model.variant, num_classes=0, representation_size=0))


def load_into(model: torch.nn.Module, weights: PortableModel) -> None:
    """Copy the weights into a built model; what they do not have (a fresh head) stays as it is.

    Raises:
        CheckpointError: a tensor has another shape than the model's (nothing is copied then), or is damaged.
    """
    targets = model.state_dict()
    for name, shape in weights.shapes.items():
        if name not in targets:
            raise CheckpointError(f"{weights.origin.path}: {name} {list(shape)} has no place in this model")
        if shape != tuple(targets[name].shape):
            raise CheckpointError(wrong_shape(weights.origin.path, name, shape, tuple(targets[name].shape)))
    with torch.no_grad():
        for name in weights.shapes:
            targets[name].copy_(weights.checked(name))


def _typed(value: Any) -> str:
    """A value as YAML reads it behind `key=`: a tuple and None are none of its words."""
    return json.dumps(value, separators=(",", ":")) if value is None or isinstance(value, tuple) else str(value)


def _adapted(model: PortableModel, name: str, shape: tuple[int, ...], variant: Variant, method: Resampling) -> Tensor:
    own = model.variant
    if name == "reg_token":
        return _first_or_zero(model.checked(name) if own.reg_tokens else torch.zeros(1, 0, shape[2]), shape[1])
    tensor = model.checked(name)
    if name == "pos_embed":
        tensor = _with_prefix_of(tensor, own, variant)
        return resample_pos_embed(tensor, variant.grid, variant.prefix_tokens, old_grid=own.grid, method=method)
    if name == first_convolution(model.shapes):
        return adapt_in_chans(tensor, variant.in_chans)
    return tensor


def _with_prefix_of(pos_embed: Tensor, own: Variant, target: Variant) -> Tensor:
    """A position embedding with the rows of the target's tokens before the patches, each token's its own."""
    sizes = [(v.pool == "token", v.distilled, v.reg_tokens) for v in (own, target)]
    *rows, patches = torch.split(pos_embed, [*map(int, sizes[0]), own.patches], dim=1)
    kept = [_first_or_zero(row, int(count)) for row, count in zip(rows, sizes[1], strict=True)]
    return torch.cat([*kept, patches], dim=1)


def _first_or_zero(rows: Tensor, count: int) -> Tensor:
    """The first `count` of [1, n, D], with zeros where there are fewer."""
    return F.pad(rows[:, :count], (0, 0, 0, max(count - rows.shape[1], 0)))
