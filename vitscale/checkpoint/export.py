"""From a training checkpoint, or from another export, to a folder in a format of the user's choice.

Everything is written beside the destination, read back, certified, and only then renamed to it.
"""

import shutil
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vitscale.checkpoint.adaptation import adapt_to, without_head
from vitscale.checkpoint.certificate import Certificate, check_round_trip, record_files, write_certificate
from vitscale.checkpoint.containers import Precision
from vitscale.checkpoint.formats import FORMATS, WRITTEN
from vitscale.checkpoint.manifest import MANIFEST_NAME, Manifest
from vitscale.checkpoint.portable import Origin, PortableModel
from vitscale.checkpoint.state import stored_weights
from vitscale.checkpoint.store import locate, sha256_of
from vitscale.checkpoint.verification import verify_export
from vitscale.engine import MASTER
from vitscale.errors import CheckpointError
from vitscale.model import Preprocessing, Resampling, Size, resolve_variant

# What each format's target does with position embeddings of another size.
_RESAMPLING: dict[str, Resampling] = {"npz": "google", "big_vision": "google"}
_STORED = {"raw": MASTER, "ema": "ema"}


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written.

    Raises:
        CheckpointError: the format cannot be written, or not in this precision.
    """

    format: str = "vitscale"
    precision: Precision = "fp32"
    features_only: bool = False
    """Leave the head out."""
    img_size: Size | None = None
    """Resize the position embedding for images of this size in pixels; None leaves it."""
    pos_embed: Resampling | None = None
    """How; None is what the format's target does."""
    verify: bool = False
    """Compare with the target library's own model."""

    def __post_init__(self) -> None:
        if self.format not in WRITTEN:
            raise CheckpointError(f"--format {self.format}: the formats that can be written are {', '.join(WRITTEN)}")
        if self.precision == "bf16" and not FORMATS[self.format].bf16:
            raise CheckpointError(f"--precision bf16: NumPy has no bf16, so format {self.format} is fp32 only")
        if self.verify and self.format == "vitscale":
            raise CheckpointError("--verify compares with another library's model: vitscale's own format has none")


def export_model(source: Path, out: Path, options: ExportOptions | None = None, *, weights: str = "raw") -> Certificate:
    """Export a run's newest valid checkpoint, or the tag that `source` names, into the new folder `out`.

    Needs no GPU and no engine, and memory for the largest tensor, not for the model (but for `options.verify`).

    Args:
        source: a run directory, or one of its checkpoints.
        out: the folder to create.
        options: how.
        weights: `raw`, or `ema` for the moving average where the run kept one.

    Raises:
        CheckpointError: no valid checkpoint at `source`, `out` exists, or the format cannot hold the model.
    """
    _check_free(out)
    directory, manifest = locate(source)
    return write_portable(portable_checkpoint(directory, manifest, weights), out, options or ExportOptions())


def portable_checkpoint(directory: Path, manifest: Manifest, weights: str = "raw") -> PortableModel:
    """The model that a verified checkpoint holds.

    Raises:
        CheckpointError: the run kept no moving average.
    """
    data = manifest.config["data"]
    tag = f"{directory.parent.parent.name}/{directory.name}"
    return PortableModel(
        name=manifest.model["name"],
        variant=resolve_variant(**manifest.model),
        weights=stored_weights(directory, manifest, _STORED[weights]),
        preprocessing=Preprocessing(data["mean"], data["std"], data["val_crop"], data["interpolation"]),
        origin=Origin(tag, sha256_of(directory / MANIFEST_NAME), weights),
        labels=tuple(manifest.labels),
        trained={
            "source": tag,
            "step": manifest.step,
            "images_seen": manifest.cursor["position"],
            "metrics": manifest.metrics,
            "config": manifest.config,
            "versions": manifest.versions,
        },
    )


def write_portable(model: PortableModel, out: Path, options: ExportOptions) -> Certificate:
    """Write a model in a format, and a certificate that it says the same when it is read back.

    Raises:
        CheckpointError: `out` exists, the format cannot hold the model, a tensor is damaged, or what was written
            differs from what went in.
    """
    _check_free(out)
    if options.features_only:
        model = _features(model, options.format)
    if options.img_size is not None:
        method = options.pos_embed or _RESAMPLING.get(options.format, "timm")
        model = adapt_to(model, replace(model.variant, img_size=options.img_size), method)
    format_ = FORMATS[options.format]
    if reason := format_.refusal(model):
        raise CheckpointError(f"--format {options.format}: {reason}")
    staging = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        certificate = _write(model, staging, options)
        staging.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone by its new name if all went well
    return certificate


def _write(model: PortableModel, staging: Path, options: ExportOptions) -> Certificate:
    format_ = FORMATS[options.format]
    format_.write(model, staging, options.precision)
    certificate = Certificate(
        format=options.format,
        precision=options.precision,
        model={"name": model.name, **model.variant.arguments()},
        origin={"path": model.origin.path, "sha256": model.origin.sha256, "weights": model.origin.weights},
        files=record_files(staging),
        round_trip=check_round_trip(model, staging, options.format, options.precision),
        notes=format_.notes(model),
        verification=verify_export(staging, options.format) if options.verify else None,
        versions={name: _version(name) for name in ("vitscale", "torch", "safetensors", "numpy")},
    )
    write_certificate(certificate, staging)
    return certificate


def _features(model: PortableModel, format_: str) -> PortableModel:
    """The model without its head, and without its representation layer where the format has no place for it."""
    headless = adapt_to(model, replace(model.variant, num_classes=0))
    return without_head(model) if FORMATS[format_].refusal(headless) else headless


def _check_free(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"{out}: exists already: choose another --out, or remove it")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
