"""When a run's mirror is written, and when it is read: after a commit, and where the disk has nothing so new."""

import logging
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vitscale.checkpoint.manifest import Manifest
from vitscale.checkpoint.mirror import Mirror, MirrorError
from vitscale.checkpoint.retention import other_runs, standings, steps_to_keep
from vitscale.checkpoint.store import CheckpointStore
from vitscale.checkpoint.tags import overtaken_tags, step_of, tag_of
from vitscale.config import CheckpointSection, Config
from vitscale.errors import CheckpointError

log = logging.getLogger(__name__)


def mirror_of(config: Config) -> Mirror | None:
    """The mirror of a run's checkpoints, if its config names one.

    Raises:
        ConfigError: the client is not installed.
    """
    if config.checkpoint.mirror is None:
        return None
    assert config.run.dir is not None  # load_config fills it in
    path = Path(os.path.abspath(config.run.dir))  # noqa: PTH100 - a link's own name is the run's
    return Mirror(f"{config.checkpoint.mirror.rstrip('/')}/{path.name}")


def update_mirror(mirror: Mirror, store: CheckpointStore, keep: CheckpointSection, sound: str) -> None:
    """Bring the mirror up to a store that was just pruned: upload what is missing there, then remove what went.

    Never fails: the run has its checkpoints on the disk. What does not get there is told, and tried again the next
    time. The store may be pruned meanwhile.

    Args:
        mirror: the run's.
        store: the run's own.
        keep: what is kept, here as there.
        sound: the tag just committed, which goes first.
    """
    try:
        _update(mirror, store, keep, sound)
    except (CheckpointError, OSError) as error:
        log.warning(
            "%s is behind: %s: tried again after the next save; the run and its disk are well", mirror.url, error
        )


def _update(mirror: Mirror, store: CheckpointStore, keep: CheckpointSection, sound: str) -> None:
    here, _ = store.manifests()
    there, damaged_there = mirror.manifests()
    if sound not in here:
        raise CheckpointError(f"{store.path(sound)}: gone before it was uploaded")
    _check_one_run(mirror, there, here[sound].run_id)
    for stranger in other_runs(here, here[sound].run_id):
        del here[stranger]
    own, newest = here[sound].generation, max((manifest.generation for manifest in there.values()), default=0)
    if newest > own:
        raise CheckpointError(f"start {newest} of the run, or another run, saves there, and this is start {own}")
    for tag in mirror.incomplete(there):
        damaged_there[tag] = "misses a file"
        del there[tag]
    # As text: a metric may be NaN, which does not equal itself.
    missing = {
        tag: manifest
        for tag, manifest in here.items()
        if step_of(tag) <= step_of(sound)
        and (tag not in there or there[tag].model_dump_json() != manifest.model_dump_json())
    }
    incomplete = set(store.incomplete(missing))
    if sound in incomplete:
        raise CheckpointError(f"{store.path(sound)}: damaged before it was uploaded, so nothing goes from there")
    for tag in sorted(missing.keys() - incomplete, key=step_of, reverse=True):
        mirror.upload(store.path(tag))
        there[tag] = missing[tag]
        damaged_there.pop(tag, None)
    by_step = {step_of(tag): manifest for tag, manifest in there.items()}
    known = standings(by_step, [step_of(tag) for tag in damaged_there], step_of(sound))
    kept = {tag_of(step) for step in steps_to_keep(known, keep)} | set(store.tags())
    cut_off = [tag for tag in mirror.unfinished() if step_of(tag) < step_of(sound)]
    for tag in [*(tag for tag in [*there, *damaged_there] if tag not in kept), *cut_off]:
        mirror.remove(tag)


class Restored(NamedTuple):
    """What a look at the mirror came to."""

    fetched: Manifest | None = None
    """Of the tag that was brought to the disk."""
    generation: int = 0
    """The newest start of the run that the mirror knows of."""
    run_id: str = ""
    """Of the run that saves there."""


def restore_newest(store: CheckpointStore, mirror: Mirror, run_id: str = "") -> Restored:
    """Fetch the mirror's newest sound tag where the store has none so new.

    Args:
        store: the run's own.
        mirror: the run's.
        run_id: the run's, where it is known.

    Raises:
        MirrorError: the mirror does not answer and there is no sound tag here, or it has a newer one and does not
            give it.
        CheckpointError: there are tags, here or there, and none of them is sound; or another run saves there.
    """
    own: tuple[str, Manifest, list[str]] | None = None
    trouble: CheckpointError | None = None
    try:
        own = store.newest_valid()
    except CheckpointError as error:
        trouble = error
    try:
        there, faults = mirror.manifests()
    except MirrorError as error:
        if own is None:
            raise
        log.warning("going on from %s without a look at the mirror: %s", own[0], error)
        return Restored()
    found = Restored(
        generation=max((manifest.generation for manifest in there.values()), default=0),
        run_id=_check_one_run(mirror, there, run_id),
    )
    here, _ = store.manifests()
    past = overtaken_tags({**there, **{tag: here[tag] for tag in here.keys() - other_runs(here, found.run_id).keys()}})
    for tag in sorted(there.keys() | faults.keys(), key=step_of, reverse=True):
        if own is not None and step_of(tag) <= step_of(own[0]):
            break
        if tag in faults or tag in past:
            fault = faults.get(tag) or f"{mirror.url}/{tag}: {past[tag]}"
        else:
            try:
                manifest = mirror.fetch(tag, store)
            except MirrorError:
                raise
            except OSError as error:
                raise CheckpointError(
                    f"{store.root}: {tag} of the mirror cannot be written there: {error.strerror}: make room"
                ) from None
            except CheckpointError as error:
                fault = str(error)
            else:
                log.info("fetched %s from %s", tag, mirror.url)
                return found._replace(fetched=manifest)
        log.warning("passing over a checkpoint of the mirror: %s: the next older one is tried", fault)
        trouble = trouble or CheckpointError(
            f"{mirror.url}: no checkpoint there is valid (newest: {fault}): restore one, or name another mirror"
        )
    if own is None and trouble is not None:
        raise trouble
    if own is None:
        log.info("%s: no checkpoint there either", mirror.url)
    return found


def _check_one_run(mirror: Mirror, there: Mapping[str, Manifest], run_id: str) -> str:
    """Make sure that all that is there is of one run, and of this one where its id is known; gives the id."""
    for tag in sorted(there, key=step_of, reverse=True):
        other = there[tag].run_id
        if run_id and other and other != run_id:
            raise CheckpointError(
                f"{mirror.url}: {tag} there is of run {other}, and this run is {run_id}: give it another "
                "checkpoint.mirror, or its run directory another name"
            )
        run_id = run_id or other
    return run_id
