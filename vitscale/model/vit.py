"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), with timm's parameter names.

Shapes: B images, C channels, S tokens, P patches, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn

from vitscale.errors import ConfigError
from vitscale.model.adapt import Resampling, grid_resize
from vitscale.model.blocks import Block, ParallelBlock, PatchEmbed, layer_norm
from vitscale.model.drop_path import DropPathMode, drop_path_rates
from vitscale.model.execution import Execution
from vitscale.model.heads import AttentionPool, Classifier, PreLogits
from vitscale.model.initialisation import STD, Scheme
from vitscale.model.table import resolve_variant
from vitscale.model.variants import Act, Pool, Size, Variant

Logits = Tensor | tuple[Tensor, Tensor]
"""[B, num_classes], or of a distilled model in training one such tensor from each head."""


class VisionTransformer(nn.Module):
    """Image classifier: patches -> blocks -> norm -> pool -> representation layer -> head.

    The tokens before the patches are, as far as the variant has them, the class token, the distillation token
    and the registers; all get a position embedding. The final norm comes before pooling.

    Args:
        variant: the architecture.
        drop_rate: dropout after the position embedding, the attention projection and each layer of the MLP.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0 at the first.
        drop_path_mode: whether a branch is computed for the samples too that pass it by.
        weight_init: how fresh weights are drawn.
        head_bias_init: first value of the head's biases, here and after `reset_classifier`; None leaves it to
            `weight_init`.
        head_multiple: the head's matrix product is padded to a multiple of this many outputs; neither parameters nor
            logits show it.

    Raises:
        ConfigError: there is no such `weight_init`, or `head_multiple` is below 1.

    Attributes:
        variant: the architecture as it is now.
        blocks: the transformer blocks, for sharding.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_mode: DropPathMode = "mask",
        weight_init: Scheme = "jax",
        head_bias_init: float | None = None,
        head_multiple: int = 1,
    ) -> None:
        super().__init__()
        if weight_init not in get_args(Scheme):
            raise ConfigError(f"model.weight_init {weight_init!r}: one of {', '.join(get_args(Scheme))} is wanted")
        if head_multiple < 1:
            raise ConfigError(f"model.head_multiple {head_multiple}: 1 or more is wanted")
        self.variant = variant
        self.weight_init = weight_init
        self.head_bias_init = head_bias_init
        self.head_multiple = head_multiple
        self._grid_resize: Tensor | None = None
        width, depth = variant.embed_dim, variant.depth

        self.patch_embed = PatchEmbed(variant, weight_init)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if variant.pool == "token" else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if variant.distilled else None
        self.reg_token = nn.Parameter(torch.zeros(1, variant.reg_tokens, width)) if variant.reg_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, variant.tokens, width))
        nn.init.normal_(self.pos_embed, std=STD)
        self.pos_drop = nn.Dropout(drop_rate)
        block = ParallelBlock if variant.parallel else Block
        self.blocks = nn.ModuleList(
            block(
                variant,
                drop_rate=drop_rate,
                drop_path_rate=rate,
                drop_path_mode=drop_path_mode,
                scheme=weight_init,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = layer_norm(width, variant)
        self.attn_pool = AttentionPool(variant, weight_init) if variant.pool == "map" else None
        self.pre_logits = self._new_pre_logits()
        self.head = self._new_head()
        self.head_dist = self._new_head() if variant.distilled else None

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm: [B, C, height, width] -> [B, S, D], those before the patches first."""
        x = self._embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_head(self, tokens: Tensor) -> Logits:
        """Pool and classify: [B, S, D] -> [B, num_classes], or what the head would read where there is none.

        A distilled model gives the logits of both heads in training, their mean in evaluation.
        """
        if self.head_dist is not None:
            by_label, by_teacher = self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])
            return (by_label, by_teacher) if self.training else (by_label + by_teacher) / 2
        return self.head(self.pre_logits(self.pool(tokens)))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Logits:
        """Logits: [B, C, height, width] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(images))

    def pool(self, tokens: Tensor) -> Tensor:
        """What represents the image: [B, S, D] -> [B, D]. Registers are never pooled."""
        if self.variant.pool == "token":
            return tokens[:, 0]
        patches = tokens[:, self.variant.prefix_tokens :]
        return patches.mean(dim=1) if self.attn_pool is None else self.attn_pool(patches)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        """Patch tokens after some of the blocks, in the blocks' order; the later blocks are not computed.

        Args:
            images: [B, C, height, width].
            n: how many of the last blocks, or which blocks (from 0; negative ones count from the end).
            reshape: give [B, D, rows, columns] instead of [B, P, D].
            return_prefix_tokens: give (patches, tokens before the patches [B, prefix_tokens, D]) for each.
            norm: apply the final norm.

        Raises:
            ConfigError: there is no such block.
        """
        depth = len(self.blocks)
        if not (0 < n <= depth if isinstance(n, int) else all(-depth <= index < depth for index in n)):
            raise ConfigError(
                f"get_intermediate_layers: n={n} asks for blocks that are not there: the model has {depth}"
            )
        wanted = {index % depth for index in (range(depth - n, depth) if isinstance(n, int) else n)}
        x, found = self._embed(images), []
        for index in range(max(wanted, default=-1) + 1):
            x = self.blocks[index](x)
            if index in wanted:
                found.append(self.norm(x) if norm else x)
        prefix = self.variant.prefix_tokens
        patches = [tokens[:, prefix:] for tokens in found]
        if reshape:
            patches = [tokens.transpose(1, 2).unflatten(2, self.input_variant.grid) for tokens in patches]
        if return_prefix_tokens:
            return [(spatial, tokens[:, :prefix]) for spatial, tokens in zip(patches, found, strict=True)]
        return patches

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, an `nn.Identity` where there is none; of a distilled model both heads."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, representation_size: int | None = None) -> None:
        """Put a fresh head (of a distilled model: two) in place of the present one.

        Args:
            num_classes: outputs of the new head; 0 for none.
            representation_size: None keeps the representation layer with its weights (or the absence of one),
                0 removes it, another number puts a fresh one in its place.

        Raises:
            ConfigError: a representation layer for a distilled model; the model is as before.
        """
        kept = self.variant.representation_size if representation_size is None else representation_size
        self.variant = replace(self.variant, num_classes=num_classes, representation_size=kept)
        if representation_size is not None:
            self.pre_logits = self._new_pre_logits().to(self.pos_embed)
        self.head = self._new_head().to(self.pos_embed)
        if self.head_dist is not None:
            self.head_dist = self._new_head().to(self.pos_embed)

    def set_execution(self, execution: Execution) -> None:
        """Run the blocks in another way from now on; what they compute is the same."""
        execution.apply(self.blocks)

    @property
    def input_variant(self) -> Variant:
        """The architecture at the size that images have now: that of `variant`, or of `set_input_size`."""
        return replace(self.variant, img_size=self.patch_embed.image_px)

    def set_input_size(self, size: Size | None, method: Resampling = "timm") -> None:
        """Take images of another size from now on, the position embedding resized in every forward pass.

        No parameter and no entry of the state dict changes: gradients reach the embedding of the variant's own
        grid, and of the tokens before the patches, through the resize.

        Args:
            size: pixels, the side of a square or (height, width); None for the variant's own size.
            method: the filter, as in `resample_pos_embed`.

        Raises:
            ConfigError: the size is no whole number of patches; the model is as before.
        """
        own = self.variant
        wanted = own if size is None else replace(own, img_size=size)
        self.patch_embed.image_px = wanted.image_px
        # Neither parameter nor buffer: engines cast, broadcast and partition those.
        self._grid_resize = None if wanted.grid == own.grid else grid_resize(own.grid, wanted.grid, method)
        if self._grid_resize is not None and not self.pos_embed.is_meta:
            self._grid_resize = self._grid_resize.to(self.pos_embed.device)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed though they have the shape of weights."""
        named = {"pos_embed", "cls_token", "dist_token", "reg_token", "attn_pool.latent"}
        return {name for name, _ in self.named_parameters() if name in named}

    def _embed(self, images: Tensor) -> Tensor:
        """What the first block reads: [B, C, height, width] -> [B, S, D]."""
        x: Tensor = self.patch_embed(images)
        prefix = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        if prefix:
            x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        return self.pos_drop(x + self._position_embedding())  # type: ignore[no-any-return]

    def _position_embedding(self) -> Tensor:
        """[1, S, D] for the size that images have now."""
        if self._grid_resize is None:
            return self.pos_embed
        prefix, patches = self.pos_embed.tensor_split([self.variant.prefix_tokens], dim=1)
        # In float64, which autocast leaves alone; it is a thousandth of a block's work.
        patches = self._grid_resize.to(patches.device) @ patches.double()
        return torch.cat([prefix, patches.to(prefix.dtype)], dim=1)

    def _new_pre_logits(self) -> nn.Module:
        size = self.variant.representation_size
        return PreLogits(self.variant.embed_dim, size, self.weight_init) if size else nn.Identity()

    def _new_head(self) -> nn.Module:
        classes = self.variant.num_classes
        if classes == 0:
            return nn.Identity()
        return Classifier(self.variant.head_input, classes, self.weight_init, self.head_bias_init, self.head_multiple)


