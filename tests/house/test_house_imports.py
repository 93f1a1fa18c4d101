"""The floors hold, and the linter that holds them does fail when they are broken."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = "imports go down the floors, never up or sideways"
DEEPSPEED = "only the engine imports deepspeed"
DATA_TOOLS = "data_tools needs only index, split, order, labels and decoder"


@pytest.fixture
def tree(tmp_path):
    """A copy of the packages and of the contracts."""
    for package in ("vitscale", "data_tools"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree):
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


def verdicts(output):
    """KEPT or BROKEN by contract."""
    return dict(re.findall(r"^(.+) (KEPT|BROKEN)$", output, re.MULTILINE))


def test_the_contracts_are_kept(tree):
    status, output = lint(tree)
    assert verdicts(output) == {FLOORS: "KEPT", DEEPSPEED: "KEPT", DATA_TOOLS: "KEPT"}
    assert status == 0


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        pytest.param("vitscale/data/loader.py", "import vitscale.engine", {FLOORS}, id="up"),
        pytest.param("vitscale/losses/softmax.py", "import vitscale.model.heads", {FLOORS}, id="sideways"),
        pytest.param("vitscale/train/loop.py", "import deepspeed", {DEEPSPEED}, id="deepspeed outside the engine"),
        pytest.param("vitscale/newcomer/__init__.py", '"""New."""', {FLOORS}, id="a package not in the contract"),
        pytest.param("data_tools/cli.py", "import vitscale.train", {DATA_TOOLS}, id="data_tools takes the trainer"),
    ],
)
def test_a_broken_copy_fails_and_the_contract_is_named(tree, file, line, broken):
    path = tree / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    status, output = lint(tree)
    assert status != 0
    assert {name for name, verdict in verdicts(output).items() if verdict == "BROKEN"} == broken, output
