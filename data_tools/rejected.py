"""What a build left out, as far as it can be shown: rejects.parquet, and the images themselves from the source."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_tools.merge import REJECTS_FILE
from data_tools.pictures import salvage
from data_tools.plan_file import ROWS_FILE, read_plan
from data_tools.prepare import unpack
from data_tools.shard_writer import read_image
from vitscale.data.decode import BadSample
from vitscale.errors import ShardError

SHOWN = 24


@dataclass(frozen=True)
class ShownReject:
    """An image that a build left out, or kept though it cannot be read; what can be seen of it, if anything."""

    key: str
    source: str
    wnid: str
    reason: str
    image: Image.Image | None


@dataclass(frozen=True)
class Rejects:
    """All rejects by kind of reason, the most frequent first, and some of each kind in full."""

    kinds: dict[str, int]
    shown: tuple[ShownReject, ...]

    @property
    def total(self) -> int:
        """Images that were rejected."""
        return sum(self.kinds.values())


def read_rejects(folder: Path) -> Rejects | None:
    """The rejects of a build; None if the dataset was not built but indexed.

    Raises:
        ShardError: rejects.parquet is damaged.
    """
    file = folder / REJECTS_FILE
    if not file.exists():
        return None
    try:
        rows = pq.read_table(file, columns=["key", "source", "wnid", "reason"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{file}: damaged ({error}): copy it again or build the dataset again") from None
    kinds = Counter(kind_of(row["reason"]) for row in rows)
    shown = _some_of_each(rows)
    sources = _source_bytes(folder, [row["key"] for row in shown])
    return Rejects(
        kinds=dict(kinds.most_common()),
        shown=tuple(ShownReject(**row, image=_image(sources.get(row["key"]))) for row in shown),
    )


def kind_of(reason: str) -> str:
    """A reason without what differs from image to image: numbers, what is in brackets, names of files."""
    return re.sub(r"\d+", "N", re.sub(r" \(.*\)|(?<=looks like) .*| as .*", "", reason))


def _some_of_each(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to SHOWN rows, taken from the kinds in turn."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[kind_of(row["reason"])].append(row)
    in_turn = chain.from_iterable(zip_longest(*by_kind.values()))
    return list(islice((row for row in in_turn if row is not None), SHOWN))


def _source_bytes(folder: Path, keys: Sequence[str]) -> dict[str, bytes]:
    """Images by key, read from the source of the build; without those that are not there any more."""
    found = {}
    try:
        plan = read_plan(folder)
        if plan is None:
            return {}
        wanted = pc.field("key").isin(pa.array(keys, pa.string()))
        rows = pq.read_table(folder / ROWS_FILE, filters=wanted).to_pylist()
    except (OSError, ShardError):
        return {}
    for row in rows:
        try:
            found[row["key"]] = unpack(read_image(folder / plan.root, plan, row))
        except (OSError, ShardError, BadSample):
            continue
    return found


def _image(data: bytes | None) -> Image.Image | None:
    return None if data is None else salvage(data)
