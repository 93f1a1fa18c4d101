"""From a training checkpoint, or from another export, to a folder in a format of the user's choice.

Everything is written beside the destination, read back, certified, and only then renamed to it.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vitscale.checkpoint.adaptation import adapt_to, without_head
from vitscale.checkpoint.certificate import Certificate, check_round_trip, record_files, write_certificate
from vitscale.checkpoint.containers import Precision
from vitscale.checkpoint.formats import FORMATS
from vitscale.checkpoint.integrity import fsync, sha256_of
from vitscale.checkpoint.manifest import MANIFEST_NAME, Manifest
from vitscale.checkpoint.portable import Origin, PortableModel, parameter_shapes
from vitscale.checkpoint.source import locate
from vitscale.checkpoint.state import stored_weights
from vitscale.checkpoint.verification import verify_export
from vitscale.engine import MASTER
from vitscale.errors import CheckpointError
from vitscale.model import Preprocessing, Resampling, Size, resolve_variant

# What each format's target does with position embeddings of another size.
_RESAMPLING: dict[str, Resampling] = {"npz": "google", "big_vision": "google"}
# In the staging folder; no file of the export.
_LOCK_NAME = ".lock"
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
        if self.format not in FORMATS:
            raise CheckpointError(f"--format {self.format}: the formats that can be written are {', '.join(FORMATS)}")
        if self.precision == "bf16" and not FORMATS[self.format].bf16:
            raise CheckpointError(f"--precision bf16: NumPy has no bf16, so format {self.format} is fp32 only")
        if self.pos_embed is not None and self.img_size is None:
            raise CheckpointError("--pos-embed says how a position embedding is resized: give --img-size too")
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
    check_free(out)
    directory, manifest = locate(source)
    return write_portable(portable_checkpoint(directory, manifest, weights), out, options or ExportOptions())


def portable_checkpoint(directory: Path, manifest: Manifest, weights: str = "raw") -> PortableModel:
    """The model that a verified checkpoint holds.

    Raises:
        CheckpointError: the run kept no moving average, or the manifest does not describe the model that was saved.
    """
    try:
        return _described(directory, manifest, weights)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / MANIFEST_NAME}: does not say what was trained: {error}") from None


def _described(directory: Path, manifest: Manifest, weights: str) -> PortableModel:
    data = manifest.config["data"] or {}
    tag = f"{directory.resolve().parent.parent.name}/{directory.name}"
    name, variant = manifest.model["name"], resolve_variant(**manifest.model)
    if lost := parameter_shapes(variant).keys() - manifest.shapes.keys():
        raise KeyError(min(lost))
    return PortableModel(
        name=name,
        variant=variant,
        weights=stored_weights(directory, manifest, _STORED[weights]),
        preprocessing=Preprocessing(tuple(data["mean"]), tuple(data["std"]), data["val_crop"], data["interpolation"]),
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
    check_free(out)
    if options.features_only:
        model = features_of(model, options.format)
    if options.img_size is not None:
        method = options.pos_embed or _RESAMPLING.get(options.format, "timm")
        model = adapt_to(model, replace(model.variant, img_size=options.img_size), method)
    format_ = FORMATS[options.format]
    if reason := format_.refusal(model):
        raise CheckpointError(f"--format {options.format}: {reason}")
    try:
        with _staging(out) as staging:
            certificate = _write(model, staging, options)
            _publish(staging, out)
    except OSError as error:
        raise CheckpointError(f"{error.filename or out}: {error.strerror or error}: nothing was exported") from None
    return certificate


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` for this process alone, gone at the end; what a killed export left is taken away.

    Raises:
        CheckpointError: another export is under way.
    """
    staging = out.with_name(f".tmp-{out.name}")
    staging.mkdir(parents=True, exist_ok=True)
    held = staging / _LOCK_NAME
    with held.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not held.exists() or not os.path.samestat(held.stat(), os.fstat(lock.fileno())):
                raise BlockingIOError  # its folder got its name in between
        except BlockingIOError:
            raise CheckpointError(
                f"{out}: another export is writing it: wait for it, or choose another --out"
            ) from None
        try:
            for leftover in staging.iterdir():
                if leftover != held:
                    leftover.unlink()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    """Give a complete folder its name, so that after a power cut it is there whole or not at all."""
    for path in (*staging.iterdir(), staging):
        fsync(path)
    try:
        staging.rename(out)
    except OSError:
        check_free(out)  # something took the name meanwhile
        raise
    (out / _LOCK_NAME).unlink()
    fsync(out.parent)


def _write(model: PortableModel, staging: Path, options: ExportOptions) -> Certificate:
    format_ = FORMATS[options.format]
    format_.write(model, staging, options.precision)
    certificate = Certificate(
        format=options.format,
        precision=options.precision,
        model={"name": model.name, **model.variant.arguments()},
        origin=asdict(model.origin),
        files=record_files(staging),
        round_trip=check_round_trip(model, staging, options.format, options.precision),
        notes=format_.notes(model),
        verification=verify_export(staging, options.format) if options.verify else None,
        versions={name: _version(name) for name in ("vitscale", "torch", "safetensors", "numpy")},
    )
    write_certificate(certificate, staging)
    return certificate


def features_of(model: PortableModel, format_: str) -> PortableModel:
    """The model without its head, and without its representation layer where the format has no place for it."""
    headless = adapt_to(model, replace(model.variant, num_classes=0))
    return without_head(model) if FORMATS[format_].refusal(headless) else headless


def check_free(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        CheckpointError: something has the name.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: exists already: choose another --out, or remove it")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
