"""Our own format: fp32 or bf16 safetensors with our parameter names, and a card. It holds every architecture."""

from pathlib import Path

from vitscale.checkpoint.card import CARD_NAME, card_of, described_by, read_card, write_card
from vitscale.checkpoint.containers import Precision, open_tensors, write_safetensors
from vitscale.checkpoint.formats.folder_config import CONFIG_NAME, WEIGHTS_NAME
from vitscale.checkpoint.integrity import check_file, record_file
from vitscale.checkpoint.portable import (
    Hints,
    Link,
    PortableModel,
    foreign_makers,
    foreign_shapes,
    own_names,
    parameter_shapes,
    read_tensor_file,
)


class OwnFormat:
    """See `Format`."""

    name = "vitscale"
    bf16 = True

    def recognises(self, path: Path) -> bool:
        """A folder with a card and safetensors."""
        return (path / CARD_NAME).is_file() and (path / WEIGHTS_NAME).is_file() and not (path / CONFIG_NAME).exists()

    def refusal(self, model: PortableModel) -> str:
        """Nothing is refused."""
        return ""

    def notes(self, model: PortableModel) -> list[str]:
        """Nothing to know."""
        return []

    def write(self, model: PortableModel, folder: Path, precision: Precision) -> None:
        """See `Format`."""
        write_linked_safetensors(model, own_names(model.variant), folder / WEIGHTS_NAME, precision)
        write_card(card_of(model, record_file(folder / WEIGHTS_NAME)), folder)

    def read(self, path: Path, hints: Hints) -> PortableModel:
        """See `Format`."""
        card = read_card(path)
        check_file(path / WEIGHTS_NAME, card.weights)
        variant = card.variant
        weights = read_tensor_file(open_tensors(path / WEIGHTS_NAME), own_names(variant), parameter_shapes(variant))
        return described_by(card, weights, path, hints)


def write_linked_safetensors(model: PortableModel, links: list[Link], path: Path, precision: Precision) -> None:
    """Write a model as safetensors under the names that the links give."""
    shapes, makers = foreign_shapes(links, model.shapes), foreign_makers(links, model)
    write_safetensors(path, ((key, shapes[key], makers[key]) for key in shapes), precision)
