"""The parts of a Vision Transformer's trunk: patch embedding, attention, MLP and the blocks made of them.

Shapes: B images, C channels, S tokens, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitscale.model.drop_path import DropPath, DropPathMode, add_branch, take
from vitscale.model.execution import ResidualBlock
from vitscale.model.initialisation import STD, Linear, Scheme, lecun_normal_
from vitscale.model.resnet import build_stem, stem_chans
from vitscale.model.variants import Act, Variant

_MLP_BIAS_STD = 1e-6


def layer_norm(width: int, variant: Variant) -> nn.LayerNorm:
    """LayerNorm over the last dimension, with the variant's epsilon and bias."""
    return nn.LayerNorm(width, eps=variant.norm_eps, bias=variant.norm_bias)


class PatchProjection(nn.Conv2d):
    """Linear map of whole patches, in the shape of a convolution: [B, C, H, W] -> [B, rows * columns, D]."""

    def __init__(self, patch: tuple[int, int], in_chans: int, embed_dim: int, scheme: Scheme) -> None:
        super().__init__(in_chans, embed_dim, kernel_size=patch, stride=patch)
        if scheme == "trunc_normal":
            nn.init.trunc_normal_(self.weight, std=STD)
        else:
            lecun_normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Draw nothing: `__init__` does."""

    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens in row-major order.

        One product of matrices: a convolution would lay out all channels' first token, then their second, and
        without a class token to copy them behind, every norm and addition of the trunk would work across that.
        """
        batch, channels, _, across = images.shape
        height, width = self.kernel_size
        cells = images.reshape(batch, channels, -1, height, across // width, width)
        patches = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Cut images into patches and embed each: [B, C, height, width] -> [B, rows * columns, D].

    A hybrid's patches are cells of what its ResNet stem (`backbone`) makes of the image.
    """

    def __init__(self, variant: Variant, scheme: Scheme) -> None:
        super().__init__()
        self.image_px = variant.image_px
        stem = variant.stem
        self.backbone = None if stem is None else build_stem(variant.in_chans, stem)
        channels = variant.in_chans if stem is None else stem_chans(stem)
        self.proj = PatchProjection(variant.patch_kernel, channels, variant.embed_dim, scheme)

    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens in row-major order."""
        assert images.shape[2:] == self.image_px, f"{tuple(images.shape)} is not {self.image_px} px"
        if self.backbone is not None:
            images = self.backbone(images)
        return self.proj(images)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention, [B, S, D] -> [B, S, D] (Vaswani et al. 2017); dropout acts on the output only."""

    def __init__(self, variant: Variant, drop_rate: float, scheme: Scheme) -> None:
        super().__init__()
        dim = variant.embed_dim
        self.num_heads = variant.num_heads
        self.qkv = Linear(dim, 3 * dim, bias=variant.qkv_bias, scheme=scheme, matrices=3)
        self.q_norm = layer_norm(variant.head_dim, variant) if variant.qk_norm else nn.Identity()
        self.k_norm = layer_norm(variant.head_dim, variant) if variant.qk_norm else nn.Identity()
        self.proj = Linear(dim, dim, scheme=scheme)
        self.proj_drop = nn.Dropout(drop_rate)
        self.kernel: SDPBackend | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens, scaled by 1 / sqrt(D / H)."""
        batch, tokens, dim = x.shape
        # Cut before the heads are: then the backward pass joins the three gradients by one plain copy, not by two.
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.kernel is None:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            # Here and not around the model: a recomputation has to find it too.
            with sdpa_kernel(self.kernel):
                x = F.scaled_dot_product_attention(q, k, v)
        x = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return self.proj_drop(x)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with an activation between, each followed by dropout: [..., D] -> [..., D].

    With SwiGLU the first layer makes twice the hidden width, gates first: silu(gate) * value.
    """

    def __init__(self, dim: int, hidden: int, act: Act, drop_rate: float, scheme: Scheme) -> None:
        super().__init__()
        self.act = act
        halves = 2 if act == "swiglu" else 1
        self.fc1 = Linear(dim, halves * hidden, scheme=scheme, matrices=halves, bias_std=_MLP_BIAS_STD)
        self.fc2 = Linear(hidden, dim, scheme=scheme, bias_std=_MLP_BIAS_STD)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token on its own."""
        x = self.fc1(x)
        if self.act == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x, approximate="tanh" if self.act == "gelu_tanh" else "none")
        return self.drop(self.fc2(self.drop(x)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor for each feature (Touvron et al. 2021, CaiT), all `first` at the start."""

    def __init__(self, dim: int, first: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), first))

    def forward(self, x: Tensor) -> Tensor:
        """Scale [..., D]."""
        return x * self.gamma


class Block(ResidualBlock):
    """Pre-norm transformer block, [B, S, D] -> [B, S, D]: x + attention(norm(x)), then x + MLP(norm(x))."""

    draws = 2

    def __init__(
        self,
        variant: Variant,
        *,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_mode: DropPathMode = "mask",
        scheme: Scheme = "jax",
    ) -> None:
        super().__init__(DropPath(drop_path_rate, drop_path_mode), needs_last_product=_is_scaled(variant, drop_rate))
        dim = variant.embed_dim
        self.norm1 = layer_norm(dim, variant)
        self.attn = Attention(variant, drop_rate, scheme)
        self.ls1 = _layer_scale(variant)
        self.norm2 = layer_norm(dim, variant)
        self.mlp = Mlp(dim, variant.mlp_hidden, variant.act, drop_rate, scheme)
        self.ls2 = _layer_scale(variant)

    def branches(self, x: Tensor, *draws: Tensor | None) -> tuple[Tensor, ...]:
        """The stream behind the attention, and the MLP's branch of it."""
        attended, transformed = draws
        x = add_branch(x, self.ls1(self.attn(self.norm1(take(x, attended)))), attended)
        return x, self.ls2(self.mlp(self.norm2(take(x, transformed))))


class ParallelBlock(ResidualBlock):
    """Block of ViT-22B (Dehghani et al. 2023), [B, S, D] -> [B, S, D]: y = norm(x), then x + attention(y) + MLP(y)."""

    def __init__(
        self,
        variant: Variant,
        *,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_mode: DropPathMode = "mask",
        scheme: Scheme = "jax",
    ) -> None:
        super().__init__(DropPath(drop_path_rate, drop_path_mode), needs_last_product=_is_scaled(variant, drop_rate))
        dim = variant.embed_dim
        self.norm1 = layer_norm(dim, variant)
        self.attn = Attention(variant, drop_rate, scheme)
        self.mlp = Mlp(dim, variant.mlp_hidden, variant.act, drop_rate, scheme)
        self.ls1 = _layer_scale(variant)

    def branches(self, x: Tensor, *draws: Tensor | None) -> tuple[Tensor, ...]:
        """The sum of both branches."""
        y = self.norm1(take(x, draws[0]))
        return (self.ls1(self.attn(y) + self.mlp(y)),)


def _is_scaled(variant: Variant, drop_rate: float) -> bool:
    return bool(variant.layer_scale or drop_rate)


def _layer_scale(variant: Variant) -> nn.Module:
    return LayerScale(variant.embed_dim, variant.layer_scale) if variant.layer_scale else nn.Identity()
