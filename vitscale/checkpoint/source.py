"""The checkpoint that a path names, be it one of this run or of another that a new one goes on from."""

import logging
import os.path
from pathlib import Path

from vitscale.checkpoint.integrity import file_faults
from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.store import PIN_NAME, CheckpointStore
from vitscale.checkpoint.tags import is_tag, read_tag
from vitscale.errors import CheckpointError

log = logging.getLogger(__name__)


def locate(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint that a run directory or a tag's directory stands for, verified down to the last byte.

    A tag may lie anywhere, such as in a copy of some of a run's, and be named by any path.

    Raises:
        CheckpointError: there is none, or none is sound.
    """
    if (directory := tag_directory(path)) is not None:
        try:
            manifest = read_tag(directory)
            fault = next(iter(file_faults(directory, manifest.files)), None)
        except CheckpointError as error:
            fault = str(error)
        if fault is not None:
            raise CheckpointError(f"{fault}: restore it from a copy, or take another checkpoint")
        return directory, manifest
    store = CheckpointStore(path)
    newest = store.newest_valid()
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint here: give a run directory, or one of its checkpoints/step-*")
    tag, manifest, passed_over = newest
    for reason in passed_over:
        log.warning("passing over a checkpoint: %s", reason)
    return store.path(tag), manifest


def tag_directory(path: Path) -> Path | None:
    """The tag's directory that a path leads to, with its own name; None where it leads to something else.

    Raises:
        CheckpointError: it cannot be looked at.
    """
    directory = Path(os.path.realpath(path))  # where Path.resolve fails on links that lead round in a circle
    try:
        return directory if is_tag(directory.name) and directory.is_dir() else None
    except OSError as error:
        raise CheckpointError.of_system(error, f"{path}: cannot be read: {error.strerror}") from None


def pin_branch(directory: Path) -> None:
    """Have the tag that another run goes on from never removed, where that can be written."""
    try:
        (directory / PIN_NAME).touch()
    except OSError as error:
        log.warning(
            "%s: cannot be pinned (%s): its own run may remove it before this one has saved",
            directory, error.strerror,
        )  # fmt: skip
