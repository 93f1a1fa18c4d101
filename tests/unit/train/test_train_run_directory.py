"""Taking a run directory over: what is kept, what is refused, and what launchers get to know."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from micro_run import micro_tree

from vitscale.checkpoint import CheckpointStore, Manifest, mirror_of, update_mirror
from vitscale.config import Config
from vitscale.errors import EXIT_FILE_VARIABLE, CheckpointError, ExitStatus, RunDirectoryError
from vitscale.ranks.groups import Ranks
from vitscale.train.beats import FOLDER_NAME, Beat, beat_file
from vitscale.train.course import Detour, read_detours, write_detours
from vitscale.train.lock import ProcessMark
from vitscale.train.run_directory import RunDirectory, refusals_told

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
OTHER = Ranks(1, 2, 1, 2, torch.device("cpu"))


@pytest.fixture
def config(tmp_path):
    return Config.model_validate(micro_tree(tmp_path / "data", tmp_path / "run"))


@pytest.fixture
def opened(config):
    """Open the directory once more; what was opened before lets go of it as a killed process would."""
    held = []

    def open_again(**options):
        for directory in held:
            directory._lock.release()
        directory = RunDirectory.open(config, ALONE, **options)
        held.append(directory)
        return directory

    yield open_again
    for directory in held:
        directory._lock.release()


def commit(run_dir, step, generation, config=None, run_id=""):
    """A checkpoint with no rank's file in it."""
    store = CheckpointStore(run_dir)
    manifest = Manifest(
        step=step, run_id=run_id, generation=generation, world_size=1, optimizer_steps=step, cursor={}, course={},
        config=config.model_dump(mode="json") if config else {}, model={},
        labels=[], shapes={}, metrics={}, versions={}, saved_at="now", files=[],
    )  # fmt: skip
    return store.commit(store.staging(step, generation), manifest)


def starts(run_dir):
    return json.loads((run_dir / "starts.json").read_text())


def test_every_start_is_on_record_with_its_end(opened, config, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run_dir = config.run.dir
    first = opened()
    assert (first.generation, first.is_current()) == (1, True)
    commit(run_dir, 5, 1)
    first.note_saved(5)
    first.close(ExitStatus.TRANSIENT, "RuntimeError: broken", 7)
    assert not (run_dir / "lock").read_text()
    assert json.loads((run_dir / "exit.json").read_text())["generation"] == 1

    second = opened()
    assert not (run_dir / "exit.json").exists()
    assert (first.is_current(), second.is_current()) == (False, True)
    lock = json.loads((run_dir / "lock").read_text())
    assert (lock["generation"], lock["job"], lock["mark"]["pid"]) == (2, "4711", os.getpid())
    # It is killed; its rank 0 was last seen after step 9.
    beat = Beat(2, 0, "node1", ProcessMark.own(), "step", 9, 1.0, time.time())
    (run_dir / FOLDER_NAME).mkdir()
    beat_file(run_dir, 0).write_bytes(beat.encode())

    opened()
    records = starts(run_dir)
    assert [(r["generation"], r["job"], r["found_step"], r["saved_step"]) for r in records] == [
        (1, "4711", 0, 5), (2, "4711", 5, None), (3, "4711", 5, None),
    ]  # fmt: skip
    assert [r["end"] for r in records] == [
        {"reason": "RuntimeError: broken", "step": 7, "status": 1},
        {"reason": "killed, out of memory or its node lost, last seen in its section step", "step": 9, "status": None},
        None,
    ]


def test_a_start_that_never_beat_is_told_as_killed(opened, config):
    opened()
    (config.run.dir / "exit.json").write_text('{"generation": 1}')  # cut off, or written by someone else
    opened()
    assert starts(config.run.dir)[0]["end"]["reason"] == "killed, out of memory or its node lost"


def test_the_first_reason_of_an_end_is_the_one_that_counts(opened, config, tmp_path, monkeypatch):
    monkeypatch.setenv(EXIT_FILE_VARIABLE, str(tmp_path / "told"))
    directory = opened()
    directory.record_end(ExitStatus.TRANSIENT, "the run stands still", 7)
    directory.close(ExitStatus.TRANSIENT, "RuntimeError: connection closed", 7)
    text = (config.run.dir / "exit.json").read_text()
    assert json.loads(text)["reason"] == "the run stands still"
    assert (tmp_path / "told").read_text() == text


@pytest.mark.fault(15)
def test_a_start_that_was_overtaken_leaves_the_newer_one_its_records(opened, config, tmp_path, monkeypatch):
    monkeypatch.setenv(EXIT_FILE_VARIABLE, str(tmp_path / "told"))
    old = opened()
    new = opened()
    old.record_end(ExitStatus.USER_ERROR, "overtaken", 7)
    assert not new.has_ended()
    assert json.loads((tmp_path / "told").read_text())["reason"] == "overtaken"
    new.note_saved(10)
    old.note_saved(5)
    assert [(r["generation"], r["saved_step"]) for r in starts(config.run.dir)] == [(1, 5), (2, 10)]
    (config.run.dir / "generation").write_text("nonsense")
    new.record_end(ExitStatus.FINISHED, "finished", 12)
    assert new.has_ended()


def test_a_damaged_record_of_starts_stops_a_start_and_no_save(opened, config):
    file = config.run.dir / "starts.json"
    directory = opened()
    file.write_text("nonsense")
    with pytest.raises(RunDirectoryError, match=r"starts\.json: is no record of starts"):
        opened()
    directory.note_saved(5)
    assert [(r["generation"], r["saved_step"]) for r in starts(config.run.dir)] == [(1, 5)]


def test_the_generation_outlives_the_loss_of_its_file(opened, config):
    opened()
    opened()
    (config.run.dir / "generation").unlink()
    assert opened().generation == 3
    commit(config.run.dir, 5, 8)
    for name in ("generation", "starts.json"):
        (config.run.dir / name).unlink()
    assert opened().generation == 9, "a newer start is known of by its checkpoint"
    (config.run.dir / "generation").write_text("nonsense")
    with pytest.raises(RunDirectoryError, match="generation: holds no number: remove it"):
        opened()


def contents(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}


def test_a_refused_start_holds_nothing_and_changes_nothing(opened, config):
    opened().close(ExitStatus.TRANSIENT, "why", 7)
    before = contents(config.run.dir)
    changed = config.model_copy(update={"optim": config.optim.model_copy(update={"peak_lr": 1.0})})
    with pytest.raises(RunDirectoryError, match=r"its config differs in optim\.peak_lr"):
        RunDirectory.open(changed, ALONE)
    assert contents(config.run.dir) == before
    RunDirectory.open(changed, ALONE, allow_change=["optim.peak_lr"]).close(ExitStatus.FINISHED, "", 1)
    assert yaml.safe_load((config.run.dir / "config.yaml").read_text())["optim"]["peak_lr"] == 1.0


def test_a_directory_that_cannot_be_is_named(tmp_path, config):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"run: cannot be written: File exists: choose another run\.dir"):
        RunDirectory.open(config, ALONE)
    (tmp_path / "run").unlink()
    (tmp_path / "run" / "environment.json").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=r"run: cannot be used: .*Is a directory"):
        RunDirectory.open(config, ALONE)


