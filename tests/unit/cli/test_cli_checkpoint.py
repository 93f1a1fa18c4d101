"""`vitscale checkpoint` on real checkpoints of a disk and of a mirror."""

import datetime
import re
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from micro_run import REPOSITORY
from saved_tags import flip_a_bit, save, stage, truncate

from vitscale.checkpoint import CheckpointStore, Mirror, pin_branch, update_mirror
from vitscale.cli.checkpoint import _age, command
from vitscale.config import CheckpointSection
from vitscale.errors import CheckpointError, ConfigError

TAGS = [f"step-000000{step}" for step in (10, 20, 30)]


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    """Three checkpoints of two ranks under ZeRO-2."""
    store = CheckpointStore(tmp_path / "run")
    for step in (10, 20, 30):
        save(store, step, metrics={"val/top1": 0.5, "val/loss": step / 7})
    return store


@pytest.fixture
def run(store) -> str:
    return str(store.root.parent)


def vitscale(*words) -> list[str]:
    """The lines that `vitscale checkpoint` prints; its errors are raised."""
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output.splitlines()


def failing(*words) -> tuple[list[str], Exception]:
    """The lines printed before an error, and the error."""
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert isinstance(result.exception, Exception)
    return result.output.splitlines(), result.exception


def test_list_shows_each_checkpoint_and_what_was_cut_off(store, run):
    store.staging(40, 1)
    pin_branch(store.path(TAGS[0]))
    truncate(store.path(TAGS[1]))
    save(store, 25, generation=3)
    header, *lines = vitscale("list", run)
    assert header.split() == ["tag", "age", "size", "ranks", "ZeRO", "start", "sound", "metrics"]
    size = sum(path.stat().st_size for path in store.path(TAGS[0]).glob("rank-*"))
    first = re.split(r"\s{2,}", lines[0])
    assert first[0] == TAGS[0]
    assert first[2:] == [f"{size / 1e3:.1f} kB", "2", "2", "1", "yes, kept", "val/top1 0.5, val/loss 1.429"]
    columns = [re.split(r"\s{2,}", line) for line in lines[:4]]
    assert [column[0] for column in columns] == [TAGS[0], TAGS[1], "step-00000025", TAGS[2]]
    assert [column[6] for column in columns] == ["yes, kept", "no", "yes", "passed over"]
    assert lines[4:] == [
        f"{store.root}/{TAGS[2]}: saved by start 1 of the run after start 3 had gone on from a lower step",
        f"{store.root}/.tmp-step-00000040-g1: under way, or cut off: no checkpoint",
    ]
    (store.path(TAGS[0]) / "manifest.json").write_text("{")
    lines = vitscale("list", run)
    assert lines[1].split() == [TAGS[0], "no"]
    assert f"{store.root}/{TAGS[0]}/manifest.json: damaged" in lines[5]


@pytest.mark.parametrize(
    ("age_s", "shown"),
    [(-5, "0 s"), (5, "5 s"), (119, "119 s"), (600, "10 min"), (11_000, "3 h"), (1e6, "12 d")],
)
def test_age(age_s, shown):
    now = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
    assert _age((now - datetime.timedelta(seconds=age_s)).isoformat(), now) == shown


@pytest.mark.parametrize("text", ["", "2026-03-01T00:00:00"])  # no time, and one of an unknown zone
def test_an_age_that_nobody_knows(text):
    assert _age(text, datetime.datetime.now(datetime.UTC)) == "?"


def test_verify_reads_every_byte(store, run):
    assert vitscale("verify", run) == [f"{store.root}/{tag}: sound" for tag in TAGS]
    flip_a_bit(store.path(TAGS[1]))
    for rank in (0, 1):
        (store.path(TAGS[2]) / f"rank-0000{rank}.safetensors").unlink()
    flipped = store.path(TAGS[1]) / "rank-00001.safetensors"
    lines, error = failing("verify", run)
    assert lines == [
        f"{store.root}/{TAGS[0]}: sound",
        f"{flipped}: its SHA-256 is not the recorded one, so its content was changed or damaged",
        f"{store.root}/{TAGS[2]}/rank-00000.safetensors: missing",
        f"{store.root}/{TAGS[2]}/rank-00001.safetensors: missing",
    ]
    assert isinstance(error, CheckpointError)
    assert "2 of 3 checkpoints are damaged" in str(error)


def test_inspect_shows_the_manifest(store, run):
    text = vitscale("inspect", store.path(TAGS[1]))
    assert text[0] == str(store.path(TAGS[1]))
    facts = dict(line.strip().split(maxsplit=1) for line in text[1:11] if line.strip())
    assert facts["step"] == "20 (20 updates)"
    assert facts["layout"] == "2 ranks, ZeRO 2"
    assert facts["cursor"] == "position 160"
    assert facts["parameters"] == "128 in 1 tensors"
    assert facts["values"] == "exp_avg 512 B, master 512 B"
    assert facts["files"].startswith("2, 1.3 kB: rank-00000.safetensors 656 B, ")
    assert text[-4:] == ["config:", "  engine:", "    kind: deepspeed", "    zero_stage: 2"]
    assert vitscale("inspect", run)[0] == str(store.path(TAGS[2]))
    with pytest.raises(CheckpointError, match="step-00000099: no checkpoint here"):
        vitscale("inspect", store.path("step-00000099"))


