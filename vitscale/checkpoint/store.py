"""Checkpoints on disk: what is committed, what is sound, and how a new one gets there.

    RUN/checkpoints/step-00001000/manifest.json           last to be written: it makes the tag exist
                                  rank-00000.safetensors  one a rank
                                  keep                    put there to have this tag never removed
    RUN/checkpoints/.tmp-step-00001200-g3/                 a save under way, or one that was cut off
    RUN/checkpoints/newest                                 name of the tag that was committed last

Every rank writes and flushes its file into the temporary directory; when all have, rank 0 writes the manifest and
renames the directory. A cut at any instant leaves the older tags as they were. `newest` is never believed: tags are
looked for in the directory. It proves that something was committed once, so that a run whose tags are gone does not
start over in silence.
"""

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vitscale.checkpoint.integrity import file_faults, fsync, replace_file, size_fault
from vitscale.checkpoint.manifest import Manifest, write_manifest
from vitscale.checkpoint.retention import other_runs, standings, steps_to_keep
from vitscale.checkpoint.tags import is_tag, overtaken_tags, read_tag, step_of, tag_of
from vitscale.config import CheckpointSection
from vitscale.errors import CheckpointError

log = logging.getLogger(__name__)

POINTER_NAME = "newest"
PIN_NAME = "keep"
RUN_ID_NAME = "run_id"
_RUN_ID = re.compile(rb"[0-9a-f]{32}")
_STAGING = re.compile(r"\.tmp-step-(\d{8,})-g(\d+)")


