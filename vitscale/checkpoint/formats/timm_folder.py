"""timm's folders: `model.safetensors` and the `config.json` that `timm.create_model("local-dir:...")` reads.

Our parameter names are timm's, so the tensors go as they are. What has to be right is the config: an
architecture of timm's registry, and every argument in which the model differs from it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitscale.checkpoint.containers import Precision, open_tensors
from vitscale.checkpoint.formats.folder_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    label_list,
    read_json,
    rgb,
    size_argument,
    understanding,
    weights_file,
)
from vitscale.checkpoint.formats.inference import architecture_name
from vitscale.checkpoint.formats.own import write_linked_safetensors
from vitscale.checkpoint.integrity import sha256_of
from vitscale.checkpoint.portable import Hints, Origin, PortableModel, own_names, parameter_shapes, read_tensor_file
from vitscale.errors import CheckpointError
from vitscale.model import TABLE, Preprocessing, Variant, first_convolution, resolve_variant

# timm's entry points by the ResNet before the transformer, which no argument can change.
_HYBRIDS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
_DISTILLED = "deit_base_distilled_patch16_224"
_PLAIN = "vit_base_patch16_224"
_ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh"}
_SAME_NAME = (
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "qkv_bias", "reg_tokens", "qk_norm"
)  # fmt: skip
# Arguments of timm's class that decide no tensor and no number of the evaluated model.
_HARMLESS = {"drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "drop_path_rate",
             "weight_init", "fix_init", "class_token", "fc_norm", "dynamic_img_size"}  # fmt: skip
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "architecture": str, "num_classes": int, "model_args": dict, "pretrained_cfg": dict, "label_names": (list, dict)
}  # fmt: skip


class TimmFormat:
    """See `Format`."""

    name = "timm"
    bf16 = True

    def recognises(self, path: Path) -> bool:
        """A folder whose config names an architecture."""
        return (path / CONFIG_NAME).is_file() and "architecture" in read_json(path / CONFIG_NAME)

    def refusal(self, model: PortableModel) -> str:
        """See `Format`."""
        variant = model.variant
        if variant.representation_size:
            if variant.num_classes:
                return (
                    f"timm has no representation layer, and the head reads {variant.representation_size} features "
                    "behind a tanh: the logits would be others. Export the features with --features-only"
                )
            return "timm has no representation layer: export the features before it with --features-only"
        if variant.norm_eps != 1e-6:
            return f"timm's LayerNorm has an epsilon of 1e-6, this model's is {variant.norm_eps:g}"
        if variant.stem is not None and variant.stem not in _HYBRIDS:
            return f"timm has no hybrid with ResNet stages {list(variant.stem)}; it has {[list(s) for s in _HYBRIDS]}"
        if variant.distilled and (variant.reg_tokens or variant.stem is not None):
            return f"timm's distilled model has no {'register tokens' if variant.reg_tokens else 'ResNet stem'}"
        unknown = {
            "parallel blocks": variant.parallel, "SwiGLU": variant.act == "swiglu",
            "LayerNorm without bias": not variant.norm_bias,
        }  # fmt: skip
        names = [what for what, present in unknown.items() if present]
        return f"no entry point of timm takes {' or '.join(names)} from a config" if names else ""

    def notes(self, model: PortableModel) -> list[str]:
        """Nothing to know."""
        return []

    def write(self, model: PortableModel, folder: Path, precision: Precision) -> None:
        """See `Format`."""
        write_linked_safetensors(model, own_names(model.variant), folder / WEIGHTS_NAME, precision)
        config = timm_config(model)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def read(self, path: Path, hints: Hints) -> PortableModel:
        """See `Format`."""
        where = path / CONFIG_NAME
        config = read_json(where, _KINDS)
        with understanding(where):
            name, variant = _variant(config, where, hints)
            shapes = parameter_shapes(variant)
            pixels = config.get("pretrained_cfg", config)
            labels = label_list(config.get("label_names", pixels.get("label_names", ()))) if variant.num_classes else ()
            known = TABLE[name].preprocessing
            interpolation = pixels.get("interpolation", known.interpolation)
            if interpolation not in {"bilinear", "bicubic"}:
                raise ValueError(f"interpolation {interpolation!r} is neither bilinear nor bicubic")
            preprocessing = Preprocessing(
                mean=rgb(pixels.get("mean", known.mean)),
                std=rgb(pixels.get("std", known.std)),
                crop=float(pixels.get("crop_pct", known.crop)),
                interpolation=interpolation,
            )
            crop_mode = pixels.get("crop_mode", "center")
            if crop_mode != "center":
                raise ValueError(f"crop_mode {crop_mode!r} is not the centre crop that this model's pixels go through")
        weights_path = weights_file(path)
        mend = f"{CONFIG_NAME} says {config['architecture']}"
        weights = read_tensor_file(open_tensors(weights_path), own_names(variant), shapes, mend)
        origin = Origin(path.name, sha256_of(weights_path))
        return PortableModel(name, variant, weights, preprocessing, origin, hints.labels or labels)


def timm_config(model: PortableModel) -> dict[str, Any]:
    """The config.json with which timm builds this model."""
    variant, pixels = model.variant, model.preprocessing
    first_conv = first_convolution(model.shapes).removesuffix(".weight")
    config: dict[str, Any] = {
        "architecture": _architecture(model),
        "num_classes": variant.num_classes,
        "num_features": variant.embed_dim,
        "global_pool": variant.pool,
        "model_args": _model_args(variant),
        "pretrained_cfg": {
            "tag": "vitscale",
            "custom_load": False,
            "input_size": [variant.in_chans, *variant.image_px],
            "fixed_input_size": True,
            "interpolation": pixels.interpolation,
            "crop_pct": pixels.crop,
            "crop_mode": "center",
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": variant.num_classes,
            "pool_size": None,
            # Named, older versions would adapt it from three channels.
            "first_conv": first_conv if variant.in_chans == 3 else None,
            "classifier": ["head", "head_dist"] if variant.distilled else "head",
        },
    }
    if model.labels:
        config["label_names"] = list(model.labels)
    return config


def _architecture(model: PortableModel) -> str:
    """An entry point of timm's registry that builds the right class; all its numbers are given as arguments."""
    variant = model.variant
    if variant.stem is not None:
        return _HYBRIDS[variant.stem]
    entry = TABLE[model.name]
    if entry.timm_name and entry.variant.stem is None and entry.variant.distilled == variant.distilled:
        return entry.timm_name.split(".")[0]
    return _DISTILLED if variant.distilled else _PLAIN


