"""The Vision Transformer (Dosovitskiy et al. 2021), with timm's parameter names.

Shapes: B images, C channels, S tokens, D width.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscale.model.blocks import LAYER_NORM_EPS, Block, PatchEmbed
from vitscale.model.heads import Classifier, PreLogits
from vitscale.model.variants import Pool, Variant, resolve_variant

_POS_EMBED_STD = 0.02


class VisionTransformer(nn.Module):
    """Image classifier: patches -> blocks -> norm -> pool -> representation layer -> head.

    With pool "avg" there is no class token, and the final norm comes before the mean.

    Args:
        variant: the shape.
        drop_rate: dropout after the position embedding, the attention projection and each layer of the MLP.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0 at the first.
        head_bias_init: first value of the head's biases, here and after `reset_classifier`.

    Attributes:
        variant: the shape as it is now.
        blocks: the transformer blocks, for per-block compilation and sharding.
        activation_checkpointing: whether each block recomputes its activations in the backward pass instead
            of keeping them. Set it at any time; gradients stay bitwise the same.
    """

    def __init__(
        self, variant: Variant, *, drop_rate: float = 0.0, drop_path_rate: float = 0.0, head_bias_init: float = 0.0
    ) -> None:
        super().__init__()
        self.variant = variant
        self.head_bias_init = head_bias_init
        self.activation_checkpointing = False
        width, depth = variant.embed_dim, variant.depth

        self.patch_embed = PatchEmbed(variant.img_size, variant.patch_size, variant.in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if variant.pool == "token" else None
        self.pos_embed = nn.Parameter(torch.empty(1, variant.tokens, width))
        nn.init.normal_(self.pos_embed, std=_POS_EMBED_STD)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                width,
                variant.num_heads,
                variant.mlp_hidden,
                qkv_bias=variant.qkv_bias,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate * index / max(depth - 1, 1),
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pre_logits = _pre_logits(variant)
        self.head = _head(variant, head_bias_init)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm: [B, C, img_size, img_size] -> [B, S, D], the class token first."""
        x: Tensor = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Keeps the state of the random generators, so dropout and drop path repeat in the recomputation.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Pool and classify: [B, S, D] -> [B, num_classes], or what the head would read where there is none."""
        pooled = tokens[:, 0] if self.variant.pool == "token" else tokens.mean(dim=1)
        return self.head(self.pre_logits(pooled))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Logits: [B, C, img_size, img_size] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The head; an `nn.Identity` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, representation_size: int | None = None) -> None:
        """Put a fresh zero head in place of the present one.

        Args:
            num_classes: outputs of the new head; 0 for none.
            representation_size: None keeps the representation layer with its weights (or the absence of one),
                0 removes it, another number puts a fresh one in its place.
        """
        self.variant = replace(self.variant, num_classes=num_classes)
        if representation_size is not None:
            self.variant = replace(self.variant, representation_size=representation_size)
            self.pre_logits = _pre_logits(self.variant).to(self.pos_embed)
        self.head = _head(self.variant, self.head_bias_init).to(self.pos_embed)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed though they have the shape of weights."""
        return {"pos_embed", "cls_token"}


def create_model(
    name: str,
    *,
    num_classes: int,
    img_size: int | None = None,
    in_chans: int = 3,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    representation_size: int | None = None,
    pool: Pool = "token",
    qkv_bias: bool | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    head_bias_init: float = 0.0,
) -> VisionTransformer:
    """Build a variant with fresh weights; None leaves the variant's own value.

    The arguments are the fields of `vitscale.model.Variant` and the arguments of `VisionTransformer`.
    `representation_size=0` builds a model without representation layer, `num_classes=0` one without head.

    Raises:
        ConfigError: the name is unknown, or the shape does not divide into patches or heads.
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
        representation_size=representation_size,
        pool=pool,
        qkv_bias=qkv_bias,
    )
    return VisionTransformer(variant, drop_rate=drop_rate, drop_path_rate=drop_path_rate, head_bias_init=head_bias_init)


def _pre_logits(variant: Variant) -> nn.Module:
    return PreLogits(variant.embed_dim, variant.representation_size) if variant.representation_size else nn.Identity()


def _head(variant: Variant, bias_init: float) -> nn.Module:
    return Classifier(variant.head_input, variant.num_classes, bias_init) if variant.num_classes else nn.Identity()