@pytest.mark.fault(20)
def test_a_run_that_comes_to_nothing_three_times_is_not_started_again(opened, config):
    for reason in ("first", "second"):
        opened().close(ExitStatus.TRANSIENT, reason, 3)
    opened()  # killed
    with pytest.raises(RunDirectoryError) as caught:
        opened()
    assert caught.value.status == ExitStatus.USER_ERROR
    assert "in 3 starts that failed one after the other (start 1 at step 3: first; start 2 at step 3: sec" in str(
        caught.value
    )
    assert f"remove {config.run.dir / 'starts.json'} to try again, with --fresh" in str(caught.value)
    with pytest.raises(RunDirectoryError):
        opened()
    (config.run.dir / "starts.json").unlink()
    assert opened().generation == 4


@pytest.mark.fault(9, 10)
def test_a_run_whose_checkpoints_are_gone_begins_anew_only_when_told(opened, config):
    run_dir = config.run.dir
    opened()
    opened()  # nothing was saved yet: it may simply begin again
    commit(run_dir, 5, 2)  # and is killed before it can put that on record
    opened().note_saved(10)
    with pytest.raises(RunDirectoryError, match="holds step-00000005: --fresh is for a run directory without"):
        opened(fresh=True)
    (run_dir / "checkpoints" / "step-00000005").rename(run_dir / "step")
    # Its pointer still tells of it: the store has the word, when it looks for the newest one.
    with pytest.raises(CheckpointError, match="no checkpoint is there"):
        CheckpointStore(run_dir).newest_valid()
    with pytest.raises(RunDirectoryError, match="holds the name of a checkpoint that was there: --fresh"):
        opened(fresh=True)
    (run_dir / "checkpoints").rename(run_dir / "old")
    with pytest.raises(RunDirectoryError) as caught:
        opened()
    assert str(caught.value) == (
        f"{run_dir}: step 10 was saved here, and {run_dir / 'checkpoints'} holds no checkpoint: put it back, or begin "
        "anew with --fresh"
    )
    assert opened(fresh=True).generation == 4
    assert opened().generation == 5, "from here on it is a run that has saved nothing yet"


def test_a_tag_of_another_run_is_no_step_of_this_one(opened, config):
    opened()
    commit(config.run.dir, 5000, 1, run_id="f" * 32)
    assert opened().found_step == 0
    shutil.rmtree(config.run.dir / "checkpoints")
    assert opened().found_step == 0, "nothing of the run was ever saved"


