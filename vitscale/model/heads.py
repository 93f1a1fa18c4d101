"""What follows the trunk: attention pooling, the representation layer and the classifier.

Like the trunk's modules, each sets its own parameters while it is built.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.model.blocks import Mlp, layer_norm
from vitscale.model.initialisation import STD, Linear, Scheme, lecun_normal_
from vitscale.model.variants import Variant


class AttentionPool(nn.Module):
    """Multi-head attention pooling (MAP: Lee et al. 2019; Zhai et al. 2022): [B, S, D] -> [B, D].

    A learned probe attends to all tokens; a residual MLP follows.
    """

    def __init__(self, variant: Variant, scheme: Scheme) -> None:
        super().__init__()
        dim = variant.embed_dim
        self.num_heads = variant.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        # As one row, 1 input and D outputs: of the whole tensor torch makes D inputs, and starts it sqrt(2) too small.
        nn.init.xavier_uniform_(self.latent.detach()[0])
        self.q = Linear(dim, dim, scheme=scheme)
        self.kv = Linear(dim, 2 * dim, scheme=scheme, matrices=2)
        self.proj = Linear(dim, dim, scheme=scheme)
        self.norm = layer_norm(dim, variant)
        self.mlp = Mlp(dim, variant.mlp_hidden, variant.act, 0.0, scheme)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool all tokens into one."""
        batch, count, dim = tokens.shape
        heads = (self.num_heads, dim // self.num_heads)
        q = self.q(self.latent).view(1, 1, *heads).transpose(1, 2).expand(batch, -1, -1, -1)
        k, v = self.kv(tokens).view(batch, count, 2, *heads).permute(2, 0, 3, 1, 4)
        x: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, dim))
        x = x + self.mlp(self.norm(x))
        return x


class RepresentationLinear(nn.Linear):
    """The linear part of the representation layer."""

    def __init__(self, in_features: int, out_features: int, scheme: Scheme) -> None:
        super().__init__(in_features, out_features)
        if scheme == "trunc_normal":
            nn.init.trunc_normal_(self.weight, std=STD)
        else:
            lecun_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Draw nothing: `__init__` does."""


class PreLogits(nn.Module):
    """The representation layer of the ViT paper's pretraining head: [B, D] -> tanh(linear) [B, representation_size]."""

    def __init__(self, embed_dim: int, representation_size: int, scheme: Scheme) -> None:
        super().__init__()
        self.fc = RepresentationLinear(embed_dim, representation_size, scheme)

    def forward(self, features: Tensor) -> Tensor:
        """The representation, within -1 and 1."""
        return torch.tanh(self.fc(features))


class Classifier(nn.Linear):
    """Linear classifier: [B, in_features] -> [B, num_classes].

    With `multiple` above 1 the matrix product has its outputs padded with zeros to a multiple of it, which GPUs want
    of 16-bit matrices (21,843 classes are odd; 21,888 is 342 x 64). Weight and bias keep their shapes, and what they
    are padded with is cut off again: nobody else sees it, and logits and gradients are as without.

    Under the JAX schemes it starts from zero weights, so that every first logit is its bias: `bias_init`, or
    under `jax_nlhb` minus the logarithm of the number of classes where `bias_init` is None.
    """

    def __init__(
        self, in_features: int, num_classes: int, scheme: Scheme, bias_init: float | None = None, multiple: int = 1
    ) -> None:
        super().__init__(in_features, num_classes)
        self.multiple = multiple
        if scheme == "trunc_normal":
            nn.init.trunc_normal_(self.weight, std=STD)
        else:
            nn.init.zeros_(self.weight)
        if bias_init is None:
            bias_init = -math.log(num_classes) if scheme == "jax_nlhb" else 0.0
        nn.init.constant_(self.bias, bias_init)

    def forward(self, features: Tensor) -> Tensor:
        """The logits; of a padded product a view of its rows, not contiguous."""
        missing = -self.out_features % self.multiple
        if missing == 0:
            return super().forward(features)
        weight, bias = F.pad(self.weight, (0, 0, 0, missing)), F.pad(self.bias, (0, missing))
        return F.linear(features, weight, bias)[..., : self.out_features]

    def reset_parameters(self) -> None:
        """Draw nothing: `__init__` does."""
