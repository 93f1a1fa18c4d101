"""The certificate beside every export: what was written, from what, and that it says the same when it is read back."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from vitscale.checkpoint.containers import DTYPES, Precision
from vitscale.checkpoint.formats import FORMATS, Hints
from vitscale.checkpoint.integrity import record_file
from vitscale.checkpoint.manifest import FileRecord
from vitscale.checkpoint.portable import PortableModel
from vitscale.checkpoint.verification import Verification
from vitscale.errors import CheckpointError
from vitscale.model import Variant

CERTIFICATE_NAME = "certificate.json"


class RoundTrip(BaseModel):
    """Every tensor read back from the written files and compared with the one that went in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: int
    """All of them equal to the last bit, after the rounding to bf16 if that was asked for."""
    elements: int
    """Values in all tensors together."""


class Certificate(BaseModel):
    """What an export can be held to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate_version: int = 1
    format: str
    precision: Precision
    model: dict[str, Any]
    """Arguments of `create_model` of what was exported."""
    origin: dict[str, str]
    """The tag or file that the weights came from, its SHA-256, and which of its weights (raw or ema)."""
    files: list[FileRecord]
    round_trip: RoundTrip
    notes: list[str]
    """Where the target computes something else than this model does."""
    verification: Verification | None
    """Comparison with the target library's own model; None without --verify."""
    versions: dict[str, str]
    """Versions of vitscale and of the libraries that wrote the files."""


def check_round_trip(model: PortableModel, folder: Path, format_: str, precision: Precision) -> RoundTrip:
    """Read an export back and compare it tensor by tensor.

    Raises:
        CheckpointError: a tensor came back changed, which no format may do.
    """
    back = FORMATS[format_].read(folder, Hints())
    wanted, came = _decisions(model.variant), _decisions(back.variant)
    if differing := [key for key, value in wanted.items() if came[key] != value]:
        key = differing[0]
        raise CheckpointError(
            f"{folder}: the export came back with {key} {came[key]} instead of {wanted[key]}: it was not kept"
        )
    rgb = model.variant.in_chans == 3  # a mean of three channels says nothing about others
    if back.labels != model.labels or (rgb and back.preprocessing != model.preprocessing):
        what = "labels" if back.labels != model.labels else "pixels"
        raise CheckpointError(f"{folder}: the {what} came back changed: the export was not kept")
    elements = 0
    for name in tqdm(model.shapes, desc="reading back", unit="tensor", disable=None, leave=False):
        expected, found = model.checked(name).to(DTYPES[precision]).float(), back.checked(name)
        elements += expected.numel()
        if not torch.equal(found.view(torch.int32), expected.view(torch.int32)):  # the bits: 0.0 is equal to -0.0
            change = (found - expected).abs().max().item()
            raise CheckpointError(f"{folder}: {name} came back changed by up to {change:.3g}: the export was not kept")
    return RoundTrip(tensors=len(model.shapes), elements=elements)


def _decisions(variant: Variant) -> dict[str, Any]:
    """What decides tensors and numbers: of `mlp_ratio` only the width that it stands for, which formats keep."""
    return variant.arguments() | {"mlp_ratio": variant.mlp_hidden / variant.embed_dim}


def write_certificate(certificate: Certificate, folder: Path) -> None:
    """Write the certificate into a folder."""
    path = folder / CERTIFICATE_NAME
    path.write_text(json.dumps(certificate.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


def record_files(folder: Path) -> list[FileRecord]:
    """Records of all files of an export, flushed to the disk."""
    return [record_file(path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
