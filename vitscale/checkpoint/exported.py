"""Exported models: a folder with the fp32 weights (safetensors) and a card (JSON) that says what they are."""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitscale.checkpoint.manifest import FileRecord, Manifest
from vitscale.checkpoint.state import assemble_weights
from vitscale.checkpoint.store import check_file, locate, record_file
from vitscale.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"


class Card(BaseModel):
    """What a user of the weights has to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = "vitscale"
    format_version: int = 1
    model: dict[str, Any]
    """Arguments of `create_model`."""
    labels: list[str]
    """wnid of each output of the head."""
    input_size: tuple[int, int, int]
    """Channels, height, width in pixels."""
    mean: tuple[float, float, float]
    """Taken from the pixels, in units of 0 to 1."""
    std: tuple[float, float, float]
    """The pixels are divided by it."""
    interpolation: str
    crop: float
    """Side of the centre crop over the resized image's shorter side."""
    representation_size: int
    """Width of the representation layer (`pre_logits`); 0 where the model has none."""
    trained: dict[str, Any]
    """How: config, steps, images seen, metrics, versions, source tag."""
    weights: FileRecord


def export_model(source: Path, out: Path) -> Card:
    """Export a run's newest valid checkpoint, or the tag that `source` names, into the folder `out`.

    Raises:
        CheckpointError: no valid checkpoint at `source`, or `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists already: choose another --out, or remove it")
    directory, manifest = locate(source)
    staging = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file(assemble_weights(directory, manifest), staging / WEIGHTS_NAME, metadata={"format": "pt"})
    card = _card(manifest, directory, record_file(staging / WEIGHTS_NAME))
    (staging / CARD_NAME).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    staging.rename(out)
    return card


def read_card(path: Path) -> Card:
    """Card of an exported folder, once the weights are found to be the ones it was written for.

    Raises:
        CheckpointError: the folder is missing something or is damaged.
    """
    try:
        card = Card.model_validate(json.loads((path / CARD_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {CARD_NAME}: give a folder that `vitscale export` wrote") from None
    except (OSError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{path / CARD_NAME}: damaged: {' '.join(str(error).split())}") from None
    check_file(path / WEIGHTS_NAME, card.weights)
    return card


def load_exported(path: Path) -> tuple[Card, dict[str, Tensor]]:
    """Card and fp32 weights of an exported folder.

    Raises:
        CheckpointError: the folder is missing something or is damaged.
    """
    card = read_card(path)
    try:
        return card, load_file(path / WEIGHTS_NAME)
    except SafetensorError as error:
        raise CheckpointError(f"{path / WEIGHTS_NAME}: not a readable safetensors file: {error}") from None


def _card(manifest: Manifest, directory: Path, weights: FileRecord) -> Card:
    config, model = manifest.config, manifest.model
    size_px = model["img_size"]
    return Card(
        model=model,
        labels=manifest.labels,
        input_size=(model["in_chans"], size_px, size_px),
        mean=config["data"]["mean"],
        std=config["data"]["std"],
        interpolation=config["data"]["interpolation"],
        crop=config["data"]["val_crop"],
        representation_size=model["representation_size"],
        trained={
            "source": f"{directory.parent.parent.name}/{directory.name}",
            "step": manifest.step,
            "images_seen": manifest.cursor["position"],
            "metrics": manifest.metrics,
            "config": config,
            "versions": manifest.versions,
        },
        weights=weights,
    )
