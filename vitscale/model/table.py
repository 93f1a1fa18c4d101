"""The table of Vision Transformers: every name with its architecture, its published weights and where it is from.

`create_model`, `vitscale models`, docs/models.md, `vitscale.load_pretrained` and the tests all read this table.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from vitscale.errors import ConfigError
from vitscale.model.variants import Variant

RGB = tuple[float, float, float]
IN21K_CLASSES = 21_843
"""Classes of the full ImageNet-21k release, as Google counts them."""
_MIIL_CLASSES = 11_221


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input.

    Raises:
        ConfigError: a deviation is not above 0, or the crop not within the image.
    """

    mean: RGB = (0.5, 0.5, 0.5)
    """Taken from the pixels, in units of 0 to 1."""
    std: RGB = (0.5, 0.5, 0.5)
    """The pixels are divided by it, in the same units."""
    crop: float = 0.9
    """Side of the centre crop over the resized image's shorter side."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Filter of the resize."""

    def __post_init__(self) -> None:
        if not (all(deviation > 0 for deviation in self.std) and 0 < self.crop <= 1):
            raise ConfigError(
                f"pixels: std {list(self.std)}, crop {self.crop}: std above 0 and 0 < crop <= 1 are wanted"
            )


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    variant: Variant
    """The architecture; `num_classes` is that of the published weights."""
    preprocessing: Preprocessing
    """What the published weights expect."""
    source: str
    """Paper that the shape comes from."""
    timm_name: str | None = None
    """timm's name of the same weights, `architecture.tag`; None where timm has no such model."""
    weights_url: str | None = None
    """Published weights; None where there are none at a public address."""


_VIT = "Dosovitskiy et al. 2021, arXiv 2010.11929"
_AUGREG = "Steiner et al. 2022, arXiv 2106.10270"
_SCALING = "Zhai et al. 2022, arXiv 2106.04560"
_SAM = "Chen et al. 2022, arXiv 2106.01548"
_DINO = "Caron et al. 2021, arXiv 2104.14294"
_DEIT = "Touvron et al. 2021, arXiv 2012.12877"
_MIIL = "Ridnik et al. 2021, arXiv 2104.10972"
_SO400M = "Alabdulmohsin et al. 2023, arXiv 2305.13035"
_PALI = "Chen et al. 2023, arXiv 2209.06794 (ViT-e)"
_VIT_22B = "Dehghani et al. 2023, arXiv 2302.05442"
_TIMM = "timm (Wightman 2019)"

_GOOGLE = "https://storage.googleapis.com/vit_models"
_META = "https://dl.fbaipublicfiles.com"
_ALIBABA = "https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ImageNet_21K_P/models/timm"
_JX = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx"

_TINY = Variant(patch_size=16, embed_dim=192, depth=12, num_heads=3)
_SMALL = Variant(patch_size=16, embed_dim=384, depth=12, num_heads=6)
_BASE = Variant(patch_size=16, embed_dim=768, depth=12, num_heads=12)
_LARGE = Variant(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
_HUGE = Variant(patch_size=14, embed_dim=1280, depth=32, num_heads=16)
_GIANT = Variant(patch_size=14, embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11)
_GIGANTIC = Variant(patch_size=14, embed_dim=1664, depth=48, num_heads=16, mlp_ratio=64 / 13)
# R50 before B/16 has no fourth stage: the ViT paper moved its units into the third.
_R_TINY = replace(_TINY, stem=(), patch_size=8)
_R26_SMALL = replace(_SMALL, stem=(2, 2, 2, 2), patch_size=1)
_R50_BASE = replace(_BASE, stem=(3, 4, 9), patch_size=1)
_R50_LARGE = replace(_LARGE, stem=(3, 4, 6, 3), patch_size=1)
_VIT_22B_SHAPE = Variant(
    patch_size=14, embed_dim=6144, depth=48, num_heads=48, pool="map",
    qkv_bias=False, qk_norm=True, parallel=True, norm_bias=False,
)  # fmt: skip

_GOOGLE_PIXELS = Preprocessing()
_IMAGENET_PIXELS = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_RAW_PIXELS = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop=0.875, interpolation="bilinear")


