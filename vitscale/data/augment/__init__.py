"""Augmentation: crops and flips, and the batched operations of the device. What is random follows from the position.

`Augmentation` joins the parts; one idea a module below it.
"""

from vitscale.data.augment.crops import crop_box, draw_crops, flips
from vitscale.data.augment.pipeline import Augmentation, normalise
from vitscale.data.augment.repeats import repeated

__all__ = ["Augmentation", "crop_box", "draw_crops", "flips", "normalise", "repeated"]
