"""Weights adapted to another input: position embeddings to another grid, the first convolution to other channels."""

import functools
import math
from collections.abc import Container
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.errors import CheckpointError

Resampling = Literal["timm", "timm_npz", "google"]
"""How position embeddings are resized: as timm does for its own checkpoints (bicubic with antialiasing) and for
Google's `.npz` (bilinear between cell centres), or as Google's code itself (bilinear between the corner cells)."""


_FIRST_CONVOLUTIONS = (
    "patch_embed.backbone.stem.conv.weight",
    "patch_embed.backbone.conv.weight",
    "patch_embed.proj.weight",
)


def resample_pos_embed(
    pos_embed: Tensor,
    grid: tuple[int, int],
    prefix_tokens: int,
    *,
    old_grid: tuple[int, int] | None = None,
    old_prefix_tokens: int | None = None,
    method: Resampling = "timm",
) -> Tensor:
    """Resize a position embedding to another grid of patches and another number of tokens before them.

    Of the tokens before the patches the first ones keep their embedding, missing ones get zeros.

    Args:
        pos_embed: [1, old_prefix_tokens + old patches, D].
        grid: rows and columns of the new grid.
        prefix_tokens: tokens before the patches in the new model (`Variant.prefix_tokens`).
        old_grid: rows and columns that `pos_embed` was made for; a square if not given.
        old_prefix_tokens: tokens before the patches in `pos_embed`; `prefix_tokens` if not given.
        method: the filter.

    Returns:
        [1, prefix_tokens + rows * columns, D] in the dtype of `pos_embed`; `pos_embed` itself if nothing changes.

    Raises:
        CheckpointError: the number of patches is not that of `old_grid`, or not the square of a whole number.
    """
    old_prefix_tokens = prefix_tokens if old_prefix_tokens is None else old_prefix_tokens
    prefix, patches = pos_embed[:, :old_prefix_tokens], pos_embed[:, old_prefix_tokens:]
    if old_grid is None:
        side = math.isqrt(max(patches.shape[1], 0))
        old_grid = (side, side)
    if patches.shape[1] == 0 or old_grid[0] * old_grid[1] != patches.shape[1]:
        raise CheckpointError(
            f"pos_embed: {pos_embed.shape[1]} tokens less {old_prefix_tokens} before the patches are no grid of "
            f"{old_grid[0]} x {old_grid[1]}: the checkpoint has another number of prefix tokens (model.pool, "
            "model.reg_tokens) or was made on images of another shape"
        )
    if old_grid == grid and old_prefix_tokens == prefix_tokens:
        return pos_embed
    missing = max(prefix_tokens - old_prefix_tokens, 0)
    prefix = F.pad(prefix[:, :prefix_tokens], (0, 0, 0, missing))
    if old_grid != grid:
        patches = _resize(patches.float(), old_grid, grid, method).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)


@functools.cache
def grid_resize(old_grid: tuple[int, int], grid: tuple[int, int], method: Resampling = "timm") -> Tensor:
    """The filter of `resample_pos_embed` as a matrix, [new patches, old patches] in float64; not to be written to.

    Every filter is linear, and as a product its backward pass is deterministic, which no GPU's own resize is.
    """
    # Column by column an embedding that is 1 at one old patch and 0 elsewhere.
    units = torch.eye(math.prod(old_grid), dtype=torch.float64, device="cpu")[None]
    return _resize(units, old_grid, grid, method)[0].contiguous()


def first_convolution(names: Container[str]) -> str:
    """Name of the weight that reads the image, among the names of a state dict: a hybrid's root comes first."""
    return next(name for name in _FIRST_CONVOLUTIONS if name in names)


def adapt_in_chans(weight: Tensor, in_chans: int) -> Tensor:
    """Make a first convolution's weight for other channels, keeping the size of what it gives.

    One channel gets the sum over the old ones, as for an image whose channels are all equal. More get the old
    ones repeated in turn and scaled by old / new. This is timm's rule; behind a hybrid's weight standardisation,
    which undoes every scale, its features are only near those of the old channels.

    Args:
        weight: [D, old_channels, height, width].
        in_chans: channels of the new input.

    Returns:
        [D, in_chans, height, width] in the dtype of `weight`; `weight` itself if nothing changes.
    """
    old = weight.shape[1]
    if in_chans == old:
        return weight
    if in_chans == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, -(-in_chans // old), 1, 1)[:, :in_chans]
    return (repeated * (old / in_chans)).to(weight.dtype)


def _resize(patches: Tensor, old_grid: tuple[int, int], grid: tuple[int, int], method: Resampling) -> Tensor:
    """[1, old patches, D] -> [1, new patches, D]."""
    # Channels last, as they lie there: torch 2.14 resizes a single column wrongly in the other layout.
    image = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    if method == "timm":
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    elif method == "google":  # whose code calls scipy, and scipy computes in float64
        image = F.interpolate(image.double(), size=grid, mode="bilinear", align_corners=True)
    else:
        image = F.interpolate(image, size=grid, mode="bilinear")
    return image.flatten(2).transpose(1, 2)