def _in1k(
    variant: Variant, source: str, timm: str | None = None, url: str | None = None, pixels: Preprocessing | None = None
) -> Entry:
    """A row at 224 px; `pixels` are Google's if not given."""
    return Entry(variant, pixels or _GOOGLE_PIXELS, source, timm, url)


def _in1k_384(
    variant: Variant, source: str, timm: str | None = None, url: str | None = None, pixels: Preprocessing | None = None
) -> Entry:
    """A row at 384 px, where the whole image is the crop."""
    return _in1k(replace(variant, img_size=384), source, timm, url, replace(pixels or _GOOGLE_PIXELS, crop=1.0))


def _in21k(variant: Variant, source: str, timm: str | None, url: str | None) -> Entry:
    return _in1k(replace(variant, num_classes=IN21K_CLASSES), source, timm, url)


def _augreg(recipe: str, fine_tuning: str = "") -> str:
    """Address of a checkpoint of the AugReg paper: its pretraining, and its fine-tuning if there is one."""
    return f"{_GOOGLE}/augreg/{recipe}{'--imagenet2012-steps_20k-' if fine_tuning else ''}{fine_tuning}.npz"


def _distilled(variant: Variant) -> Variant:
    return replace(variant, distilled=True)


_TI16 = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"
_S32 = "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"
_S16 = "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"
_B32_MEDIUM = "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0"
_B32_LIGHT = "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"
_B16 = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
_B8 = "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
_L16 = "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"
_R_TI16 = "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"
_R26_S32_LIGHT = "R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1"
_R26_S32_MEDIUM = "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0"
_R50_L32_MEDIUM1 = "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"
_R50_L32_MEDIUM2 = "R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"

