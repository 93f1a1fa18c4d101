"""The card beside exported weights: what a user of them has to know, as JSON."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vitscale.checkpoint.manifest import FileRecord
from vitscale.checkpoint.portable import Hints, Origin, PortableModel, Weights, parameter_shapes
from vitscale.errors import CheckpointError, ConfigError
from vitscale.model import Preprocessing, Variant, resolve_variant

CARD_NAME = "card.json"


class Card(BaseModel):
    """What the weights are, what they were trained on, and how an image becomes their input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["vitscale"] = "vitscale"
    format_version: Literal[1] = 1
    model: dict[str, Any]
    """Arguments of `create_model`."""
    labels: list[str]
    """wnid of each output of the head; empty where they are not known."""
    input_size: tuple[int, int, int]
    """Channels, height, width in pixels."""
    mean: tuple[float, float, float]
    """Taken from the pixels, in units of 0 to 1."""
    std: tuple[float, float, float]
    """The pixels are divided by it."""
    interpolation: Literal["bilinear", "bicubic"]
    crop: float
    """Side of the centre crop over the resized image's shorter side."""
    representation_size: int
    """Width of the representation layer (`pre_logits`); 0 where the model has none."""
    trained: dict[str, Any]
    """How, as far as it is known: config, steps, images seen, metrics, versions."""
    origin: dict[str, str] = {}
    """The tag or file that the weights came from, its SHA-256, and which of its weights (raw or ema)."""
    weights: FileRecord

    @property
    def variant(self) -> Variant:
        """The architecture."""
        return resolve_variant(**self.model)


def card_of(model: PortableModel, weights: FileRecord) -> Card:
    """The card of a model whose weights were written to the file recorded as `weights`."""
    variant, pixels = model.variant, model.preprocessing
    return Card(
        model={"name": model.name, **variant.arguments()},
        labels=list(model.labels),
        input_size=(variant.in_chans, *variant.image_px),
        mean=pixels.mean,
        std=pixels.std,
        interpolation=pixels.interpolation,
        crop=pixels.crop,
        representation_size=variant.representation_size,
        trained=dict(model.trained),
        origin=asdict(model.origin),
        weights=weights,
    )


def write_card(card: Card, folder: Path) -> None:
    """Write the card into a folder."""
    (folder / CARD_NAME).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_card(folder: Path) -> Card:
    """The card of a folder; the file of weights is not looked at.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / CARD_NAME
    try:
        card = Card.model_validate(json.loads(path.read_text(encoding="utf-8")))
        parameter_shapes(card.variant)  # an architecture that is none raises here
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: no {CARD_NAME}: give a folder that `vitscale export` wrote") from None
    except (OSError, ValueError, TypeError, ValidationError, ConfigError) as error:
        raise CheckpointError(f"{path}: damaged: {' '.join(str(error).split())}") from None
    return card


def described_by(card: Card, weights: Weights, path: Path, hints: Hints) -> PortableModel:
    """The model that a card and its weights make.

    Raises:
        CheckpointError: the hints say of the architecture what the card says already.
    """
    if hints.name is not None or hints.changes:
        said = "--model" if hints.name else f"model.{next(iter(hints.changes))}"
        raise CheckpointError(f"{path}: {CARD_NAME} says what this is ({card.model['name']}): leave {said} out")
    history = [*card.trained.get("origins", []), *([card.origin] if card.origin else [])]
    return PortableModel(
        name=card.model["name"],
        variant=card.variant,
        weights=weights,
        preprocessing=Preprocessing(card.mean, card.std, card.crop, card.interpolation),
        origin=Origin(path.resolve().name, card.weights.sha256, card.origin.get("weights", "raw")),
        labels=hints.labels or tuple(card.labels),
        trained={**card.trained, "origins": history},
    )
