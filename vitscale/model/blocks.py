"""The parts of a Vision Transformer's trunk: patch embedding, attention, MLP and the block made of them.

Every module sets its own parameters while it is built, with the distributions of the ViT paper's JAX code
(Dosovitskiy et al. 2021), and nothing writes to them from outside: ZeRO stage 3 partitions the parameters
of a module as soon as its `__init__` returns.

Shapes: B images, C channels, S tokens, D width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6
"""Epsilon of every LayerNorm: the JAX code's, ten times smaller than torch's own default."""

_MLP_BIAS_STD = 1e-6
# Standard deviation of a unit normal that is cut off at -2 and 2.
_TRUNCATED_STD = 0.87962566103423978


def lecun_normal_(weight: Tensor) -> None:
    """Fill with a normal of variance 1 / fan_in, cut off at two deviations (LeCun et al. 1998, as in JAX)."""
    fan_in = weight[0].numel()
    std = math.sqrt(1 / fan_in) / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class PatchProjection(nn.Conv2d):
    """Linear map of whole patches: [B, C, side, side] -> [B, D, grid, grid]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        """LeCun normal weight, zero bias."""
        lecun_normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class PatchEmbed(nn.Module):
    """Cut square images into patches and embed each: [B, C, img_size, img_size] -> [B, grid^2, D]."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.proj = PatchProjection(patch_size, in_chans, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens in row-major order."""
        # The convolution would cut off a rest of pixels without a word.
        assert images.shape[2:] == (self.img_size, self.img_size), f"{tuple(images.shape)} is not {self.img_size} px"
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class QKVLinear(nn.Linear):
    """Queries, keys and values by one product: [..., D] -> [..., 3D]."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__(dim, 3 * dim, bias=bias)

    def reset_parameters(self) -> None:
        """Xavier uniform for each matrix apart: as one of 3D outputs, all would start sqrt(2) too small. Zero bias."""
        with torch.no_grad():
            for part in self.weight.chunk(3):
                nn.init.xavier_uniform_(part)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class OutputLinear(nn.Linear):
    """Projection of the joined heads: [..., D] -> [..., D]."""

    def reset_parameters(self) -> None:
        """Xavier uniform weight, zero bias."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class MlpLinear(nn.Linear):
    """One of the two layers of an MLP."""

    def reset_parameters(self) -> None:
        """Xavier uniform weight, bias normal with a deviation of 1e-6."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.normal_(self.bias, std=_MLP_BIAS_STD)


class Attention(nn.Module):
    """Multi-head self-attention, [B, S, D] -> [B, S, D] (Vaswani et al. 2017); dropout acts on the output only."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, drop_rate: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QKVLinear(dim, bias=qkv_bias)
        self.proj = OutputLinear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens, scaled by 1 / sqrt(D / H)."""
        batch, tokens, dim = x.shape
        qkv: Tensor = self.qkv(x)
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        x = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return self.proj_drop(x)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between, each followed by dropout: [..., D] -> [..., D]."""

    def __init__(self, dim: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = MlpLinear(dim, hidden)
        self.fc2 = MlpLinear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token on its own."""
        x = self.drop(F.gelu(self.fc1(x)))
        return self.drop(self.fc2(x))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, a sample's branch is 0 with probability `rate`.

    Branches that stay are scaled by 1 / (1 - rate), which keeps the expectation.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole samples of [B, S, D]; the identity in evaluation."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm transformer block, [B, S, D] -> [B, S, D]: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self, dim: int, num_heads: int, mlp_hidden: int, *, qkv_bias: bool, drop_rate: float, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias, drop_rate)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_hidden, drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches to the residual stream."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]
