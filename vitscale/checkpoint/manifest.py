"""The manifest: the one file that makes a directory a checkpoint."""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, field_validator

from vitscale.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1


class FileRecord(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    size_bytes: int
    sha256: str

    @field_validator("name")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        if value in {"", ".", ".."} or "\0" in value or Path(value).name != value:
            raise ValueError(f"{value!r} is no name of a file in this folder")
        return value


class Manifest(BaseModel):
    """What a checkpoint holds and what it came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    step: NonNegativeInt
    """Optimizer updates made."""
    run_id: str = ""
    """Drawn at the run's first start: tells runs of one name apart. Empty in what older versions saved."""
    generation: NonNegativeInt
    """The run's start count when this was saved; an older generation never commits over a newer one."""
    world_size: PositiveInt
    optimizer_steps: NonNegativeInt
    """Updates that Adam's bias correction counts."""
    cursor: dict[str, Any]
    """Position in the data order."""
    course: dict[str, Any] = {}
    """What the trainer knows of the run's course: detours in the data, and what its guard has seen."""
    config: dict[str, dict[str, Any] | None]
    """The resolved config."""
    model: dict[str, Any]
    """Arguments of `create_model` that rebuild the model."""
    labels: list[str]
    """Class names (wnids) in label order."""
    shapes: dict[str, list[NonNegativeInt]]
    """Parameter name -> shape."""
    metrics: dict[str, float]
    """Newest validation metrics."""
    versions: dict[str, str]
    """Versions of vitscale and the libraries that wrote it."""
    saved_at: str
    """UTC, ISO 8601; for people, nothing depends on it."""
    files: list[FileRecord]


def write_manifest(manifest: Manifest, directory: Path) -> Path:
    """Write the manifest with a digest of itself, so that a flipped bit in it is seen too."""
    body = manifest.model_dump(mode="json")
    path = directory / MANIFEST_NAME
    path.write_text(json.dumps({"sha256": _digest(body), "manifest": body}, indent=1) + "\n", encoding="utf-8")
    return path


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint directory; its files are not looked at.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of vitscale wrote it.
    """
    path = directory / MANIFEST_NAME
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to read a pipe would wait for ever
            raise CheckpointError(f"{path}: damaged: it is no file")
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: no {MANIFEST_NAME}, so the save was never finished") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Read and check the text of a manifest.

    Raises:
        CheckpointError: it is damaged, or another version of vitscale wrote it.
    """
    try:
        tree = json.loads(text)
        body = dict(tree["manifest"])
        sound = tree["sha256"] == _digest(body)
    except (KeyError, TypeError):
        raise CheckpointError(f"{where}: damaged: it is no manifest of a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged: {error}") from None
    if not sound:
        raise CheckpointError(f"{where}: damaged: its digest does not match its text")
    if body.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{where}: written with checkpoint schema {body.get('schema_version')}, this version reads {SCHEMA_VERSION}"
        )
    try:
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
