"""What a format of exported models has to offer."""

from pathlib import Path
from typing import Protocol

from vitscale.checkpoint.containers import Precision
from vitscale.checkpoint.portable import Hints, PortableModel


class Reader(Protocol):
    """A way in which a model may lie in a folder or file."""

    name: str
    """Word on the command line."""

    def recognises(self, path: Path) -> bool:
        """Whether this folder or file is of this format."""
        ...

    def read(self, path: Path, hints: Hints) -> PortableModel:
        """The model of a folder or file.

        Raises:
            CheckpointError: it is damaged, or of another architecture than it says.
        """
        ...


class Format(Reader, Protocol):
    """A format that is written, too."""

    bf16: bool
    """Whether weights can be kept in bf16."""

    def refusal(self, model: PortableModel) -> str:
        """Why this format cannot hold the model, with the mend; empty where it can."""
        ...

    def notes(self, model: PortableModel) -> list[str]:
        """What a user of the written files has to know: where the target computes something else."""
        ...

    def write(self, model: PortableModel, folder: Path, precision: Precision) -> None:
        """Write all files of the format into an existing folder."""
        ...
