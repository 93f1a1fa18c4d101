"""Checkpoints on disk: what is committed, what is sound, and how a new one gets there.

    RUN/checkpoints/step-00001000/manifest.json           last to be written: it makes the tag exist
                                  rank-00000.safetensors  one a rank
    RUN/checkpoints/.tmp-step-00001200-g3/                 a save under way, or one that was cut off

Every rank writes and flushes its file into the temporary directory; when all have, rank 0 writes the manifest
and renames the directory. A cut at any instant leaves the older tags as they were.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from vitscale.checkpoint.manifest import FileRecord, Manifest, read_manifest, write_manifest
from vitscale.errors import CheckpointError

_TAG = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path) -> None:
        """Name the store; nothing is created until something is saved."""
        self.root = run_dir / "checkpoints"

    def tags(self) -> list[str]:
        """Names of all committed tags, sound or not, the oldest first."""
        if not self.root.is_dir():
            return []
        found = [entry.name for entry in self.root.iterdir() if _TAG.fullmatch(entry.name)]
        return sorted(found, key=lambda tag: int(tag.removeprefix("step-")))

    def unfinished(self) -> list[str]:
        """Names of the directories that cut-off saves left."""
        return sorted(entry.name for entry in self.root.glob(".tmp-*"))

    def path(self, tag: str) -> Path:
        """Directory of a tag."""
        return self.root / tag

    def staging(self, step: int, generation: int) -> Path:
        """Temporary directory of a save, created if need be; every rank of one save gets the same."""
        directory = self.root / f".tmp-{tag_of(step)}-g{generation}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def verify(self, tag: str) -> Manifest:
        """Check a tag down to the last byte.

        Raises:
            CheckpointError: naming the file, what was expected and what was found.
        """
        directory = self.path(tag)
        manifest = read_manifest(directory)
        for record in manifest.files:
            check_file(directory / record.name, record)
        return manifest

    def newest_valid(self) -> tuple[str, Manifest, list[str]] | None:
        """The newest sound tag with its manifest, and a line for each newer one that was passed over.

        None when nothing was ever committed.

        Raises:
            CheckpointError: there are tags and none of them is sound. A run must not start over in silence.
        """
        passed_over: list[str] = []
        for tag in reversed(self.tags()):
            try:
                return tag, self.verify(tag), passed_over
            except CheckpointError as error:
                passed_over.append(str(error))
        if passed_over:
            raise CheckpointError(
                f"{self.root}: none of {len(passed_over)} checkpoints is valid (newest: {passed_over[0]}): "
                "restore one, or move the folder away to start from step 0"
            )
        return None

    def commit(self, staging: Path, manifest: Manifest) -> str:
        """Make a complete staging directory a tag; called by rank 0 when all ranks have written.

        A tag of the same step from an older generation is replaced: it was found unsound, or the run would
        have gone on from it.
        """
        fsync(write_manifest(manifest, staging))
        fsync(staging)
        tag = tag_of(manifest.step)
        final = self.path(tag)
        if final.exists():
            final.rename(self.root / f".tmp-{tag}-replaced-by-g{manifest.generation}")
        staging.rename(final)
        fsync(self.root)
        return tag

    def prune(self, keep_last: int) -> list[str]:
        """Remove all but the newest `keep_last` tags and what cut-off saves left; names what went."""
        gone = self.tags()[:-keep_last] + self.unfinished()
        for name in gone:
            shutil.rmtree(self.root / name)
        return gone


def tag_of(step: int) -> str:
    """Name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def locate(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint that a run directory or a tag's directory stands for, verified.

    Raises:
        CheckpointError: there is none, or none is sound.
    """
    if _TAG.fullmatch(path.name) and path.is_dir():
        store = CheckpointStore(path.parent.parent)
        return path, store.verify(path.name)
    store = CheckpointStore(path)
    newest = store.newest_valid()
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint here: give a run directory, or one of its checkpoints/step-*")
    tag, manifest, _ = newest
    return store.path(tag), manifest


def record_file(path: Path) -> FileRecord:
    """Flush a file to the disk and take its size and SHA-256."""
    fsync(path)
    return FileRecord(name=path.name, size_bytes=path.stat().st_size, sha256=sha256_of(path))


def check_file(path: Path, record: FileRecord) -> None:
    """Compare a file with its record.

    Raises:
        CheckpointError: it is missing, has another size or another content.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    size = path.stat().st_size
    if size != record.size_bytes:
        raise CheckpointError(f"{path}: {size} bytes where {record.size_bytes} were written")
    if sha256_of(path) != record.sha256:
        raise CheckpointError(f"{path}: its SHA-256 is not the recorded one, so its content was changed or damaged")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
