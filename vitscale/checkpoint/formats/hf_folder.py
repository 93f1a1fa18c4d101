"""Hugging Face folders: `model.safetensors`, `config.json` and `preprocessor_config.json` for `from_pretrained`.

Three of transformers' models: `ViTForImageClassification` (class token and head), `ViTModel` (no head; its
pooler is Linear + tanh on the class token, which is our representation layer), and
`DeiTForImageClassificationWithTeacher` (two tokens, two heads).
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

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
from vitscale.checkpoint.formats.inference import nearest_name
from vitscale.checkpoint.formats.own import write_linked_safetensors
from vitscale.checkpoint.integrity import sha256_of
from vitscale.checkpoint.portable import Hints, Link, Origin, PortableModel, parameter_shapes, read_tensor_file, same
from vitscale.errors import CheckpointError
from vitscale.model import Preprocessing, Variant

log = logging.getLogger(__name__)

PROCESSOR_NAME = "preprocessor_config.json"
_CLASSIFIER, _BACKBONE = "ViTForImageClassification", "ViTModel"
_DISTILLED = "DeiTForImageClassificationWithTeacher"
_PREFIX = {_CLASSIFIER: "vit.", _BACKBONE: "", _DISTILLED: "deit."}
# transformers' words for what we compute; both of its names for the tanh form are read.
_ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_ACTS_READ = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_RESAMPLE: dict[Literal["bilinear", "bicubic"], int] = {"bilinear": 2, "bicubic": 3}
_KINDS = {
    "model_type": str, "architectures": list, "hidden_act": str, "pooler_act": str, "id2label": dict,
    "hidden_size": int, "intermediate_size": int,
}  # fmt: skip


class HfFormat:
    """See `Format`."""

    name = "hf"
    bf16 = True

    def recognises(self, path: Path) -> bool:
        """A folder whose config has a model type."""
        return (path / CONFIG_NAME).is_file() and "model_type" in read_json(path / CONFIG_NAME)

    def refusal(self, model: PortableModel) -> str:
        """See `Format`."""
        variant = model.variant
        if variant.representation_size and variant.num_classes:
            return (
                f"{_CLASSIFIER} has no representation layer, and the head reads {variant.representation_size} features "
                f"behind a tanh: the logits would be others. {_BACKBONE} keeps the layer as its pooler: --features-only"
            )
        if variant.distilled and not variant.num_classes:
            return "transformers' headless DeiT has a pooler of its own: export with the heads"
        unknown = {
            f"pool {variant.pool!r} without class token": variant.pool != "token",
            "register tokens": variant.reg_tokens > 0, "LayerScale": variant.layer_scale > 0,
            "normalised queries and keys": variant.qk_norm, "parallel blocks": variant.parallel,
            "SwiGLU": variant.act == "swiglu", "LayerNorm without bias": not variant.norm_bias,
            "ResNet stem": variant.stem is not None,
        }  # fmt: skip
        names = [what for what, present in unknown.items() if present]
        return f"transformers' ViT has no {' and no '.join(names)}" if names else ""

    def notes(self, model: PortableModel) -> list[str]:
        """See `Format`."""
        notes = []
        if _class_of(model.variant) == _BACKBONE and not model.variant.representation_size:
            notes.append(
                "load with ViTModel.from_pretrained(folder, add_pooling_layer=False): this model has no pooler"
            )
        if len(set(model.labels)) < len(model.labels):
            notes.append("some classes share a name: label2id has the last id of each, id2label has them all")
        if model.variant.in_chans != 3:
            notes.append(f"no {PROCESSOR_NAME}: transformers' processors are for RGB images")
        return notes

    def write(self, model: PortableModel, folder: Path, precision: Precision) -> None:
        """See `Format`."""
        variant = model.variant
        write_linked_safetensors(model, _links(variant), folder / WEIGHTS_NAME, precision)
        config = _config(variant, model.labels)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if variant.in_chans == 3:
            processor = _processor(variant, model.preprocessing)
            (folder / PROCESSOR_NAME).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")

    def read(self, path: Path, hints: Hints) -> PortableModel:
        """See `Format`."""
        where = path / CONFIG_NAME
        config = read_json(where, _KINDS)
        weights_path = weights_file(path)
        file = open_tensors(weights_path)
        with understanding(where):
            variant = _variant(config, where, {key: tuple(shape) for key, shape in file.shapes.items()}, hints)
            shapes = parameter_shapes(variant)
            labels = hints.labels or (_labels(config) if variant.num_classes else ())
        with understanding(path / PROCESSOR_NAME):
            preprocessing = _preprocessing(path, variant)
        mend = f"{CONFIG_NAME} says {config['architectures'][0]}"
        weights = read_tensor_file(file, _links(variant), shapes, mend)
        origin = Origin(path.name, sha256_of(weights_path))
        return PortableModel(hints.name or nearest_name(variant), variant, weights, preprocessing, origin, labels)


def _class_of(variant: Variant) -> str:
    if variant.distilled:
        return _DISTILLED
    return _CLASSIFIER if variant.num_classes else _BACKBONE


def _links(variant: Variant) -> list[Link]:
    prefix = _PREFIX[_class_of(variant)]
    embeddings, patches = f"{prefix}embeddings", f"{prefix}embeddings.patch_embeddings.projection"
    links = [
        same("cls_token", f"{embeddings}.cls_token"),
        same("pos_embed", f"{embeddings}.position_embeddings"),
        *_pair("patch_embed.proj", patches),
        *_pair("norm", f"{prefix}layernorm"),
    ]
    if variant.distilled:
        links.append(same("dist_token", f"{embeddings}.distillation_token"))
        links += [*_pair("head", "cls_classifier"), *_pair("head_dist", "distillation_classifier")]
    elif variant.num_classes:
        links += _pair("head", "classifier")
    elif variant.representation_size:
        links += _pair("pre_logits.fc", "pooler.dense")
    for index in range(variant.depth):
        ours, theirs = f"blocks.{index}", f"{prefix}encoder.layer.{index}"
        links += [
            *_pair(f"{ours}.norm1", f"{theirs}.layernorm_before"),
            *_qkv(f"{ours}.attn.qkv", f"{theirs}.attention.attention", variant.qkv_bias),
            *_pair(f"{ours}.attn.proj", f"{theirs}.attention.output.dense"),
            *_pair(f"{ours}.norm2", f"{theirs}.layernorm_after"),
            *_pair(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense"),
            *_pair(f"{ours}.mlp.fc2", f"{theirs}.output.dense"),
        ]
    return links


def _pair(ours: str, theirs: str) -> list[Link]:
    return [same(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def _qkv(ours: str, theirs: str, bias: bool) -> list[Link]:
    """Queries, keys and values: one matrix of ours, three of theirs."""

    def join(*parts: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(parts),)

    return [
        Link((f"{ours}.{part}",), tuple(f"{theirs}.{name}.{part}" for name in ("query", "key", "value")), _thirds, join)
        for part in (("weight", "bias") if bias else ("weight",))
    ]


def _thirds(joined: Tensor) -> tuple[Tensor, ...]:
    return joined.chunk(3)


def _config(variant: Variant, labels: tuple[str, ...]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_class_of(variant)],
        "model_type": "deit" if variant.distilled else "vit",
        "hidden_size": variant.embed_dim,
        "num_hidden_layers": variant.depth,
        "num_attention_heads": variant.num_heads,
        "intermediate_size": variant.mlp_hidden,
        "hidden_act": _ACTS[variant.act],
        "layer_norm_eps": variant.norm_eps,
        "image_size": size_argument(variant.image_px),
        "patch_size": size_argument(variant.patch_kernel),
        "num_channels": variant.in_chans,
        "qkv_bias": variant.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if variant.representation_size:
        config |= {"pooler_output_size": variant.representation_size, "pooler_act": "tanh"}
    if variant.num_classes:
        names = labels or tuple(f"LABEL_{index}" for index in range(variant.num_classes))
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}
    return config


def _processor(variant: Variant, pixels: Preprocessing) -> dict[str, Any]:
    """Resize the shorter side, cut out the centre, normalise: CLIP's processor is the one that does just this."""
    height, width = variant.image_px
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) / pixels.crop)},
        "resample": _RESAMPLE[pixels.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "crop_pct": pixels.crop,  # not CLIP's: the edge is rounded to whole pixels, and we want it back as it was
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def _variant(config: dict[str, Any], where: Path, shapes: dict[str, tuple[int, ...]], hints: Hints) -> Variant:
    kind = (config.get("architectures") or [""])[0]
    if kind not in _PREFIX or config["model_type"] not in {"vit", "deit"}:
        raise CheckpointError(
            f"{where}: {kind or 'no architecture'} of type {config['model_type']!r} is not one of {', '.join(_PREFIX)}"
        )
    if config.get("hidden_act", "gelu") not in _ACTS_READ or config.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(
            f"{where}: hidden_act {config.get('hidden_act')!r}, pooler_act {config.get('pooler_act')!r}: "
            f"this model has {', '.join(_ACTS_READ)} and a tanh pooler"
        )
    head = {_CLASSIFIER: "classifier.weight", _DISTILLED: "cls_classifier.weight"}.get(kind, "")
    if head and head not in shapes:
        raise CheckpointError(f"{where.parent / WEIGHTS_NAME}: {head} is missing: {CONFIG_NAME} says {kind}")
    return Variant(
        **{
            "patch_size": config.get("patch_size", 16),
            "embed_dim": config.get("hidden_size", 768),
            "depth": config.get("num_hidden_layers", 12),
            "num_heads": config.get("num_attention_heads", 12),
            "mlp_ratio": config.get("intermediate_size", 3072) / config.get("hidden_size", 768),
            "qkv_bias": config.get("qkv_bias", True),
            "representation_size": shapes.get("pooler.dense.weight", (0,))[0],
            "num_classes": shapes[head][0] if head else 0,
            "img_size": config.get("image_size", 224),
            "in_chans": config.get("num_channels", 3),
            "distilled": kind == _DISTILLED,
            "act": _ACTS_READ[config.get("hidden_act", "gelu")],
            "norm_eps": config.get("layer_norm_eps", 1e-12),
            **hints.changes,
        }
    )


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Class names, unless they are the ones transformers makes up."""
    labels = label_list(config.get("id2label", {}))
    return () if labels == tuple(f"LABEL_{index}" for index in range(len(labels))) else labels


def _preprocessing(folder: Path, variant: Variant) -> Preprocessing:
    """What the folder's image processor does, as far as it is a resize, a centre crop and a normalisation.

    Raises:
        ValueError: it does something else.
    """
    if not (folder / PROCESSOR_NAME).is_file():
        if variant.in_chans == 3:
            log.warning("%s: no %s: taken for pixels from -1 to 1 of the whole image", folder, PROCESSOR_NAME)
        return Preprocessing(crop=1.0)
    processor = read_json(folder / PROCESSOR_NAME, {"size": (int, dict)})
    factor = processor.get("rescale_factor", 1 / 255)
    if not processor.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"pixels are not rescaled to 0 to 1 (do_rescale, rescale_factor {factor})")
    filters = {number: name for name, number in _RESAMPLE.items()}
    resample = processor.get("resample", _RESAMPLE["bilinear"])
    if resample not in filters:
        raise ValueError(f"resample {resample!r} is neither bilinear (2) nor bicubic (3)")
    normalises = processor.get("do_normalize", True)
    return Preprocessing(
        mean=rgb(processor.get("image_mean", (0.5, 0.5, 0.5))) if normalises else (0.0, 0.0, 0.0),
        std=rgb(processor.get("image_std", (0.5, 0.5, 0.5))) if normalises else (1.0, 1.0, 1.0),
        crop=_crop(processor, min(variant.image_px)),
        interpolation=filters[resample],
    )


def _crop(processor: dict[str, Any], shorter: int) -> float:
    """Side of the centre crop over the shorter side of the resized image."""
    if not processor.get("do_center_crop", "crop_size" in processor):
        return 1.0
    size = processor.get("size", shorter)
    edge = size if isinstance(size, int) else size.get("shortest_edge") or min(size["height"], size["width"])
    # The edge is a whole number of pixels: take the crop that was written beside it, or the roundest that gives it.
    written = [processor["crop_pct"]] if "crop_pct" in processor else []
    rounded = (*written, *(round(shorter / edge, digits) for digits in (1, 2, 3, 4)))
    return next((crop for crop in rounded if crop and round(shorter / crop) == edge), shorter / edge)