def test_metrics_tell_of_checkpoints_where_the_record_of_starts_is_gone_too(opened, config):
    run_dir = config.run.dir
    opened()
    for name in ("starts.json", "generation", "checkpoints"):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text('{"step": 4, "train/loss": 1.0}\n')
    opened()  # saves come every 5 steps
    (run_dir / "starts.json").unlink()
    metrics.write_text('{"step": 9, "train/loss": 1.0}\n')
    with pytest.raises(
        RunDirectoryError,
        match=r"step 9 was trained here, starts.json is gone, and .* holds no checkpoint",
    ):
        opened()
    opened(fresh=True)


@pytest.fixture
def mirrored(config, tmp_path):
    section = config.checkpoint.model_copy(update={"mirror": f"file://{tmp_path / 'far'}"})
    return config.model_copy(update={"checkpoint": section})


def upload(config, tag):
    update_mirror(mirror_of(config), CheckpointStore(config.run.dir), config.checkpoint, tag)


def restart(config, **options):
    directory = RunDirectory.open(config, ALONE, **options)
    directory.close(ExitStatus.RUN_AGAIN, "received SIGTERM", 5)
    return directory


def test_a_run_keeps_the_id_that_its_first_start_drew(config):
    run_dir, first = config.run.dir, restart(config)
    assert (run_dir / "run_id").read_text() == f"{first.run_id}\n"
    assert len(first.run_id) == 32
    assert restart(config).run_id == first.run_id
    commit(run_dir, 5, 2, run_id=first.run_id)
    commit(run_dir, 10, 2)  # by an older version
    for content in (b"", b"nonsense", b"\xff"):
        (run_dir / "run_id").write_bytes(content)
        assert restart(config).run_id == first.run_id
    for name in ("run_id", "checkpoints", "starts.json"):
        (run_dir / name).rename(run_dir / f"old-{name}")
    assert restart(config).run_id not in {"", first.run_id}


def test_two_runs_of_one_name_are_told_apart_in_a_mirror(mirrored, tmp_path):
    one = restart(mirrored)
    tag = commit(mirrored.run.dir, 5, 1, mirrored, one.run_id)
    other = mirrored.model_copy(update={"run": mirrored.run.model_copy(update={"dir": tmp_path / "b" / "run"})})
    same = restart(other)  # nothing is in the mirror yet
    upload(mirrored, tag)
    with pytest.raises(
        CheckpointError, match=f"is of run {one.run_id}, and this run is {same.run_id}: give it"
    ) as told:
        RunDirectory.open(other, ALONE)
    assert told.value.status == ExitStatus.USER_ERROR
    assert not CheckpointStore(other.run.dir).once_committed()
    shutil.rmtree(mirrored.run.dir)
    assert restart(mirrored).run_id == one.run_id


def test_the_generation_is_above_the_mirrors(mirrored):
    restart(mirrored)
    upload(mirrored, commit(mirrored.run.dir, 5, 7))
    shutil.rmtree(mirrored.run.dir)
    commit(mirrored.run.dir, 10, 1)
    assert restart(mirrored).generation == 8


def test_a_fresh_start_where_the_mirror_has_tags_is_refused_and_nothing_fetched(mirrored, tmp_path):
    restart(mirrored, fresh=True)  # nothing is there
    upload(mirrored, commit(mirrored.run.dir, 5, 1))
    shutil.rmtree(mirrored.run.dir)
    with pytest.raises(RunDirectoryError) as told:
        RunDirectory.open(mirrored, ALONE, fresh=True)
    assert str(told.value) == (
        f"file://{tmp_path}/far/run: holds step-00000005: --fresh is for a run without checkpoints, there too: leave "
        "it out to go on, move that folder away, or give another checkpoint.mirror"
    )
    assert not CheckpointStore(mirrored.run.dir).once_committed()


