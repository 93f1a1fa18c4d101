"""Position embeddings at another image size, for fine-tuning and evaluation at a higher resolution."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.errors import CheckpointError


def resample_pos_embed(pos_embed: Tensor, grid: int, prefix_tokens: int) -> Tensor:
    """Resize the position embedding of a square grid of patches, bicubic with antialiasing as timm does.

    Args:
        pos_embed: [1, prefix_tokens + old_grid^2, D]; the embeddings of the prefix tokens are kept.
        grid: patches along a side of the new grid.
        prefix_tokens: tokens before the patches (`Variant.prefix_tokens`).

    Returns:
        [1, prefix_tokens + grid^2, D] in the dtype of `pos_embed`; `pos_embed` itself where the grid is the same.

    Raises:
        CheckpointError: the number of patches is not the square of a whole number.
    """
    prefix, patches = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    old_grid = math.isqrt(patches.shape[1])
    if old_grid**2 != patches.shape[1]:
        raise CheckpointError(
            f"pos_embed: {pos_embed.shape[1]} tokens less {prefix_tokens} before the patches are no square grid: "
            "the checkpoint has another number of prefix tokens (model.pool) or was made on images that are not square"
        )
    if old_grid == grid:
        return pos_embed
    image = patches.float().reshape(1, old_grid, old_grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
