"""Every variant in every format against the library that reads it: the largest difference in float64."""

import functools
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vitscale.checkpoint import (
    FORMATS,
    ExportOptions,
    LazyWeights,
    Origin,
    PortableModel,
    features_of,
    write_portable,
)
from vitscale.model import TABLE, VisionTransformer

OTHERS = tuple(name for name in FORMATS if name != "vitscale")
"""The formats that another library reads."""
_STD = 0.05


@dataclass(frozen=True)
class FormatResult:
    """One variant in one format."""

    name: str
    format: str
    depth: int
    """Blocks of the model that was compared."""
    difference: float | None
    """Largest difference over all blocks, features and output; None where the format refuses the model."""
    compared: str
    """Up to what: logits, representation, pooled features; or the reason of the refusal."""
    library: str
    """What the model was compared with."""


def compare_formats(names: Sequence[str], depth: int | None = None, classes: int = 1000) -> Iterator[FormatResult]:
    """Export random weights of each variant to each format and verify it. What is slow is the float64 arithmetic.

    Args:
        names: variants of the table.
        depth: blocks at most; None for all.
        classes: outputs of the head at most, because 21,843 make nothing harder.

    Raises:
        CheckpointError: a model and its export differ.
    """
    for name in names:
        model = random_model(name, depth, classes)
        for format_ in OTHERS:
            yield _compare(model, format_)


def random_model(name: str, depth: int | None = None, classes: int | None = None) -> PortableModel:
    """A variant whose every tensor is random: norms about 1, all else about 0, no two alike."""
    entry = TABLE[name]
    variant = replace(
        entry.variant,
        depth=min(entry.variant.depth, depth or entry.variant.depth),
        num_classes=min(entry.variant.num_classes, classes or entry.variant.num_classes),
    )
    with torch.device("meta"):
        model = VisionTransformer(variant)
    weights = LazyWeights(
        {key: functools.partial(_noise, key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    )
    return PortableModel(name, variant, weights, entry.preprocessing, Origin(f"random {name}", ""))


def _noise(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape).normal_(float("norm" in name and name.endswith("weight")), _STD, generator=generator)


def _compare(model: PortableModel, format_: str) -> FormatResult:
    """Verify the whole model, or where the format refuses that, its features."""
    headless = bool(FORMATS[format_].refusal(model))
    if headless and FORMATS[format_].refusal(features_of(model, format_)):
        return FormatResult(model.name, format_, model.variant.depth, None, FORMATS[format_].refusal(model), "")
    options = ExportOptions(format=format_, features_only=headless, verify=True)
    with tempfile.TemporaryDirectory(prefix="vitscale-formats-") as folder:
        found = write_portable(model, Path(folder) / "export", options).verification
    assert found is not None
    worst = max([*found.blocks, found.features, found.output])
    return FormatResult(model.name, format_, model.variant.depth, worst, found.output_is, found.library)