# fmt: off
TABLE: Mapping[str, Entry] = MappingProxyType({
    "vit_tiny_patch16_224": _in1k(
        _TINY, _AUGREG, "vit_tiny_patch16_224.augreg_in21k_ft_in1k", _augreg(_TI16, "lr_0.03-res_224")),
    "vit_tiny_patch16_384": _in1k_384(
        _TINY, _AUGREG, "vit_tiny_patch16_384.augreg_in21k_ft_in1k", _augreg(_TI16, "lr_0.03-res_384")),
    "vit_small_patch32_224": _in1k(
        replace(_SMALL, patch_size=32), _AUGREG,
        "vit_small_patch32_224.augreg_in21k_ft_in1k", _augreg(_S32, "lr_0.03-res_224")),
    "vit_small_patch32_384": _in1k_384(
        replace(_SMALL, patch_size=32), _AUGREG,
        "vit_small_patch32_384.augreg_in21k_ft_in1k", _augreg(_S32, "lr_0.03-res_384")),
    "vit_small_patch16_224": _in1k(
        _SMALL, _AUGREG, "vit_small_patch16_224.augreg_in21k_ft_in1k", _augreg(_S16, "lr_0.03-res_224")),
    "vit_small_patch16_384": _in1k_384(
        _SMALL, _AUGREG, "vit_small_patch16_384.augreg_in21k_ft_in1k", _augreg(_S16, "lr_0.03-res_384")),
    "vit_base_patch32_224": _in1k(
        replace(_BASE, patch_size=32), _AUGREG,
        "vit_base_patch32_224.augreg_in21k_ft_in1k", _augreg(_B32_MEDIUM, "lr_0.03-res_224")),
    "vit_base2_patch32_256": _in1k(
        replace(_BASE, patch_size=32, embed_dim=896, num_heads=14, img_size=256), _TIMM,
        pixels=replace(_GOOGLE_PIXELS, crop=0.95)),
    "vit_base_patch32_384": _in1k_384(
        replace(_BASE, patch_size=32), _AUGREG,
        "vit_base_patch32_384.augreg_in21k_ft_in1k", _augreg(_B32_LIGHT, "lr_0.03-res_384")),
    "vit_base_patch16_224": _in1k(
        _BASE, _AUGREG, "vit_base_patch16_224.augreg_in21k_ft_in1k", _augreg(_B16, "lr_0.01-res_224")),
    "vit_base_patch16_384": _in1k_384(
        _BASE, _AUGREG, "vit_base_patch16_384.augreg_in21k_ft_in1k", _augreg(_B16, "lr_0.01-res_384")),
    "vit_base_patch8_224": _in1k(
        replace(_BASE, patch_size=8), _AUGREG,
        "vit_base_patch8_224.augreg_in21k_ft_in1k", _augreg(_B8, "lr_0.01-res_224")),
    "vit_large_patch32_224": _in1k(replace(_LARGE, patch_size=32), _VIT, "vit_large_patch32_224"),
    "vit_large_patch32_384": _in1k_384(
        replace(_LARGE, patch_size=32), _VIT,
        "vit_large_patch32_384.orig_in21k_ft_in1k", f"{_JX}/jx_vit_large_p32_384-9b920ba8.pth"),
    "vit_large_patch16_224": _in1k(
        _LARGE, _AUGREG, "vit_large_patch16_224.augreg_in21k_ft_in1k", _augreg(_L16, "lr_0.01-res_224")),
    "vit_large_patch16_384": _in1k_384(
        _LARGE, _AUGREG, "vit_large_patch16_384.augreg_in21k_ft_in1k", _augreg(_L16, "lr_0.01-res_384")),
    "vit_huge_patch14_224": _in1k(_HUGE, _VIT, "vit_huge_patch14_224"),
    "vit_giant_patch14_224": _in1k(_GIANT, _SCALING, "vit_giant_patch14_224"),
    "vit_gigantic_patch14_224": _in1k(_GIGANTIC, _SCALING, "vit_gigantic_patch14_224"),

    "vit_tiny_patch16_224_in21k": _in21k(_TINY, _AUGREG, "vit_tiny_patch16_224.augreg_in21k", _augreg(_TI16)),
    "vit_small_patch32_224_in21k": _in21k(
        replace(_SMALL, patch_size=32), _AUGREG, "vit_small_patch32_224.augreg_in21k", _augreg(_S32)),
    "vit_small_patch16_224_in21k": _in21k(_SMALL, _AUGREG, "vit_small_patch16_224.augreg_in21k", _augreg(_S16)),
    "vit_base_patch32_224_in21k": _in21k(
        replace(_BASE, patch_size=32), _AUGREG, "vit_base_patch32_224.augreg_in21k", _augreg(_B32_MEDIUM)),
    "vit_base_patch16_224_in21k": _in21k(_BASE, _AUGREG, "vit_base_patch16_224.augreg_in21k", _augreg(_B16)),
    "vit_base_patch8_224_in21k": _in21k(
        replace(_BASE, patch_size=8), _AUGREG, "vit_base_patch8_224.augreg_in21k", _augreg(_B8)),
    "vit_large_patch32_224_in21k": _in21k(
        replace(_LARGE, patch_size=32, representation_size=1024), _VIT,
        "vit_large_patch32_224.orig_in21k", f"{_JX}/jx_vit_large_patch32_224_in21k-9046d2e7.pth"),
    "vit_large_patch16_224_in21k": _in21k(_LARGE, _AUGREG, "vit_large_patch16_224.augreg_in21k", _augreg(_L16)),
    "vit_huge_patch14_224_in21k": _in21k(
        replace(_HUGE, representation_size=1280), _VIT,
        "vit_huge_patch14_224.orig_in21k", f"{_GOOGLE}/imagenet21k/ViT-H_14.npz"),

    "vit_base_patch16_224_sam": _in1k(_BASE, _SAM, "vit_base_patch16_224.sam_in1k", f"{_GOOGLE}/sam/ViT-B_16.npz"),
    "vit_base_patch32_224_sam": _in1k(
        replace(_BASE, patch_size=32), _SAM, "vit_base_patch32_224.sam_in1k", f"{_GOOGLE}/sam/ViT-B_32.npz"),

    "vit_small_patch16_224_dino": _in1k(
        replace(_SMALL, num_classes=0), _DINO, "vit_small_patch16_224.dino",
        f"{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", _IMAGENET_PIXELS),
    "vit_small_patch8_224_dino": _in1k(
        replace(_SMALL, num_classes=0, patch_size=8), _DINO, "vit_small_patch8_224.dino",
        f"{_META}/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", _IMAGENET_PIXELS),
    "vit_base_patch16_224_dino": _in1k(
        replace(_BASE, num_classes=0), _DINO, "vit_base_patch16_224.dino",
        f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", _IMAGENET_PIXELS),
    "vit_base_patch8_224_dino": _in1k(
        replace(_BASE, num_classes=0, patch_size=8), _DINO, "vit_base_patch8_224.dino",
        f"{_META}/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", _IMAGENET_PIXELS),

    "deit_tiny_patch16_224": _in1k(
        _TINY, _DEIT, "deit_tiny_patch16_224.fb_in1k",
        f"{_META}/deit/deit_tiny_patch16_224-a1311bcf.pth", _IMAGENET_PIXELS),
    "deit_small_patch16_224": _in1k(
        _SMALL, _DEIT, "deit_small_patch16_224.fb_in1k",
        f"{_META}/deit/deit_small_patch16_224-cd65a155.pth", _IMAGENET_PIXELS),
    "deit_base_patch16_224": _in1k(
        _BASE, _DEIT, "deit_base_patch16_224.fb_in1k",
        f"{_META}/deit/deit_base_patch16_224-b5f2ef4d.pth", _IMAGENET_PIXELS),
    "deit_base_patch16_384": _in1k_384(
        _BASE, _DEIT, "deit_base_patch16_384.fb_in1k",
        f"{_META}/deit/deit_base_patch16_384-8de9b5d1.pth", _IMAGENET_PIXELS),
    "deit_tiny_distilled_patch16_224": _in1k(
        _distilled(_TINY), _DEIT, "deit_tiny_distilled_patch16_224.fb_in1k",
        f"{_META}/deit/deit_tiny_distilled_patch16_224-b40b3cf7.pth", _IMAGENET_PIXELS),
    "deit_small_distilled_patch16_224": _in1k(
        _distilled(_SMALL), _DEIT, "deit_small_distilled_patch16_224.fb_in1k",
        f"{_META}/deit/deit_small_distilled_patch16_224-649709d9.pth", _IMAGENET_PIXELS),
    "deit_base_distilled_patch16_224": _in1k(
        _distilled(_BASE), _DEIT, "deit_base_distilled_patch16_224.fb_in1k",
        f"{_META}/deit/deit_base_distilled_patch16_224-df68dfff.pth", _IMAGENET_PIXELS),
    "deit_base_distilled_patch16_384": _in1k_384(
        _distilled(_BASE), _DEIT, "deit_base_distilled_patch16_384.fb_in1k",
        f"{_META}/deit/deit_base_distilled_patch16_384-d0272ac0.pth", _IMAGENET_PIXELS),

    "vit_base_patch16_224_miil_in21k": _in1k(
        replace(_BASE, qkv_bias=False, num_classes=_MIIL_CLASSES), _MIIL,
        "vit_base_patch16_224_miil.in21k", f"{_ALIBABA}/vit_base_patch16_224_in21k_miil.pth", _RAW_PIXELS),
    "vit_base_patch16_224_miil": _in1k(
        replace(_BASE, qkv_bias=False), _MIIL,
        "vit_base_patch16_224_miil.in21k_ft_in1k", f"{_ALIBABA}/vit_base_patch16_224_1k_miil_84_4.pth", _RAW_PIXELS),

    # Hybrids: a ResNet before the patch embedding.
    "vit_tiny_r_s16_p8_224": _in1k(
        _R_TINY, _AUGREG, "vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k", _augreg(_R_TI16, "lr_0.03-res_224")),
    "vit_tiny_r_s16_p8_384": _in1k_384(
        _R_TINY, _AUGREG, "vit_tiny_r_s16_p8_384.augreg_in21k_ft_in1k", _augreg(_R_TI16, "lr_0.03-res_384")),
    "vit_small_r26_s32_224": _in1k(
        _R26_SMALL, _AUGREG, "vit_small_r26_s32_224.augreg_in21k_ft_in1k", _augreg(_R26_S32_LIGHT, "lr_0.03-res_224")),
    "vit_small_r26_s32_384": _in1k_384(
        _R26_SMALL, _AUGREG, "vit_small_r26_s32_384.augreg_in21k_ft_in1k", _augreg(_R26_S32_MEDIUM, "lr_0.03-res_384")),
    "vit_base_r50_s16_224": _in1k(_R50_BASE, _VIT, "vit_base_r50_s16_224"),
    "vit_base_r50_s16_384": _in1k_384(
        _R50_BASE, _VIT, "vit_base_r50_s16_384.orig_in21k_ft_in1k", f"{_JX}/jx_vit_base_resnet50_384-9fd3c705.pth"),
    "vit_large_r50_s32_224": _in1k(
        _R50_LARGE, _AUGREG, "vit_large_r50_s32_224.augreg_in21k_ft_in1k",
        _augreg(_R50_L32_MEDIUM1, "lr_0.01-res_224")),
    "vit_large_r50_s32_384": _in1k_384(
        _R50_LARGE, _AUGREG, "vit_large_r50_s32_384.augreg_in21k_ft_in1k",
        _augreg(_R50_L32_MEDIUM2, "lr_0.01-res_384")),
    "vit_tiny_r_s16_p8_224_in21k": _in21k(_R_TINY, _AUGREG, "vit_tiny_r_s16_p8_224.augreg_in21k", _augreg(_R_TI16)),
    "vit_small_r26_s32_224_in21k": _in21k(
        _R26_SMALL, _AUGREG, "vit_small_r26_s32_224.augreg_in21k", _augreg(_R26_S32_MEDIUM)),
    "vit_large_r50_s32_224_in21k": _in21k(
        _R50_LARGE, _AUGREG, "vit_large_r50_s32_224.augreg_in21k", _augreg(_R50_L32_MEDIUM2)),

    # Larger shapes, for planning and for training from nothing; none of them has public weights of these names.
    "vit_so400m_patch14_224": _in1k(
        Variant(patch_size=14, embed_dim=1152, depth=27, num_heads=16, mlp_ratio=4304 / 1152, pool="map"), _SO400M),
    "vit_4b_patch14_224": _in1k(
        Variant(patch_size=14, embed_dim=1792, depth=56, num_heads=16, mlp_ratio=60 / 7, pool="map"), _PALI),
    "vit_22b_patch14_224": _in1k(_VIT_22B_SHAPE, _VIT_22B),
})
# fmt: on
"""Every variant by its name."""

VARIANTS: Mapping[str, Variant] = MappingProxyType({name: entry.variant for name, entry in TABLE.items()})
"""The architectures of the table alone."""


_FIELDS = {field.name for field in fields(Variant)}


def resolve_variant(name: str, **changes: Any) -> Variant:
    """The variant of this name with the given fields changed; a change to None leaves the variant's own value.

    Raises:
        ConfigError: no variant has this name (the message names the nearest), a field is none, or the changed
            shape is none.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
        mend = f"did you mean {' or '.join(near)}?" if near else f"the variants are {', '.join(VARIANTS)}"
        raise ConfigError(f"model.name {name!r} is unknown: {mend}")
    if unknown := sorted(set(changes) - _FIELDS):
        near = difflib.get_close_matches(unknown[0], _FIELDS, n=1, cutoff=0.5)
        raise ConfigError(f"unknown key model.{unknown[0]}" + (f": did you mean model.{near[0]}?" if near else ""))
    return replace(VARIANTS[name], **{field: value for field, value in changes.items() if value is not None})
