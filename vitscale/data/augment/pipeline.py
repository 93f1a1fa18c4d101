"""All of augmentation after the crop: what a loader process draws, and what the device makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.config.augment import AugmentSection
from vitscale.data.augment.crops import flips
from vitscale.data.augment.erasing import draw_fill_keys, draw_rectangles, erase
from vitscale.data.augment.geometry import RGB
from vitscale.data.augment.operations import Chosen, apply_layers
from vitscale.data.augment.policies import draw_operations
from vitscale.data.mixup import MixedLabels, draw_mix, mix

Statistic = tuple[float, float, float]
Drawn = Mapping[str, NDArray[Any]]
"""What is random about n images, by name: small arrays in host memory whose first dimension is n."""


@dataclass(frozen=True)
class Augmentation:
    """Flip, operations on the pixels, normalisation, erasing and mixing of training images, as the config has them.

    `draw` belongs to a loader process, `apply` to the device. The result for an image follows from its position and
    its partner's (p xor 1) alone: not from the worker, the rank, the batch or a restart. On another kind of device it
    may differ in the last bits.
    """

    augment: AugmentSection
    seed: int
    img_size: int
    flip: float
    mean: Statistic
    std: Statistic

    def draw(self, positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """All that is random about the images at these positions of the run, [n]; only what the config asks for."""
        augment, seed = self.augment, self.seed
        drawn: dict[str, NDArray[Any]] = {"flip": flips(seed, positions, self.flip)}
        chosen = draw_operations(augment, seed, positions)
        if chosen.operations.shape[1]:
            drawn |= {"operations": chosen.operations, "strengths": chosen.strengths, "centres": chosen.centres}
        if augment.erasing is not None:
            drawn["rectangles"] = draw_rectangles(augment.erasing, seed, positions, self.img_size)
            drawn["fill_keys"] = draw_fill_keys(seed, positions, augment.erasing.rectangles)
        if augment.mix is not None:
            drawn["mix_weights"], drawn["mix_boxes"] = draw_mix(augment.mix, seed, positions, self.img_size)
        return drawn

    def apply(self, images: Tensor, labels: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor | MixedLabels]:
        """Augment a micro-batch on its device.

        Args:
            images: uint8 [B, 3, S, S] in the order of their positions.
            labels: int64 [B].
            drawn: of `draw`, for these images.

        Returns:
            Images fp32 [B, 3, S, S], normalised; the labels, or with `mix` in the config the mixed ones.
        """

        def on_device(name: str) -> Tensor:
            return torch.from_numpy(drawn[name]).to(images.device, non_blocking=True)

        images = mirror(images.contiguous(), on_device("flip"))
        if "operations" in drawn:
            chosen = Chosen(drawn["operations"], drawn["strengths"], drawn["centres"])
            nearest = self.augment.rand_augment is not None and self.augment.rand_augment.policy == "augreg"
            images = apply_layers(images, chosen, self.fill, nearest=nearest)
        prepared = normalise(images, self.mean, self.std)
        if self.augment.erasing is not None:
            prepared = erase(prepared, drawn["rectangles"], drawn["fill_keys"], self.augment.erasing.fill)
        if self.augment.mix is None:
            return prepared, labels
        return mix(prepared, labels, on_device("mix_weights"), on_device("mix_boxes"))

    @property
    def fill(self) -> RGB:
        """The mean colour, of what operations move in or cut out."""
        red, green, blue = (min(255, round(255 * channel)) for channel in self.mean)
        return red, green, blue


def mirror(images: Tensor, flip: Tensor) -> Tensor:
    """Images uint8 [B, 3, S, S], those of which flip [B] is true turned left to right."""
    # A choice by bits: torch.where with a mask to broadcast takes ten times as long on a CPU.
    chosen = flip.to(torch.uint8).mul(255)[:, None, None, None]
    return images ^ ((images ^ images.flip(-1)) & chosen)


def normalise(images: Tensor, mean: Statistic, std: Statistic) -> Tensor:
    """(images / 255 - mean) / std in fp32, of the same shape, from uint8 [B, 3, S, S]; mean and std are of 0 to 1."""
    centre, spread = (torch.tensor(s).to(images.device, non_blocking=True)[:, None, None] for s in (mean, std))
    return images.float().div_(255).sub_(centre).div_(spread)  # in one buffer: four would be the step's largest
