"""The config of the augmentation that follows the crop and the flip; all of it is off by default."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vitscale.config.section import AboveZero, Fraction, NotNegative, Positive, Section

Sigma = Annotated[float, Field(gt=0.0, le=2.0)]


class RandAugmentSection(Section):
    """RandAugment (Cubuk et al. 2020): random operations of one common strength."""

    policy: Literal["augreg", "timm"] = "augreg"
    """Operations and their levels: those of AugReg (Steiner et al. 2021), 16 operations that always act; or timm's
    rand-mM-mstd0.5-inc1, 15 operations that get stronger with the magnitude and act with probability 0.5."""
    layers: Positive = 2
    """Operations applied to an image, one after the other."""
    magnitude: NotNegative = 10.0
    """Strength of the operations. AugReg uses 0 (light1), 10 (light2), 15 (medium) and 20 (strong); timm's usual is 9,
    and its levels end at 10."""

    @model_validator(mode="after")
    def _within_levels(self) -> Self:
        if self.policy == "timm" and self.magnitude > 10:
            raise ValueError(f"magnitude {self.magnitude}: timm's levels end at 10: give less, or policy augreg")
        return self


class JitterSection(Section):
    """Colour jitter: brightness, contrast, saturation and hue, in an order drawn for each image."""

    brightness: NotNegative = 0.0
    """The factor is uniform in 1 - x to 1 + x, but never below 0."""
    contrast: NotNegative = 0.0
    """The factor is uniform in 1 - x to 1 + x, but never below 0."""
    saturation: NotNegative = 0.0
    """The factor is uniform in 1 - x to 1 + x, but never below 0."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """The hue is turned by a part of the colour circle uniform in -x to x."""
    probability: Fraction = 1.0
    """Share of the images that are jittered."""


class BlurSection(Section):
    """Gaussian blur."""

    probability: Fraction = 0.5
    """Share of the images that are blurred."""
    sigma: tuple[Sigma, Sigma] = (0.1, 2.0)
    """Standard deviation in pixels, uniform from least to most."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma {list(self.sigma)}: give 0 < least <= most <= 2")
        return self


class ErasingSection(Section):
    """Random erasing (Zhong et al. 2020): rectangles of the normalised image are overwritten."""

    probability: Fraction = 0.25
    """Share of the images that are erased in."""
    fill: Literal["const", "rand", "pixel"] = "pixel"
    """What is written: the mean colour, one normally distributed colour a rectangle, or one a pixel."""
    area: tuple[Fraction, Fraction] = (0.02, 1 / 3)
    """Area of all rectangles of an image together, as a fraction of it: least, most."""
    ratio: tuple[AboveZero, AboveZero] = (0.3, 10 / 3)
    """Height over width of a rectangle: least, most."""
    rectangles: Positive = 1
    """Rectangles of an image; they may overlap."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.area[0] <= self.area[1]:
            raise ValueError(f"area {list(self.area)}: give 0 < least <= most <= 1")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)}: give 0 < least <= most")
        return self


class MixSection(Section):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of the images at positions p and p xor 1."""

    mixup_alpha: NotNegative = 0.0
    """Mixup's share of an image is drawn from Beta(alpha, alpha); 0 for no mixup."""
    cutmix_alpha: NotNegative = 0.0
    """CutMix's share of an image is drawn from Beta(alpha, alpha); 0 for no CutMix."""
    probability: Fraction = 1.0
    """Share of the pairs that are mixed."""
    cutmix_share: Fraction = 0.5
    """Share of the mixed pairs that CutMix takes, where both are on."""

    @model_validator(mode="after")
    def _one_is_on(self) -> Self:
        if not (self.mixup_alpha or self.cutmix_alpha):
            raise ValueError("mixup_alpha and cutmix_alpha are both 0: give one of them, or leave mix out")
        return self


class AugmentSection(Section):
    """What happens to training images after crop and flip, in this order; nothing when all is left out."""

    three_augment: bool = False
    """3-Augment (Touvron et al. 2022, DeiT III): each image is made grey, solarized or blurred; DeiT III adds jitter
    of 0.3 in brightness, contrast and saturation."""
    rand_augment: RandAugmentSection | None = None
    """RandAugment; null for none."""
    jitter: JitterSection | None = None
    """Colour jitter; null for none."""
    blur: BlurSection | None = None
    """Gaussian blur; null for none."""
    erasing: ErasingSection | None = None
    """Random erasing; null for none."""
    mix: MixSection | None = None
    """Mixup and CutMix; null for none."""
    repeats: Positive = 1
    """Times each sample is seen in a row, each time augmented anew (repeated augmentation, Hoffer et al. 2020). The
    repeats are data.lanes positions apart, and images seen, steps and epochs of the schedule count them."""
