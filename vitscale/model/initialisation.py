"""How fresh weights are drawn: three published schemes.

`jax` is the ViT paper's code (Dosovitskiy et al. 2021), `jax_nlhb` the same with a head bias of minus the
logarithm of the number of classes, `trunc_normal` the truncated normal of DeiT and of timm's first ViTs.

Each module draws its own parameters while it is built, and nothing writes to them from outside: ZeRO stage 3
partitions the parameters of a module as soon as its `__init__` returns.
"""

import math
from typing import Literal

from torch import Tensor, nn

Scheme = Literal["jax", "jax_nlhb", "trunc_normal"]

STD = 0.02
"""Deviation of position embeddings, and of every weight under `trunc_normal`."""
# Standard deviation of a unit normal that is cut off at -2 and 2.
_TRUNCATED_STD = 0.87962566103423978


def lecun_normal_(weight: Tensor) -> None:
    """Fill with a normal of variance 1 / fan_in, cut off at two deviations (LeCun et al. 1998, as in JAX)."""
    std = math.sqrt(1 / weight[0].numel()) / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Linear(nn.Linear):
    """A linear layer of the trunk, [..., in_features] -> [..., out_features].

    Under the JAX schemes its weight starts Xavier uniform; `matrices` says how many matrices are stacked in it
    (queries, keys and values), each drawn apart: as one, all would start too small. Its bias starts as a
    normal of deviation `bias_std`, or 0. Under `trunc_normal` the weight is a truncated normal and the bias 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        scheme: Scheme,
        matrices: int = 1,
        bias_std: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if scheme == "trunc_normal":
            nn.init.trunc_normal_(self.weight, std=STD)
        else:
            for matrix in self.weight.detach().chunk(matrices):
                nn.init.xavier_uniform_(matrix)
        if self.bias is not None:
            if scheme == "trunc_normal" or bias_std == 0.0:
                nn.init.zeros_(self.bias)
            else:
                nn.init.normal_(self.bias, std=bias_std)

    def reset_parameters(self) -> None:
        """Draw nothing: `__init__` does, once, with the scheme it was given."""
