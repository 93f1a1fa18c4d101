"""Which parameters decay."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn


class DecayRule(Protocol):
    """A module that names the parameters it wants exempt from weight decay."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter with its name, in a stable order."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without decay, beside those of one dimension."""


def parameter_groups(model: DecayRule, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups, "decay" and "no_decay", each in the order of the model's parameters.

    Not decayed are the parameters of one dimension (biases and norms) and those the model names (position
    embedding, class token).
    """
    exempt = model.no_weight_decay()
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # Under ZeRO stage 3 a partitioned parameter is empty, and `ds_shape` holds its true shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (no_decay if name in exempt or len(shape) <= 1 else decay).append(parameter)
    return [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