def create_model(
    name: str,
    *,
    num_classes: int,
    img_size: Size | None = None,
    in_chans: int | None = None,
    patch_size: Size | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    qkv_bias: bool | None = None,
    representation_size: int | None = None,
    pool: Pool | None = None,
    distilled: bool | None = None,
    reg_tokens: int | None = None,
    layer_scale: float | None = None,
    qk_norm: bool | None = None,
    parallel: bool | None = None,
    act: Act | None = None,
    norm_bias: bool | None = None,
    norm_eps: float | None = None,
    stem: Sequence[int] | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    drop_path_mode: DropPathMode = "mask",
    weight_init: Scheme = "jax",
    head_bias_init: float | None = None,
    head_multiple: int = 1,
) -> VisionTransformer:
    """Build a variant with fresh weights; None leaves the variant's own value.

    The arguments are the fields of `vitscale.model.Variant` and the arguments of `VisionTransformer`.
    `representation_size=0` builds a model without representation layer, `num_classes=0` one without head.

    Raises:
        ConfigError: the name is unknown, the shape does not divide into patches or heads, or two choices
            exclude each other.
    """
    variant = resolve_variant(
        name,
        num_classes=num_classes,
        img_size=img_size,
        in_chans=in_chans,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        representation_size=representation_size,
        pool=pool,
        distilled=distilled,
        reg_tokens=reg_tokens,
        layer_scale=layer_scale,
        qk_norm=qk_norm,
        parallel=parallel,
        act=act,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        stem=stem,
    )
    return VisionTransformer(
        variant,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        drop_path_mode=drop_path_mode,
        weight_init=weight_init,
        head_bias_init=head_bias_init,
        head_multiple=head_multiple,
    )