def _model_args(variant: Variant) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "img_size": size_argument(variant.image_px),
        "patch_size": size_argument(variant.patch_kernel),
        "in_chans": variant.in_chans,
        "embed_dim": variant.embed_dim,
        "depth": variant.depth,
        "num_heads": variant.num_heads,
        "mlp_ratio": _ratio_cut_off(variant.mlp_hidden, variant.embed_dim),
        "qkv_bias": variant.qkv_bias,
        "class_token": variant.pool == "token",
        "global_pool": variant.pool,
        "fc_norm": False,  # the final norm comes before pooling
        "reg_tokens": variant.reg_tokens,
        "qk_norm": variant.qk_norm,
        "act_layer": _ACTS[variant.act],
    }
    if variant.layer_scale:
        arguments["init_values"] = variant.layer_scale
    return arguments


def _ratio_cut_off(hidden: int, width: int) -> float:
    """A ratio whose product with the width is `hidden` after timm has cut off what is behind the point."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _variant(config: dict[str, Any], where: Path, hints: Hints) -> tuple[str, Variant]:
    """Name and architecture that a config stands for; refuses every argument whose effect we do not have."""
    name = hints.name or architecture_name(config["architecture"])
    if name is None:
        raise CheckpointError(f"{where}: architecture {config['architecture']!r} is not of our table: give --model")
    arguments = dict(config.get("model_args", {}))
    pool = arguments.pop("global_pool", config.get("global_pool", resolve_variant(name).pool))
    changes: dict[str, Any] = {"pool": pool, "num_classes": arguments.pop("num_classes", config.get("num_classes"))}
    changes |= {key: arguments.pop(key) for key in _SAME_NAME if key in arguments}
    changes["layer_scale"] = arguments.pop("init_values", None)
    if "mlp_ratio" in arguments:
        width = changes.get("embed_dim", resolve_variant(name).embed_dim)
        changes["mlp_ratio"] = int(width * arguments.pop("mlp_ratio")) / width
    act = arguments.pop("act_layer", "gelu")
    token, fc_norm = arguments.get("class_token", pool == "token"), arguments.get("fc_norm", pool == "avg")
    if pool not in {"token", "avg", "map"} or act not in _ACTS or token != (pool == "token") or fc_norm:
        raise CheckpointError(
            f"{where}: global_pool {pool!r}, class_token {token}, fc_norm {fc_norm}, act_layer {act!r}: "
            "this model has token with a class token, avg or map without one, and the final norm before pooling"
        )
    if unknown := sorted(set(arguments) - _HARMLESS):
        raise CheckpointError(f"{where}: model_args {unknown[0]}={arguments[unknown[0]]!r} is not known to this model")
    changes |= {"act": act, "representation_size": 0, **hints.changes}
    return name, resolve_variant(name, **changes)
