"""Which run a directory is of, and which start of it this is.

RUN/run_id tells the run from every other, such as one of the same name that saves to the same mirror; RUN/generation
tells a start from the older ones. Checkpoints carry both, so the loss of these files is no loss.
"""

import os.path
from pathlib import Path

from vitscale.checkpoint.integrity import replace_file
from vitscale.errors import RunDirectoryError
from vitscale.train.starts import STARTS_NAME

_NO_RUNS = {
    "rank-*.safetensors": "a checkpoint",
    "*.safetensors": "an exported model",
    "*.npz": "an exported model",
    "pytorch_model*.bin": "an exported model",
    "step-*/manifest.json": "the checkpoints of a run",
    "global_step*": "checkpoints of DeepSpeed",
    "mp_rank_*": "a checkpoint of DeepSpeed",
}
"""What a folder is that has such a name in it and where no run was ever started."""


def check_is_no_other(path: Path) -> None:
    """See that no run is started in a folder that was named in the hope that its weights are gone on from.

    Raises:
        RunDirectoryError: it holds something else than a run.
    """
    if os.path.lexists(path / "lock"):
        return
    for pattern, what in _NO_RUNS.items():
        if any(path.glob(pattern)):
            raise RunDirectoryError(
                f"{path}: holds {what}, and no run ({pattern}): choose another run.dir; run.branch_from goes on from "
                "another run's checkpoint, init.path begins with exported weights"
            )


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