class CheckpointStore:
    """The checkpoints of one run directory. It holds no state, so any thread may use it."""

    def __init__(self, run_dir: Path) -> None:
        """Name the store; nothing is created until something is saved."""
        self.root = run_dir / "checkpoints"

    def tags(self) -> list[str]:
        """Names of all committed tags, sound or not, the oldest first.

        Raises:
            CheckpointError: the folder is there and cannot be read.
        """
        try:
            return sorted((entry.name for entry in self.root.iterdir() if is_tag(entry.name)), key=step_of)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError.of_system(
                error, f"{self.root}: cannot be read: {error.strerror}: mend it, for nobody knows what was saved there"
            ) from None

    def unfinished(self) -> list[str]:
        """Names of what saves and removals use that are under way or were cut off."""
        return sorted(entry.name for entry in self.root.glob(".tmp-*"))

    def path(self, tag: str) -> Path:
        """Directory of a tag."""
        return self.root / tag

    def prepare(self) -> None:
        """Make the folder and see that it can be written, before there is anything to save.

        Raises:
            OSError: it cannot.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root):
            pass

    def staging(self, step: int, generation: int) -> Path:
        """Temporary directory of a save, created if need be; every rank of one save gets the same."""
        directory = self.root / f".tmp-{tag_of(step)}-g{generation}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def manifest(self, tag: str) -> Manifest:
        """The manifest of a tag, whose files are not looked at.

        Raises:
            CheckpointError: it is missing or damaged, or the directory has another tag's name.
        """
        return read_tag(self.path(tag))

    def manifests(self) -> tuple[dict[str, Manifest], dict[str, str]]:
        """Every tag's manifest, or a line that says why it has none that can be read."""
        found: dict[str, Manifest] = {}
        faults: dict[str, str] = {}
        for tag in self.tags():
            try:
                found[tag] = self.manifest(tag)
            except CheckpointError as error:
                faults[tag] = str(error)
        return found, faults

    def faults(self, tag: str) -> list[str]:
        """A line for each thing that is wrong with a tag, down to the last byte."""
        try:
            return file_faults(self.path(tag), self.manifest(tag).files)
        except CheckpointError as error:
            return [str(error)]

    def run_id(self, manifests: Mapping[str, Manifest]) -> str:
        """The run's id, by RUN/run_id or else by its tags; empty where none was drawn yet.

        Raises:
            CheckpointError: the file cannot be read, or is gone where tags are of several runs.
        """
        file = self.root.parent / RUN_ID_NAME
        try:
            if _RUN_ID.fullmatch(text := file.read_bytes().strip()):
                return text.decode()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise CheckpointError.of_system(error, f"{file}: cannot be read: {error.strerror}: mend it") from None
        ids = {manifest.run_id: tag for tag, manifest in manifests.items() if manifest.run_id}
        if len(ids) > 1:
            told = ", ".join(f"{tag} of {run_id}" for run_id, tag in ids.items())
            raise CheckpointError(
                f"{file}: gone, and tags of several runs are here ({told}): write the id of the run that is to go on "
                "into it"
            )
        return next(iter(ids), "")

    def passed_over(self, manifests: Mapping[str, Manifest]) -> dict[str, str]:
        """The tags that the run does not go on from, sound as they may be, each with the reason; raises as `run_id`."""
        strangers = other_runs(manifests, self.run_id(manifests))
        return strangers | overtaken_tags({tag: manifests[tag] for tag in manifests if tag not in strangers})

    def newest_valid(self) -> tuple[str, Manifest, list[str]] | None:
        """The newest sound tag with its manifest, and a line for each newer one that was passed over.

        None when nothing was ever committed.

        Raises:
            CheckpointError: there were tags and none of them is sound. A run must not start over in silence.
        """
        manifests, faults = self.manifests()
        past = self.passed_over(manifests)
        tags, last = sorted([*manifests, *faults], key=step_of), self._pointer()
        passed_over: list[str] = []
        if last and tags and step_of(last) > step_of(tags[-1]):
            passed_over.append(f"{self.path(last)}: gone, though it was committed last")
        for tag in reversed(tags):
            if tag in past:
                fault = f"{self.path(tag)}: {past[tag]}"
            elif not (fault := faults.get(tag) or next(iter(self.faults(tag)), "")):
                return tag, manifests[tag], [f"{line}: going on from {tag} instead" for line in passed_over]
            passed_over.append(fault)
        mend = "restore one, or move the folder away and start from step 0 with --fresh"
        if tags:
            raise CheckpointError(
                f"{self.root}: none of {len(tags)} checkpoints is valid (newest: {'; '.join(passed_over[:2])}): {mend}"
            )
        if self.once_committed():
            raise CheckpointError(
                f"{self.root}: no checkpoint is there, but {POINTER_NAME} says that {last or 'one'} was: {mend}"
            )
        return None

    def once_committed(self) -> bool:
        """Whether anything was ever committed here, be it gone or damaged by now."""
        return bool(self.tags()) or os.path.lexists(self.root / POINTER_NAME)

    def highest_generation(self) -> int:
        """The newest start of the run that a tag, or a save that was cut off, knows of; 0 without any."""
        saved = [manifest.generation for manifest in self.manifests()[0].values()]
        cut_off = [int(found[2]) for name in self.unfinished() if (found := _STAGING.fullmatch(name))]
        return max([*saved, *cut_off], default=0)

    def commit(self, staging: Path, manifest: Manifest) -> str:
        """Make a complete staging directory a tag; called by rank 0 when all ranks have written.

        A tag of the same step is replaced: it was found unsound, or the run would have gone on from it. Where that
        was pinned, so is the new one.

        Raises:
            CheckpointError: a newer start of the run has saved this step.
            OSError: the disk does not take it; older tags are as they were.
        """
        tag = tag_of(manifest.step)
        if self.is_pinned(tag):
            (staging / PIN_NAME).touch()
        fsync(write_manifest(manifest, staging))
        fsync(staging)
        if os.path.lexists(self.path(tag)):
            self._make_way(tag, manifest)
        staging.rename(self.path(tag))
        fsync(self.root)
        replace_file(self.root / POINTER_NAME, f"{tag}\n")
        return tag

    def prune(self, keep: CheckpointSection, sound: str) -> list[str]:
        """Remove the tags that are not to be kept and what cut-off saves left; names what went.

        Pinned tags stay, and so does a newer save's directory. What cannot be removed is told and left for the next
        time.

        Args:
            keep: what is kept.
            sound: the tag that is known to be sound down to its bytes, such as the one just committed; newer ones
                are not believed to be.

        Raises:
            CheckpointError: the sound tag is gone or damaged by now; nothing is removed.
        """
        return [name for name in self.doomed(keep, sound) if self._remove(name)]

    def doomed(self, keep: CheckpointSection, sound: str) -> list[str]:
        """What `prune` would remove; raises as that does."""
        manifests, faults = self.manifests()
        if sound not in manifests:
            why = faults.get(sound, f"{self.path(sound)}: gone, though it was sound just now")
            raise CheckpointError(f"{why}: no other checkpoint is removed")
        for stranger in other_runs(manifests, manifests[sound].run_id or self.run_id(manifests)):
            del manifests[stranger]  # somebody put it there: it does not count, and is not removed
        damaged = [step_of(tag) for tag in [*faults, *self.incomplete(manifests)]]
        known = standings({step_of(tag): found for tag, found in manifests.items()}, damaged, step_of(sound))
        kept = {tag_of(step) for step in steps_to_keep(known, keep)} | {sound}
        # Of those that were looked at: another process may have committed one by now.
        tags = [tag for tag in sorted([*manifests, *faults], key=step_of) if tag not in kept]
        left = [name for name in self.unfinished() if not _under_way(name, manifests[sound])]
        return [tag for tag in tags if not self.is_pinned(tag)] + left

    def incomplete(self, manifests: Mapping[str, Manifest]) -> list[str]:
        """The tags among these that miss a file, or have one of another size."""
        return [
            tag
            for tag, manifest in manifests.items()
            if any(size_fault(self.path(tag) / record.name, record) for record in manifest.files)
        ]

    def is_pinned(self, tag: str) -> bool:
        """Whether a tag is never removed; so is one that cannot be looked into."""
        try:
            return (self.path(tag) / PIN_NAME).exists()
        except OSError:
            return True

    def _make_way(self, tag: str, manifest: Manifest) -> None:
        """Take a tag's name away for one that replaces it; another run's goes on under a name that is no tag's."""
        try:
            there = self.manifest(tag)
        except CheckpointError:
            self._set_aside(tag)  # a damaged one is there to be replaced
            return
        if other_runs({tag: there}, manifest.run_id):
            kept = self.root / f"{tag}-of-{there.run_id}-g{manifest.generation}"
            self.path(tag).rename(kept)
            log.warning("%s: of another run, whose step this run has come to: now %s", self.path(tag), kept)
            return
        if there.generation > manifest.generation:
            raise CheckpointError(
                f"{self.path(tag)}: start {there.generation} of the run has saved this step, so start "
                f"{manifest.generation} may not: it ends here"
            )
        self._set_aside(tag)

    def _set_aside(self, tag: str) -> Path:
        """Take a tag's name away in one stroke, so that what remains of a cut-off removal is no tag."""
        aside = self.root / f".tmp-{tag}-removed"
        if os.path.lexists(aside):
            _delete(aside)
        self.path(tag).rename(aside)
        return aside

    def _remove(self, name: str) -> bool:
        try:
            _delete(self._set_aside(name) if is_tag(name) else self.root / name)
        except FileNotFoundError:
            return False  # another process was faster
        except OSError as error:
            log.warning("%s: cannot be removed: %s: tried again after the next save", self.root / name, error.strerror)
            return False
        return True

    def _pointer(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            text = (self.root / POINTER_NAME).read_text(encoding="utf-8").strip()
            return text if is_tag(text) else ""
        return ""


def _delete(path: Path) -> None:
    """Remove a folder with all that is in it; of a link, such as to a tag that was moved to another disk, only that."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _under_way(name: str, newest: Manifest) -> bool:
    """Whether a temporary directory may be of a save that goes on: other ranks may be at the next one already."""
    found = _STAGING.fullmatch(name)
    return found is not None and (int(found[2]), int(found[1])) > (newest.generation, newest.step)
