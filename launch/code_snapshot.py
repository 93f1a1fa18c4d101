"""What a job runs is copied when it is submitted: it may wait for hours, and the checkout moves on meanwhile."""

import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parent
PACKAGES = ("vitscale", "data_tools")
_NO_CODE = {"__pycache__", ".ipynb_checkpoints"}


def code_sources() -> dict[str, Path]:
    """The folders that a job needs, by name: the packages from wherever Python finds them, launch and configs."""
    sources = {"launch": LAUNCH}
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        assert found is not None  # they are installed together
        assert found.origin is not None  # neither is a namespace
        sources[package] = Path(found.origin).parent
    if (configs := LAUNCH.parent / "configs").is_dir():
        sources["configs"] = configs
    return sources


def snapshot_path(folder: Path, sources: Mapping[str, Path]) -> Path:
    """Where `take_snapshot` puts these files: equal files have equal paths."""
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        files = sorted(path for path in source.rglob("*") if path.is_file() and not _NO_CODE.intersection(path.parts))
        for file in files:
            content = file.read_bytes()
            digest.update(f"{name}/{file.relative_to(source).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return folder / f"code-{digest.hexdigest()[:16]}"


def take_snapshot(folder: Path, sources: Mapping[str, Path]) -> Path:
    """Copy the sources below `folder`, unless a copy of just these files is there; the copy's path."""
    known = snapshot_path(folder, sources)
    if known.exists():
        return known
    draft = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
    for name, source in sources.items():
        # With the compiled files, which fit as long as the times stay: thousands of ranks need not compile.
        shutil.copytree(source, draft / name)
    taken = snapshot_path(folder, {name: draft / name for name in sources})  # a file may have been saved meanwhile
    try:
        draft.rename(taken)
    except OSError:
        if not taken.exists():
            raise
        shutil.rmtree(draft)  # another submission was faster
    return taken


def environment() -> dict[str, Any]:
    """What a reader of the job needs to know about where it came from."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "git": _git(LAUNCH),
        "python": platform.python_version(),
        "packages": {found.name: found.version for found in sorted(distributions(), key=lambda found: found.name)},
    }


def record_environment(file: Path, record: Mapping[str, Any]) -> None:
    """Write the record of `environment`."""
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _git(checkout: Path) -> dict[str, Any] | None:
    """Commit, and whether files differ from it; None where the code is in no checkout."""
    answers = []
    for question in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", checkout, *question], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        answers.append(done.stdout.strip())
    commit, changes = answers
    return {"commit": commit, "dirty": bool(changes)}
