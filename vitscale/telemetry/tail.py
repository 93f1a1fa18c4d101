"""The end of a metrics.jsonl, which may be long, and whose last line may be torn."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FIRST_BYTES = 1 << 16
_GROWTH = 8


def newest_record(metrics: Path, tag: str, within_bytes: int = _FIRST_BYTES) -> dict[str, Any] | None:
    """The newest record that has a value for a tag; None where there is none in the last part of the file.

    Args:
        metrics: of a run; it need not exist.
        tag: one of `vitscale.telemetry.tags`.
        within_bytes: how far back from the end to look. Only as much as is needed is read.
    """
    marker, read_bytes = json.dumps(tag).encode(), 0
    while read_bytes < within_bytes:
        read_bytes = min(within_bytes, read_bytes * _GROWTH or _FIRST_BYTES)
        lines, whole = _last_lines(metrics, read_bytes)
        for record in _records(line for line in reversed(lines) if marker in line):
            if record.get(tag) is not None:
                return record
        if whole:
            break
    return None


def _last_lines(file: Path, size: int) -> tuple[list[bytes], bool]:
    """The lines in the last `size` bytes, and whether that is all of the file."""
    try:
        with file.open("rb") as opened:
            end = opened.seek(0, 2)
            opened.seek(max(end - size, 0))
            return opened.read().splitlines(), size >= end
    except OSError:
        return [], True


def _records(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the first line may be a part of one, and the last one too
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
