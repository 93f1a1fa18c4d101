"""What commands that build tell: lines for people, a tree for machines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from data_tools.fragment import Reject
from data_tools.merge import REJECTS_FILE
from data_tools.plan_file import Plan
from data_tools.shard_writer import OnBad, ShardReport
from vitscale.data.index import read_dataset

MAX_NAMED = 20


@dataclass(frozen=True)
class PlanReport:
    """A plan that is made, or was there already."""

    out: Path
    plan: Plan

    def lines(self) -> list[str]:
        """What a person is told."""
        counts = f"{len(self.plan.classes)} classes, {self._images} images in {len(self.plan.shards)} shards"
        outside = f"{sum(self.plan.outside.values())} images outside the classes"
        return [f"{counts}, {outside}; next: vitscale-data build --out {self.out}"]

    def tree(self) -> dict[str, object]:
        """What a machine is told."""
        return {
            "out": str(self.out),
            "plan": self.plan.identity,
            "classes": len(self.plan.classes),
            "images": self._images,
            "shards": len(self.plan.shards),
            "outside_classes": self.plan.outside,
        }

    @property
    def _images(self) -> int:
        return sum(shard.samples for shard in self.plan.shards)


@dataclass(frozen=True)
class BuildReport:
    """The shards of a build, or of one part of it: those written now and those found finished."""

    out: Path
    plan: Plan
    shards: Sequence[ShardReport]
    on_bad: OnBad
    is_part: bool
    seconds: float

    @property
    def rejects(self) -> list[Reject]:
        """Images that were left out, or kept though bad."""
        return [reject for shard in self.shards for reject in shard.rejects]

    def lines(self) -> list[str]:
        """What a person is told."""
        rejects, tree = self.rejects, self.tree()
        kept = "kept" if self.on_bad == "keep" else "left out"
        named = [f"{kept if reject.bad else 'left out'}: {reject.source}: {reject.reason}" for reject in rejects]
        if len(named) > MAX_NAMED:
            named[MAX_NAMED:] = [f"{len(named) - MAX_NAMED} more: see {REJECTS_FILE}"]
        summary = (
            f"{tree['classes']} classes, {tree['images']} images, {tree['shards']} shards "
            f"({tree['shards_written']} written now), {sum(shard.size_bytes for shard in self.shards) / 1e6:.1f} MB, "
            f"{tree['bad']} bad images {kept}, {tree['leaked']} leaked and {tree['outside_classes']} outside the "
            f"classes left out, {self.seconds:.1f} s ({self._written_now / self.seconds:.0f} images/s)"
        )
        after = [f"this part is written; when all are: vitscale-data merge {self.out}"] if self.is_part else []
        return [*named, summary, *after]

    def tree(self) -> dict[str, object]:
        """What a machine is told."""
        rejects = self.rejects
        bad = sum(reject.bad for reject in rejects)
        return {
            "out": str(self.out),
            "finished": not self.is_part,
            "classes": len(self.plan.classes),
            "images": sum(shard.images for shard in self.shards),
            "shards": sum(shard.images > 0 for shard in self.shards),
            "shards_written": sum(shard.written for shard in self.shards),
            "shard_bytes": sum(shard.size_bytes for shard in self.shards),
            "bad": bad,
            "on_bad": self.on_bad,
            "leaked": len(rejects) - bad,
            "outside_classes": sum(self.plan.outside.values()),
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self._written_now / self.seconds, 1),
        }

    @property
    def _written_now(self) -> int:
        return sum(shard.images for shard in self.shards if shard.written)


@dataclass(frozen=True)
class DatasetReport:
    """A finished dataset."""

    out: Path

    def lines(self) -> list[str]:
        """What a person is told."""
        tree = self.tree()
        return [
            f"{self.out}: this build is finished: {tree['images']}, {tree['shards']} shards, {tree['rejects']} rejects"
        ]

    def tree(self) -> dict[str, object]:
        """What a machine is told."""
        dataset = read_dataset(self.out)
        return {
            "out": str(self.out),
            "finished": True,
            "plan": dataset.plan,
            "hash": dataset.hash,
            "classes": len(dataset.classes),
            "images": {name: split.samples for name, split in dataset.splits.items()},
            "shards": sum(len(split.shards) for split in dataset.splits.values()),
            "shard_bytes": sum(shard.size_bytes for split in dataset.splits.values() for shard in split.shards),
            "rejects": pq.read_metadata(self.out / REJECTS_FILE).num_rows,
        }
