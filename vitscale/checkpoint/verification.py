"""An export against the target library's own model: the same images through both, block by block, in float64."""

import importlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from vitscale.checkpoint.adaptation import without_head
from vitscale.checkpoint.formats import FORMATS, Hints
from vitscale.checkpoint.formats.npz import ARRAYS_NAME, NpzFormat
from vitscale.checkpoint.formats.timm_folder import timm_config
from vitscale.checkpoint.portable import PortableModel
from vitscale.errors import CheckpointError
from vitscale.telemetry import peak_rss_bytes, reset_peak_rss

IMAGES = 2
SEED = 0
TOLERANCE = 1e-9
"""Largest difference that counts as equal in float64, relative to the largest value compared (at least 1): far
above what another order of the same sums leaves, far below any difference in what is computed."""
_NPZ_CHANNELS = {1, 3}
"""What timm's reader of npz can adapt to, where the file has as many."""


class Verification(BaseModel):
    """Largest differences between our model and the target library's, over the probe images, in float64."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    library: str
    """Name and version of what computed the other side."""
    images: int
    """Probe images: normal noise, as normalised pixels are."""
    seed: int
    blocks: list[float]
    """After each block."""
    features: float
    """After the final norm, all tokens."""
    output: float
    """Of what the model ends with."""
    output_is: str
    """logits, representation or pooled features."""
    largest: float
    """Largest magnitude among features and output, to see the differences against."""
    tanh_gelu: float | None
    """For Google's layouts of a model with exact GELU: the largest difference in the output once GELU is computed
    in its tanh form, as Google's code does."""
    seconds: float
    peak_rss_bytes: int
    """Peak of the verification alone, above what the process held before it."""


class _Trace:
    """What a model computes on the way: each block's output, the final norm's, and its own."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.features: Tensor
        self.output: Tensor


def verify_export(folder: Path, format_: str) -> Verification:
    """Compare an export with the target library's model of the same files.

    Args:
        folder: what the export wrote.
        format_: the format.

    Raises:
        CheckpointError: the library is not installed, or the two models differ.
    """
    held_bytes, started_s = reset_peak_rss(), time.perf_counter()
    model = FORMATS[format_].read(folder, Hints())
    variant = model.variant
    npz = isinstance(FORMATS[format_], NpzFormat)
    if npz and variant.in_chans not in _NPZ_CHANNELS:
        raise CheckpointError(
            f"--verify: timm's reader of npz takes images of 1 or 3 channels, not {variant.in_chans}: "
            "export without --verify"
        )
    compared = _as_read_by_timm(model, format_) if npz else model
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(IMAGES, variant.in_chans, *variant.image_px, generator=generator, dtype=torch.float64)

    ours = _trace_ours(compared, images)
    tanh_gelu = None
    if npz and variant.act == "gelu":
        as_google = replace(compared, variant=replace(compared.variant, act="gelu_tanh"))
        tanh_gelu = _difference(ours.output, _trace_ours(as_google, images).output)
    if format_ == "hf":
        library, theirs = _trace_transformers(folder, compared, images)
    else:
        library, theirs = _trace_timm(folder, compared, images, npz)
    found = Verification(
        library=library,
        images=IMAGES,
        seed=SEED,
        blocks=[_difference(a, b) for a, b in zip(ours.blocks, theirs.blocks, strict=True)],
        features=_difference(ours.features, theirs.features),
        output=_difference(ours.output, theirs.output),
        output_is=_output_of(compared),
        largest=max(ours.features.abs().max().item(), ours.output.abs().max().item()),
        tanh_gelu=tanh_gelu,
        seconds=time.perf_counter() - started_s,
        peak_rss_bytes=peak_rss_bytes() - held_bytes,
    )
    _judge(found, folder)
    return found


def _as_read_by_timm(model: PortableModel, format_: str) -> PortableModel:
    """What timm's reader of npz makes of a model: it leaves a representation layer out."""
    npz = FORMATS[format_]
    assert isinstance(npz, NpzFormat)
    return npz.as_target(without_head(model) if model.variant.representation_size else model)


