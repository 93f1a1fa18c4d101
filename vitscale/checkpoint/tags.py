"""The names of tags, and what a tag says of itself and of the others, wherever it lies."""

import re
from collections.abc import Mapping
from pathlib import Path

from vitscale.checkpoint.manifest import Manifest, read_manifest
from vitscale.checkpoint.retention import overtaken
from vitscale.errors import CheckpointError

_TAG = re.compile(r"step-(\d{8}|[1-9]\d{8,})")


def tag_of(step: int) -> str:
    """Name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def step_of(tag: str) -> int:
    """The step of a tag's name."""
    return int(tag.removeprefix("step-"))


def is_tag(name: str) -> bool:
    """Whether a directory's name is one of a committed checkpoint."""
    return _TAG.fullmatch(name) is not None


def read_tag(directory: Path) -> Manifest:
    """The manifest of a tag's directory, wherever that is; its files are not looked at.

    Raises:
        CheckpointError: it is missing or damaged, or the directory has another tag's name.
    """
    manifest = read_manifest(directory)
    if tag_of(manifest.step) != directory.name:
        raise CheckpointError(
            f"{directory}: holds the checkpoint of step {manifest.step}: give it the name {tag_of(manifest.step)} again"
        )
    return manifest


def overtaken_tags(manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """Tags that an old start saved beyond where a newer one had gone on, each with the reason to pass it over."""
    generations = {manifest.step: manifest.generation for manifest in manifests.values()}
    return {
        tag_of(step): f"saved by start {generations[step]} of the run after start {newer} had gone on from a lower step"
        for step, newer in overtaken(generations).items()
    }