def test_an_empty_disk_gets_checkpoint_and_config_from_the_mirror(tmp_path, config):
    mirror = config.checkpoint.model_copy(update={"mirror": f"file://{tmp_path / 'far'}"})
    config = config.model_copy(update={"checkpoint": mirror})
    first = RunDirectory.open(config, ALONE)
    tag = commit(config.run.dir, 5, 1, config)
    update_mirror(mirror_of(config), CheckpointStore(config.run.dir), mirror, tag)
    first.close(ExitStatus.RUN_AGAIN, "received SIGTERM", 5)
    shutil.rmtree(config.run.dir)

    changed = config.model_copy(update={"optim": config.optim.model_copy(update={"peak_lr": 1.0})})
    with pytest.raises(RunDirectoryError, match=r"its config differs in optim\.peak_lr"):
        RunDirectory.open(changed, ALONE)
    again = RunDirectory.open(config, ALONE)
    assert again.generation == 2
    assert starts(config.run.dir)[-1]["found_step"] == 5
    again.close(ExitStatus.RUN_AGAIN, "received SIGTERM", 5)
    with pytest.raises(RunDirectoryError, match="holds step-00000005: --fresh"):
        RunDirectory.open(config, ALONE, fresh=True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.safetensors", "an exported model"),
        ("vit.npz", "an exported model"),
        ("pytorch_model.bin", "an exported model"),
        ("rank-00000.safetensors", "a checkpoint"),
        ("step-00000005/manifest.json", "the checkpoints of a run"),
        ("global_step10", "checkpoints of DeepSpeed"),
        ("mp_rank_00_model_states.pt", "a checkpoint of DeepSpeed"),
    ],
)
def test_what_is_no_run_directory_is_not_made_one(config, name, what):
    file = config.run.dir / name
    file.parent.mkdir(parents=True)
    file.write_text("")
    with pytest.raises(RunDirectoryError, match=rf"run: holds {what}, and no run \(.*branch_from.*init\.path"):
        RunDirectory.open(config, ALONE)
    (there,) = config.run.dir.iterdir()
    there.rename(config.run.dir / "mine")
    for harmless in ("config.json", "latest", "manifest.json"):
        (config.run.dir / harmless).write_text("{}")
    restart(config)
    (config.run.dir / "mine").rename(there)
    restart(config)  # it is a run by now, whatever else somebody puts there


def test_checkpoints_that_could_not_be_written_are_found_before_the_first_step(config):
    config.run.dir.mkdir()
    (config.run.dir / "checkpoints").symlink_to("nowhere")
    with pytest.raises(RunDirectoryError, match=r"run: cannot be used: .*File exists: '.*/checkpoints': mend it"):
        RunDirectory.open(config, ALONE)
    assert not (config.run.dir / "starts.json").exists()


def test_an_end_is_told_whatever_the_directory_has_become(opened, config, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(EXIT_FILE_VARIABLE, str(tmp_path / "told"))
    directory = opened()
    (config.run.dir / "generation").unlink()
    (config.run.dir / "generation").mkdir()
    directory.close(ExitStatus.USER_ERROR, "shard \udcff.tar is damaged", 3)
    assert "exit.json: cannot be written: [Errno 21] Is a directory" in caplog.text
    assert json.loads((tmp_path / "told").read_text())["reason"] == "shard ?.tar is damaged"


def test_only_rank_0_keeps_records(config, tmp_path, monkeypatch):
    directory = RunDirectory(config)
    directory.beat()
    directory.close(ExitStatus.TRANSIENT, "why", 3)
    assert not (tmp_path / "run").exists()


def test_a_refusal_reaches_a_launcher_that_hides_exit_statuses(tmp_path, monkeypatch):
    monkeypatch.setenv(EXIT_FILE_VARIABLE, str(tmp_path / "told"))
    for ranks in (OTHER, ALONE):
        assert not (tmp_path / "told").exists()
        with pytest.raises(RunDirectoryError), refusals_told(ranks):
            raise RunDirectoryError("held by somebody")
    told = json.loads((tmp_path / "told").read_text())
    assert (told["status"], told["reason"], told["step"]) == (2, "held by somebody", 0)
    monkeypatch.delenv(EXIT_FILE_VARIABLE)
    with pytest.raises(RunDirectoryError), refusals_told(replace(ALONE)):
        raise RunDirectoryError("held by somebody")


def test_a_fresh_start_forgets_the_detours_of_the_course_before(opened, config):
    opened().note_saved(5)
    write_detours(config.run.dir, [Detour(3, 2)])
    opened(fresh=True)
    assert read_detours(config.run.dir) == ()


def test_an_end_that_cannot_be_recorded_does_not_hide_the_end(opened, config, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(EXIT_FILE_VARIABLE, str(tmp_path / "exit-of-the-launcher.json"))
    directory = opened()
    (config.run.dir / "exit.json").mkdir()  # nothing can be put in its place
    monkeypatch.setattr(Path, "exists", lambda self: False)
    directory.record_end(ExitStatus.USER_ERROR, "the disk is full", 5)
    assert "exit.json: cannot be written" in caplog.text
    assert json.loads((tmp_path / "exit-of-the-launcher.json").read_text())["reason"] == "the disk is full"


def test_a_launchers_file_that_cannot_be_written_changes_no_end(opened, config, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(EXIT_FILE_VARIABLE, str(tmp_path / "gone" / "told"))
    opened().close(ExitStatus.USER_ERROR, "the disk is full", 3)
    assert json.loads((config.run.dir / "exit.json").read_text())["reason"] == "the disk is full"
    assert "gone/told: cannot be written: No such file or directory" in caplog.text
