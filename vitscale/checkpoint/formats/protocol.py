"""What a format of exported models has to offer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vitscale.checkpoint.containers import Precision
from vitscale.checkpoint.portable import PortableModel


@dataclass(frozen=True)
class Hints:
    """What a user says about a file that does not say it itself."""

    name: str | None = None
    """A variant of the table."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the variant: fields of `Variant`."""
    labels: tuple[str, ...] = ()
    """Class names in label order."""


class Format(Protocol):
    """A way to lay a model out in a folder."""

    name: str
    """Word on the command line."""
    bf16: bool
    """Whether weights can be kept in bf16."""

    def recognises(self, path: Path) -> bool:
        """Whether this folder or file is of this format."""
        ...

    def refusal(self, model: PortableModel) -> str:
        """Why this format cannot hold the model, with the mend; empty where it can."""
        ...

    def notes(self, model: PortableModel) -> list[str]:
        """What a user of the written files has to know: where the target computes something else."""
        ...

    def write(self, model: PortableModel, folder: Path, precision: Precision) -> None:
        """Write all files of the format into an existing folder."""
        ...

    def read(self, path: Path, hints: Hints) -> PortableModel:
        """The model of a folder or file.

        Raises:
            CheckpointError: it is damaged, or of another architecture than it says.
        """
        ...
