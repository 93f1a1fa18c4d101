"""Forgetting what was recorded beyond the step a run resumes at, so that every step has one value a tag."""

import io
import json
import logging
import os
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger(__name__)


def purge_after(run_dir: Path, step: int) -> None:
    """Remove all metrics of a run after `step` from metrics.jsonl and from TensorBoard's event files.

    Records without a step (hyperparameters, texts) stay. An event file that cannot be rewritten is named in
    a warning and left as it is: TensorBoard is no reason to end a run.
    """
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        purge_jsonl(metrics, step)
    for path in sorted((run_dir / "tensorboard").glob("*tfevents*")):
        try:
            _purge_events(path, step)
        except OSError as error:
            log.warning("%s: cannot be purged after step %d, its old values stay: %s", path, step, error)


def purge_jsonl(path: Path, step: int) -> None:
    """Keep the lines {"step": s, ...} with s <= `step`, and none that a killed writer left incomplete."""
    old = path.read_bytes()
    kept = b"".join(line for line in old.splitlines(keepends=True) if _is_kept(line, step))
    if kept != old:
        _replace(path, kept)


def _is_kept(line: bytes, step: int) -> bool:
    # A line cut off right before its end is whole JSON, but the next writer would go on in it.
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step


def _purge_events(path: Path, step: int) -> None:
    kept = io.BytesIO()
    records = RecordWriter(kept)
    for record in RawEventFileLoader(str(path)).Load():  # ends before a record that is incomplete
        if Event.FromString(record).step <= step:
            records.write(record)
    if kept.tell() != path.stat().st_size:
        _replace(path, kept.getvalue())


def _replace(path: Path, content: bytes) -> None:
    """Rewrite a file so that a crash leaves the old or the new content."""
    temporary = path.with_name("purge.tmp")  # no name that TensorBoard would read
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