def test_inspect_shows_the_directory_that_is_named(store, monkeypatch):
    copy = store.root.parent / "copies" / TAGS[0]
    shutil.copytree(store.path(TAGS[0]), copy)
    shutil.rmtree(store.path(TAGS[0]))
    assert vitscale("inspect", copy)[0] == str(copy)
    monkeypatch.chdir(copy.parent)
    assert vitscale("inspect", TAGS[0])[0] == TAGS[0]
    copy.rename(copy.with_name(TAGS[1]))
    with pytest.raises(CheckpointError, match="holds the checkpoint of step 10"):
        vitscale("inspect", TAGS[1])


def test_inspect_of_a_run_without_zero_that_has_a_course(tmp_path):
    store = CheckpointStore(tmp_path)
    staging, manifest = stage(store, 10, config={"engine": {"kind": "torch"}})
    store.commit(staging, manifest.model_copy(update={"course": {"detours": [1]}}))
    text = "\n".join(vitscale("inspect", tmp_path))
    assert "2 ranks, no ZeRO" in text
    assert "course         detours [1]" in text


def test_prune_removes_what_is_not_to_be_kept_and_says_so_first(store, run):
    store.staging(5, 0)
    expected = [f"{store.root}/{TAGS[0]}", f"{store.root}/.tmp-step-00000005-g0"]
    left = f"{TAGS[1]}, {TAGS[2]}"
    lines = vitscale("prune", run, "--dry-run")
    assert lines == [*(f"would remove {path}" for path in expected), f"2 checkpoints would be left: {left}"]
    assert store.tags() == TAGS
    lines = vitscale("prune", run)
    assert lines == [*(f"removed {path}" for path in expected), f"2 checkpoints are left: {left}"]
    assert store.tags() == TAGS[1:]


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["--keep-last", 1], TAGS[2:]),
        (["--keep-last", 1, "--keep-every-steps", 20], TAGS[1:]),
        (["--keep-last", 1, "--keep-best", "val/loss"], [TAGS[0], TAGS[2]]),
        (["--keep-last", 3], TAGS),
    ],
)
def test_prune_by_each_rule(store, run, words, left):
    vitscale("prune", run, *words)
    assert store.tags() == left


def test_prune_follows_the_runs_own_config_where_nothing_is_said(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        save(store, step, config={"checkpoint": {"keep_last": 1, "keep_every_steps": 20, "of_a_later_version": 1}})
    vitscale("prune", tmp_path)
    assert store.tags() == TAGS[1:]
    save(store, 40, config={"checkpoint": {"keep_last": 0}})
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last: .*: give --keep-last"):
        vitscale("prune", tmp_path)
    vitscale("prune", tmp_path, "--keep-last", 2)
    assert store.tags() == ["step-00000030", "step-00000040"]


def test_prune_never_removes_the_newest_sound_one(store, run):
    flip_a_bit(store.path(TAGS[2]))  # which its size does not tell
    lines = vitscale("prune", run, "--keep-last", 1)
    assert "SHA-256" in lines[0]
    assert store.tags() == TAGS[1:]
    flip_a_bit(store.path(TAGS[1]))
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is valid"):
        vitscale("prune", run, "--keep-last", 1)
    assert store.tags() == TAGS[1:]


def test_a_mirror_is_shown_and_checked_like_a_run(store, run, tmp_path):
    url = f"file://{tmp_path}/mirror/run"
    update_mirror(Mirror(url), store, CheckpointSection(keep_last=3), TAGS[2])
    assert [line.split()[0] for line in vitscale("list", url)[1:]] == TAGS
    assert vitscale("verify", url) == [f"{url}/{tag}: sound" for tag in TAGS]
    assert vitscale("inspect", f"{url}/{TAGS[0]}")[0] == f"{url}/{TAGS[0]}"
    assert vitscale("inspect", url)[0] == f"{url}/{TAGS[2]}"
    (tmp_path / f"mirror/run/{TAGS[2]}/manifest.json").unlink()
    flip_a_bit(tmp_path / f"mirror/run/{TAGS[1]}")
    assert vitscale("list", url)[-1] == f"{url}/{TAGS[2]}: under way, or cut off: no checkpoint"
    lines, error = failing("verify", url)
    assert lines[1].startswith(f"{url}/{TAGS[1]}/rank-00001.safetensors: ")
    assert "1 of 2 checkpoints are damaged" in str(error)
    with pytest.raises(ConfigError, match="a mirror is pruned by its run"):
        vitscale("prune", url)


@pytest.mark.parametrize("words", [["list"], ["verify"], ["inspect"], ["prune"]])
def test_where_there_is_nothing(tmp_path, words):
    with pytest.raises(CheckpointError, match="no checkpoint here: give a run directory"):
        vitscale(*words, tmp_path)
    if words != ["prune"]:
        with pytest.raises(CheckpointError, match="no checkpoint here: give a run directory"):
            vitscale(*words, f"file://{tmp_path}/nowhere/run")
        assert not (tmp_path / "nowhere").exists()
    save(CheckpointStore(tmp_path), 10)
    shutil.rmtree(tmp_path / "checkpoints" / TAGS[0])
    with pytest.raises(CheckpointError, match="newest says that step-00000010 was"):
        vitscale(*words, tmp_path)


def test_every_help_has_an_example():
    for name in ("list", "verify", "inspect", "prune"):
        assert "Example:" in CliRunner().invoke(command, [name, "--help"]).output


def test_the_command_ends_in_one_line_and_status_2(store, run):
    truncate(store.path(TAGS[0]))
    words = [sys.executable, "-m", "vitscale", "checkpoint", "verify", run]
    result = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {run}: 1 of 3 checkpoints are damaged: restore them from a copy, or remove them; ")
    assert result.stdout.splitlines()[1:] == [f"{store.root}/{tag}: sound" for tag in TAGS[1:]]
