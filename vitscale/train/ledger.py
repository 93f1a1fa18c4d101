"""The ledger of samples: which ones every step has seen, for an audit that none was lost or seen twice."""

import json
from collections.abc import Iterable
from pathlib import Path

from vitscale.telemetry import purge_jsonl


class SampleLedger:
    """RUN/samples/rank-00000.jsonl: one line a step, {"step": step, "keys": [key of each sample]}."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Open this rank's file to append to."""
        self._path = run_dir / "samples" / f"rank-{rank:05d}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, keys: Iterable[str]) -> None:
        """Record the samples of a step once its update is done."""
        self._file.write(json.dumps({"step": step, "keys": list(keys)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def purge_ledger(run_dir: Path, step: int) -> None:
    """Forget the steps after `step` on all ranks' files: the resumed run does them again."""
    for path in sorted((run_dir / "samples").glob("rank-*.jsonl")):
        purge_jsonl(path, step)


def read_ledger(run_dir: Path) -> dict[int, list[str]]:
    """Keys of the samples each step has seen, over all ranks, in rank order."""
    steps: dict[int, list[str]] = {}
    for path in sorted((run_dir / "samples").glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(record["keys"])
    return steps