def _judge(found: Verification, folder: Path) -> None:
    limit = TOLERANCE * max(1.0, found.largest)
    named = {f"block {index}": value for index, value in enumerate(found.blocks)}
    named |= {"the features": found.features, f"the {found.output_is}": found.output}
    for where, value in named.items():
        if not value <= limit:  # a NaN is no equality either
            raise CheckpointError(
                f"{folder}: {found.library} computes something else from these files: {where} differ by {value:.3g} "
                f"(equal would be below {limit:.0e}): nothing was exported"
            )


def _output_of(model: PortableModel) -> str:
    if model.variant.num_classes:
        return "logits"
    return "representation" if model.variant.representation_size else "pooled features"


def _trace_ours(model: PortableModel, images: Tensor) -> _Trace:
    built = model.build(torch.float64)
    return _trace(built, list(built.blocks), built.norm, images)


def _trace_timm(folder: Path, model: PortableModel, images: Tensor, npz: bool) -> tuple[str, _Trace]:
    timm = _library("timm")
    if npz:
        config = timm_config(model)
        if FORMATS["big_vision"].recognises(folder):
            config["model_args"]["no_embed_class"] = True  # its class token has no position embedding
        arguments = {**config["model_args"], "num_classes": model.variant.num_classes}
        built = timm.create_model(config["architecture"], **arguments)
        built.load_pretrained(str(folder / ARRAYS_NAME))
        library = f"timm {timm.__version__} (its reader of Google's npz)"
    else:
        built = timm.create_model(f"local-dir:{folder}", pretrained=True)
        library = f"timm {timm.__version__}"
    built = built.double().eval()
    return library, _trace(built, list(built.blocks), built.norm, images)


def _trace_transformers(folder: Path, model: PortableModel, images: Tensor) -> tuple[str, _Trace]:
    transformers = _library("transformers")
    variant = model.variant
    if variant.distilled:
        built = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(folder)
    elif variant.num_classes:
        built = transformers.ViTForImageClassification.from_pretrained(folder)
    else:
        pooler = variant.representation_size > 0
        built = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=pooler)
    built = built.double().eval()
    backbone = getattr(built, built.base_model_prefix, built)
    layers = next(part for part in backbone.modules() if isinstance(part, nn.ModuleList) and len(part) == variant.depth)
    return f"transformers {transformers.__version__}", _trace(built, list(layers), backbone.layernorm, images)


@torch.no_grad()
def _trace(model: nn.Module, blocks: list[nn.Module], norm: nn.Module, images: Tensor) -> _Trace:
    trace = _Trace()

    def keep_block(_: nn.Module, __: Any, output: Any) -> None:
        trace.blocks.append(output[0] if isinstance(output, tuple) else output)

    def keep_features(_: nn.Module, __: Any, output: Tensor) -> None:
        trace.features = output

    hooks = [block.register_forward_hook(keep_block) for block in blocks]
    hooks.append(norm.register_forward_hook(keep_features))
    output = model(images)
    for hook in hooks:
        hook.remove()
    trace.output = _final(output)
    return trace


def _final(output: Any) -> Tensor:
    """Logits of a classifier, or what represents the image in a headless model of transformers."""
    if isinstance(output, Tensor):
        return output
    if "logits" in output:
        return output.logits  # type: ignore[no-any-return]
    pooled = output.get("pooler_output")
    return output.last_hidden_state[:, 0] if pooled is None else pooled  # type: ignore[no-any-return]


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return (a - b).abs().max().item()


def _library(name: str) -> Any:
    """An optional library, found at run time."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        reason = " ".join(str(error).split())
        raise CheckpointError(f"--verify needs {name}: pip install 'vitscale[verify]' ({reason})") from None
