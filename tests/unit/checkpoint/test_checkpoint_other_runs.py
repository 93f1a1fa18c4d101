"""Tags that somebody put among a run's own: of another run, or links to where a tag was moved."""

import shutil
from pathlib import Path

import pytest
from saved_tags import save, stage, truncate

from vitscale.checkpoint import CheckpointStore, Mirror, pin_branch, update_mirror
from vitscale.checkpoint.retention import other_runs
from vitscale.config import CheckpointSection
from vitscale.errors import CheckpointError

OWN, OTHER = "0" * 32, "f" * 32
ONE = CheckpointSection(keep_last=1)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    """Steps 10 and 20 of this run's first start, and step 5 of the seventh start of another one."""
    store = CheckpointStore(tmp_path / "run")
    for step in (10, 20):
        save(store, step, generation=1, run_id=OWN)
    (tmp_path / "run" / "run_id").write_text(f"{OWN}\n")
    save(store, 5, generation=7, run_id=OTHER)
    return store


def test_a_tag_of_another_run_does_not_overtake_this_ones(store):
    tag, manifest, passed_over = store.newest_valid()
    assert (tag, manifest.run_id, passed_over) == ("step-00000020", OWN, [])
    (line,) = store.passed_over(store.manifests()[0]).values()
    assert line == (
        f"saved by run {OTHER}, and this is run {OWN}: move it away, and name it in run.branch_from to go on from it, "
        "or put that id back into run_id if it is this run's"
    )


def test_a_newer_tag_of_another_run_is_passed_over_aloud_and_alone_it_stops_the_run(store):
    save(store, 30, generation=7, run_id=OTHER)
    tag, _, (line,) = store.newest_valid()
    assert tag == "step-00000020"
    assert line.startswith(f"{store.path('step-00000030')}: saved by run {OTHER}")
    assert line.endswith("going on from step-00000020 instead")
    for own in ("step-00000010", "step-00000020"):
        shutil.rmtree(store.path(own))
    with pytest.raises(CheckpointError, match=f"none of 2 checkpoints is valid .*saved by run {OTHER}, and this is"):
        store.newest_valid()


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\xff"])
def test_without_its_file_the_run_is_that_of_its_tags_unless_they_are_of_two(store, content):
    file = store.root.parent / "run_id"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    words = f"run_id: gone, and tags of several runs are here .step-00000005 of {OTHER}, step-00000020 of {OWN}.: write"
    with pytest.raises(CheckpointError, match=words):
        store.newest_valid()
    shutil.rmtree(store.path("step-00000005"))
    assert store.run_id(store.manifests()[0]) == OWN
    save(store, 30)  # by an older version, which knew no ids: of any run
    assert store.run_id(store.manifests()[0]) == OWN
    assert store.newest_valid()[0] == "step-00000030"


def test_an_id_that_cannot_be_read_is_told(store):
    file = store.root.parent / "run_id"
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="run_id: cannot be read: Is a directory: mend it"):
        store.newest_valid()


def test_tags_of_another_run_neither_count_nor_go(store):
    save(store, 30, generation=2, run_id=OTHER)
    assert store.prune(CheckpointSection(keep_last=2), "step-00000020") == []
    assert store.prune(ONE, "step-00000020") == ["step-00000010"]
    assert store.tags() == ["step-00000005", "step-00000020", "step-00000030"]


def test_the_run_saves_a_step_that_another_runs_tag_has(store):
    assert save(store, 5, generation=1, run_id=OWN) == "step-00000005"
    assert store.manifest("step-00000005").run_id == OWN
    store.prune(CheckpointSection(keep_last=3), "step-00000005")
    (moved,) = store.root.glob("*-of-*")
    assert moved.name == f"step-00000005-of-{OTHER}-g1"
    assert (moved / "manifest.json").exists()


def test_a_tag_without_an_id_does_not_make_the_others_the_runs(store):
    save(store, 30)  # by an older version
    assert store.prune(ONE, "step-00000030") == ["step-00000010", "step-00000020"]
    assert store.tags() == ["step-00000005", "step-00000030"]


def test_tags_of_another_run_do_not_go_to_the_mirror(store, tmp_path):
    mirror = Mirror(f"file://{tmp_path}/far/run")
    update_mirror(mirror, store, CheckpointSection(keep_last=3), "step-00000020")
    assert mirror.tags() == ["step-00000010", "step-00000020"]


def test_where_no_id_is_known_all_tags_are_the_runs(store):
    assert other_runs(store.manifests()[0], "") == {}


@pytest.fixture
def linked(tmp_path) -> tuple[CheckpointStore, Path]:
    """Steps 10, 20 and 30, the first of which was moved to another disk."""
    store = CheckpointStore(tmp_path / "run")
    for step in (10, 20, 30):
        save(store, step)
    moved = tmp_path / "archive" / "step-00000010"
    moved.parent.mkdir()
    store.path("step-00000010").rename(moved)
    store.path("step-00000010").symlink_to(moved)
    return store, moved


def test_of_a_tag_that_is_a_link_only_the_link_is_removed(linked):
    store, moved = linked
    assert store.faults("step-00000010") == []
    assert store.prune(ONE, "step-00000030") == ["step-00000010", "step-00000020"]
    assert (store.tags(), store.unfinished()) == (["step-00000030"], [])
    assert (moved / "manifest.json").exists()


@pytest.mark.parametrize("obstacle", ["link", "dangling", "file"])
def test_whatever_has_a_tags_name_is_replaced_and_cleared_up(linked, obstacle):
    store, moved = linked
    if obstacle == "dangling":
        shutil.rmtree(moved)
    elif obstacle == "file":
        store.path("step-00000010").unlink()
        store.path("step-00000010").write_text("no folder")
    (store.root / ".tmp-step-00000010-removed").symlink_to("nowhere")  # of an earlier removal that was cut off
    assert store.commit(*stage(store, 10, generation=2)) == "step-00000010"
    assert store.faults("step-00000010") == []
    assert store.prune(CheckpointSection(keep_last=3), "step-00000030") == [".tmp-step-00000010-removed"]
    assert store.unfinished() == []


def test_a_pinned_tag_behind_a_link_stays(linked):
    store, _ = linked
    pin_branch(store.path("step-00000010"))
    truncate(store.path("step-00000020"))
    assert store.prune(ONE, "step-00000030") == ["step-00000020"]
