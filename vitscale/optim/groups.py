"""Which parameters decay, how strongly, and how fast each layer learns."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import nn

HEADS = frozenset({"head.weight", "head_dist.weight"})
"""The classifiers' matrices; all other matrices are the body's."""
_KINDS = ("decay", "head_decay", "no_decay")


class DecayRule(Protocol):
    """A module that names the parameters it wants exempt from weight decay."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter with its name, in a stable order."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module with its name."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without decay, beside those of one dimension."""


def parameter_groups(
    model: DecayRule, weight_decay: float, head_weight_decay: float | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups by layer and decay, each in the order of the model's parameters; frozen ones are in none.

    Not decayed are the parameters of one dimension (biases and norms) and those the model names (position
    embedding, tokens, attention pooling's probe). The engine multiplies a group's rate by its `lr_scale`:
    layer_decay ** (the layers above it), with layers as in BEiT and EVA: what embeds, each block, the rest.

    Args:
        model: its parameters and their exemptions.
        weight_decay: of the body's matrices.
        head_weight_decay: of the classifiers' matrices; None for that of the body.
        layer_decay: factor between the rates of a layer and of the one above it.
    """
    exempt = model.no_weight_decay()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    top = 1 + max((_layer(name, 0) for name, _ in named), default=0)
    strengths = {"decay": weight_decay, "head_decay": head_weight_decay, "no_decay": 0.0}
    found: dict[tuple[int, str], list[nn.Parameter]] = {}
    for name, parameter in named:
        kind = "head_decay" if name in HEADS and head_weight_decay is not None else "decay"
        if name in exempt or len(true_shape(parameter)) <= 1:
            kind = "no_decay"
        layer = _layer(name, top) if layer_decay != 1.0 else top
        found.setdefault((layer, kind), []).append(parameter)
    return [
        {
            "name": kind if layer_decay == 1.0 else f"layer_{layer}_{kind}",
            "params": found[layer, kind],
            "weight_decay": strengths[kind],
            "lr_scale": layer_decay ** (top - layer),
        }
        for layer, kind in sorted(found, key=lambda key: (key[0], _KINDS.index(key[1])))
    ]


def true_shape(parameter: nn.Parameter) -> Sequence[int]:
    """The shape of a parameter: under ZeRO stage 3 a partitioned one is empty, and `ds_shape` holds it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _layer(name: str, top: int) -> int:
    """0 for what embeds, 1 and up for blocks, `top` for what follows them."""
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0]) + 1
    return 0 if first in {"patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token"} else top
