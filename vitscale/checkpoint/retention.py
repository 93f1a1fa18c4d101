"""Which checkpoints count and which are kept, as pure functions of what their manifests say."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vitscale.checkpoint.manifest import Manifest
from vitscale.config import CheckpointSection

Standing = Literal["sound", "damaged", "overtaken"]
"""sound: nothing speaks against it, as far as is known without reading its bytes. damaged: cannot be read, is
incomplete, or newer than what is known to be sound. overtaken: see `overtaken`."""


@dataclass(frozen=True)
class Saved:
    """What retention knows of one tag."""

    step: int
    standing: Standing
    metrics: Mapping[str, float] = field(default_factory=dict)


def overtaken(generations: Mapping[int, int]) -> dict[int, int]:
    """The steps whose tags an old start of the run saved beyond a step that a newer start had gone on from.

    A rank that was cut off from its run may go on and save, after another start took the run over. Its tags lie
    beyond one of a newer generation; they belong to a past that the run has left.

    Args:
        generations: step -> generation of the start that saved it.

    Returns:
        step -> the newest generation that saved a lower step.
    """
    found: dict[int, int] = {}
    newest = 0
    for step in sorted(generations):
        if generations[step] < newest:
            found[step] = newest
        newest = max(newest, generations[step])
    return found


def other_runs(manifests: Mapping[str, Manifest], run_id: str) -> dict[str, str]:
    """The tags that another run saved, each with the reason to leave it alone: starts are numbered within a run.

    Args:
        manifests: by tag.
        run_id: this run's; where it is empty, nothing is known to be of another one.
    """
    return {
        tag: f"saved by run {manifest.run_id}, and this is run {run_id}: move it away, and name it in run.branch_from "
        "to go on from it, or put that id back into run_id if it is this run's"
        for tag, manifest in manifests.items()
        if run_id and manifest.run_id not in ("", run_id)
    }


def standings(manifests: Mapping[int, Manifest], damaged: Collection[int], sound_step: int) -> list[Saved]:
    """What is known of tags without reading their bytes.

    Args:
        manifests: step -> manifest, of the tags that have one.
        damaged: steps of the tags that have none that can be read, or whose files are not all there.
        sound_step: step of the tag that is known to be sound; newer ones are not believed to be.
    """
    past = overtaken({step: manifest.generation for step, manifest in manifests.items()})
    found = []
    for step in sorted(manifests.keys() | set(damaged)):
        if step in past:
            found.append(Saved(step, "overtaken"))
        elif step in damaged or step > sound_step:
            found.append(Saved(step, "damaged"))
        else:
            found.append(Saved(step, "sound", manifests[step].metrics))
    return found


def steps_to_keep(saved: Sequence[Saved], keep: CheckpointSection) -> set[int]:
    """The steps whose tags stay.

    Only sound tags count as newest or best. Nothing as new as the oldest of the newest goes, sound or not: with fewer
    sound ones than are to be kept, everything stays. The best of equals is the oldest, which is nearest to the
    validation that measured it.
    """
    sound = sorted((entry for entry in saved if entry.standing == "sound"), key=lambda entry: entry.step)
    if len(sound) < keep.keep_last:
        return {entry.step for entry in saved}
    kept = {entry.step for entry in saved if entry.step >= sound[-keep.keep_last].step}
    if (every := keep.keep_every_steps) is not None:
        kept |= {entry.step for entry in saved if entry.step % every == 0 and entry.standing != "overtaken"}
    if (metric := keep.keep_best) is not None:
        kept |= _best(sound, metric)
    return kept


def _best(sound: Sequence[Saved], metric: str) -> set[int]:
    measured = [entry for entry in sound if math.isfinite(entry.metrics.get(metric, math.nan))]
    if not measured:
        return set()
    sign = -1 if lower_is_better(metric) else 1
    return {max(measured, key=lambda entry: sign * entry.metrics[metric]).step}  # of equals max gives the first


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a validation metric is the better one."""
    return metric.endswith("loss")
