"""Which run a directory is of, and which start of it this is.

RUN/run_id tells the run from every other, such as one of the same name that saves to the same mirror; RUN/generation
tells a start from the older ones. Checkpoints carry both, so the loss of these files is no loss.
"""

import contextlib
import re
from pathlib import Path

from vitscale.checkpoint import CheckpointStore
from vitscale.checkpoint.integrity import replace_file
from vitscale.errors import RunDirectoryError
from vitscale.train.starts import STARTS_NAME

_RUN_ID = re.compile("[0-9a-f]{32}")


def known_run_id(file: Path, store: CheckpointStore) -> str:
    """The run's id, by its file or else by its newest checkpoint that has one; empty where none was drawn yet.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: the store cannot be read.
    """
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if _RUN_ID.fullmatch(text := file.read_text(encoding="utf-8").strip()):
            return text
    newest_first = sorted(store.manifests()[0].values(), key=lambda manifest: -manifest.step)
    return next((manifest.run_id for manifest in newest_first if manifest.run_id), "")


def raise_generation(file: Path, known: int) -> int:
    """One more than the file and whoever remembers a start say, in case one of them was lost.

    Raises:
        RunDirectoryError: the file holds no number.
        OSError: it cannot be read or written.
    """
    generation = max(read_generation(file), known) + 1
    replace_file(file, f"{generation}\n")
    return generation


def read_generation(file: Path) -> int:
    """The newest start on record; 0 where there was none.

    Raises:
        RunDirectoryError: the file holds no number.
        OSError: it cannot be read.
    """
    try:
        return int(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0
    except ValueError:
        raise RunDirectoryError(
            f"{file}: holds no number: remove it, and the next start counts on from {STARTS_NAME}"
        ) from None
