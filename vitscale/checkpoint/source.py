"""The checkpoint that a path names, be it one of this run or of another that a new one goes on from."""

import logging
from pathlib import Path

from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.store import CheckpointStore, is_tag
from vitscale.errors import CheckpointError

log = logging.getLogger(__name__)


def locate(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint that a run directory or a tag's directory stands for, verified.

    Raises:
        CheckpointError: there is none, or none is sound.
    """
    if is_tag(path.name) and path.is_dir():
        store = CheckpointStore(path.parent.parent)
        return path, store.verify(path.name)
    store = CheckpointStore(path)
    newest = store.newest_valid()
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint here: give a run directory, or one of its checkpoints/step-*")
    tag, manifest, passed_over = newest
    for reason in passed_over:
        log.warning("passing over a checkpoint: %s", reason)
    return store.path(tag), manifest


def pin_branch(directory: Path) -> None:
    """Have the tag that another run goes on from never removed, where that can be written."""
    try:
        CheckpointStore(directory.parent.parent).pin(directory.name)
    except OSError as error:
        log.warning(
            "%s: cannot be pinned (%s): its own run may remove it before this one has saved",
            directory, error.strerror,
        )  # fmt: skip
