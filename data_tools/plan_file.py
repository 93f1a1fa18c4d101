"""The plan of a build on disk: plan.parquet, a row group a shard, and plan.json, which is written last.

Builders of all parts read the same plan, each only the rows of its own shards.
"""

import hashlib
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.plan import PLAN_SCHEMA, Layout
from data_tools.prepare import Preparation
from data_tools.sources.kinds import Source
from data_tools.sources.listing import Listing
from data_tools.sources.spool import SPOOL_FOLDER
from vitscale.data.index import sha256_of_file
from vitscale.errors import ShardError

PLAN_FILE = "plan.json"
ROWS_FILE = "plan.parquet"
LEAKAGE_FILE = "leakage.parquet"
PLAN_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanSettings(_Part):
    """What makes two builds differ: each field is an option of `vitscale-data plan`."""

    source: Source
    seed: int
    val_fraction: float
    val_list: Path | None
    split_from_source: bool
    shard_images: int
    shard_bytes: int | None
    classes: str
    outside: Literal["drop", "fail"]
    preparation: Preparation
    leakage: Path | None
    leakage_distance: int


class SourceFile(_Part):
    """A file that images are read from; a file of another size is not the one that was planned."""

    name: str
    size_bytes: int


class PlannedShard(_Part):
    """A shard to write; `samples` counts the images before bad ones are left out."""

    name: str
    samples: int


class Plan(_Part):
    """The content of plan.json. `root` is the folder of the files; a relative one lies in the build's folder."""

    version: int
    settings: PlanSettings
    root: Path
    files: tuple[SourceFile, ...]
    classes: tuple[str, ...]
    label_space: str | None
    outside: dict[str, int]
    shards: tuple[PlannedShard, ...]
    rows_sha256: str
    leakage_sha256: str | None

    @cached_property
    def identity(self) -> str:
        """The same for two plans that give the same shards, wherever their sources lie."""
        preparation = self.settings.preparation
        ingredients = (self.settings.seed, preparation, self.files, self.classes, self.shards, self.rows_sha256)
        return hashlib.sha256(repr((*ingredients, self.leakage_sha256)).encode()).hexdigest()


def read_plan(out: Path) -> Plan | None:
    """The plan in a folder; None if there is none.

    Raises:
        ShardError: plan.json or plan.parquet is damaged or of another version.
    """
    file = out / PLAN_FILE
    return _read_plan(out, file.stat().st_mtime_ns) if file.exists() else None


@lru_cache(maxsize=1)  # a worker asks once a shard
def _read_plan(out: Path, written_at: int) -> Plan:
    try:
        plan = Plan.model_validate_json((out / PLAN_FILE).read_text(encoding="utf-8"))
        sound = plan.version == PLAN_VERSION and sha256_of_file(out / ROWS_FILE) == plan.rows_sha256
    except (OSError, ValidationError):
        sound = False
    if not sound:
        raise ShardError(f"{out / PLAN_FILE}: damaged, or of another version: remove the folder and plan again")
    return plan


def read_rows(out: Path, shard: int) -> list[dict[str, Any]]:
    """Rows of PLAN_SCHEMA of the shard with this place among the plan's shards."""
    footer = _read_footer(out / ROWS_FILE, (out / ROWS_FILE).stat().st_mtime_ns)
    with pq.ParquetFile(out / ROWS_FILE, metadata=footer) as file:
        rows: list[dict[str, Any]] = file.read_row_group(shard).to_pylist()
    return rows


@lru_cache(maxsize=1)
def _read_footer(file: Path, written_at: int) -> pq.FileMetaData:
    return pq.read_metadata(file)


def write_plan(
    out: Path,
    settings: PlanSettings,
    listing: Listing,
    classes: tuple[str, ...],
    label_space: str | None,
    layout: Layout,
) -> Plan:
    """Write both files of a plan, whole or not at all.

    Raises:
        OSError: the disk is full or fails.
    """
    temporary = out / f"{ROWS_FILE}.tmp"
    with pq.ParquetWriter(temporary, PLAN_SCHEMA, compression="zstd") as writer:
        for shard in layout.shards:
            writer.write_table(layout.table.take(shard.rows), row_group_size=len(shard.rows))
    temporary.replace(out / ROWS_FILE)
    spool = out / SPOOL_FOLDER
    plan = Plan(
        version=PLAN_VERSION,
        settings=settings,
        root=Path(SPOOL_FOLDER) if listing.root == spool else listing.root,
        files=tuple(SourceFile(name=name, size_bytes=(listing.root / name).stat().st_size) for name in listing.files),
        classes=classes,
        label_space=label_space,
        outside=layout.outside,
        shards=tuple(PlannedShard(name=shard.name, samples=len(shard.rows)) for shard in layout.shards),
        rows_sha256=sha256_of_file(out / ROWS_FILE),
        leakage_sha256=sha256_of_file(out / LEAKAGE_FILE) if settings.leakage else None,
    )
    write_whole(out / PLAN_FILE, (plan.model_dump_json(indent=1) + "\n").encode())
    return plan


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file durably, whole or not at all.

    Raises:
        OSError: the disk is full or fails.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
