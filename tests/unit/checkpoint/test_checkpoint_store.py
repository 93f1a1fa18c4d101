"""The store: what exists, what is refused, and that nothing half-written is ever taken."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from saved_tags import flip_a_bit, manifest_of, save, stage, truncate

from vitscale.checkpoint import CheckpointStore, Manifest, locate, pin_branch, rank_file_name
from vitscale.checkpoint.integrity import check_file, replace_file
from vitscale.checkpoint.manifest import FileRecord, _digest
from vitscale.checkpoint.store import POINTER_NAME
from vitscale.config import CheckpointSection
from vitscale.errors import CheckpointError, ExitStatus

TWO = CheckpointSection(keep_last=2)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run")


def read_sound(store: CheckpointStore, tag: str) -> Manifest:
    """A tag's manifest, once every byte was compared."""
    return locate(store.path(tag))[1]


def pointer(store: CheckpointStore) -> Path:
    return store.root / POINTER_NAME


def test_the_newest_tag_by_step_is_taken(store):
    assert store.newest_valid() is None
    assert not store.once_committed()
    for step in (9, 100, 20):
        save(store, step)
    tag, found, passed_over = store.newest_valid()
    assert (tag, found.step, passed_over) == ("step-00000100", 100, [])
    assert store.tags() == ["step-00000009", "step-00000020", "step-00000100"]
    assert store.once_committed()


def test_a_name_that_no_step_has_is_no_tag(store):
    save(store, 123_456_789)
    for name in ("step-1", "step-000000001", "step-00000001.bak", "mine"):
        (store.root / name).mkdir()
    assert store.tags() == ["step-123456789"]


def _damaged_body(**changes) -> Callable[[Path], object]:
    """A manifest with other values and a digest that fits them."""

    def damage(directory: Path) -> None:
        path = directory / "manifest.json"
        body = json.loads(path.read_text())["manifest"] | changes
        path.write_text(json.dumps({"sha256": _digest(body), "manifest": body}))

    return damage


def _flip_in_manifest(directory: Path) -> None:
    path = directory / "manifest.json"
    text = path.read_text()
    assert '"world_size": 2' in text
    path.write_text(text.replace('"world_size": 2', '"world_size": 3'))


def _record(name: str) -> dict[str, object]:
    return {"files": [{"name": name, "size_bytes": 1, "sha256": ""}]}


DAMAGES = {
    "truncated": (truncate, "bytes where"),
    "flipped": (flip_a_bit, "rank-00001.safetensors: its SHA-256 is not the recorded one"),
    "missing": (lambda d: (d / rank_file_name(0)).unlink(), "rank-00000.safetensors: missing"),
    "a-folder": (
        lambda d: ((d / rank_file_name(0)).unlink(), (d / rank_file_name(0)).mkdir()),
        "rank-00000.safetensors: ",
    ),
    "no-manifest": (lambda d: (d / "manifest.json").unlink(), "never finished"),
    "half-manifest": (lambda d: os.truncate(d / "manifest.json", 200), "damaged"),
    "no-object": (lambda d: (d / "manifest.json").write_text("[1]"), "damaged"),
    "no-text": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "damaged"),
    "manifest-a-folder": (
        lambda d: ((d / "manifest.json").unlink(), (d / "manifest.json").mkdir()),
        "damaged: it is no file",
    ),
    "manifest-a-pipe": (
        lambda d: ((d / "manifest.json").unlink(), os.mkfifo(d / "manifest.json")),
        "damaged: it is no file",
    ),
    "manifest-a-loop": (
        lambda d: ((d / "manifest.json").unlink(), (d / "manifest.json").symlink_to("manifest.json")),
        "cannot be read: Too many levels of symbolic links",
    ),
    "no-digest": (lambda d: (d / "manifest.json").write_text('{"manifest": {}}'), "it is no manifest of a checkpoint"),
    "nested": (lambda d: (d / "manifest.json").write_text("[" * 100_000), "damaged: maximum recursion depth"),
    "flipped-manifest": (_flip_in_manifest, "digest does not match"),
    "other-schema": (_damaged_body(schema_version=99), "schema 99"),
    "wrong-field": (_damaged_body(step="many"), "step"),
    "no-config": (_damaged_body(config={"engine": 5}), "config.engine: Input should be a valid dictionary"),
    "no-ranks": (_damaged_body(world_size=0), "world_size: Input should be greater than 0"),
    "no-shape": (_damaged_body(shapes={"w": [-3]}), "shapes.w.0: Input should be greater than or equal to 0"),
    "leads-out": (_damaged_body(**_record("../x")), "no name of a file"),
    "no-path": (_damaged_body(**_record("a\0b")), "no name of a file"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.fault(7, 8, 10)
def test_a_damaged_tag_is_passed_over_by_name_and_alone_it_stops_the_run(store, damage, said):
    save(store, 10)
    save(store, 20)
    damage(store.path("step-00000020"))
    tag, _, passed_over = store.newest_valid()
    assert tag == "step-00000010"
    (line,) = passed_over
    assert line.startswith(f"{store.root}/step-00000020")
    assert line.endswith("going on from step-00000010 instead")
    assert "\n" not in line
    with pytest.raises(CheckpointError, match=said):
        read_sound(store, "step-00000020")

    shutil.rmtree(store.path("step-00000010"))
    with pytest.raises(CheckpointError, match=f"none of 1 checkpoints is valid .*{said}.*--fresh$"):
        store.newest_valid()


def test_every_damaged_file_has_a_line(store):
    save(store, 10)
    directory = store.path("step-00000010")
    assert store.faults("step-00000010") == []
    for rank in (0, 1):
        os.truncate(directory / rank_file_name(rank), 5)
    assert len(store.faults("step-00000010")) == 2


def test_a_folder_under_another_tags_name_is_refused(store):
    save(store, 10)
    store.path("step-00000010").rename(store.path("step-00000099"))
    with pytest.raises(CheckpointError, match=r"step-00000099: holds the checkpoint of step 10: give it the name"):
        read_sound(store, "step-00000099")


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "file").mkdir()
    size = (tmp_path / "file").stat().st_size
    with pytest.raises(CheckpointError, match="file: cannot be read: Is a directory"):
        check_file(tmp_path / "file", FileRecord(name="file", size_bytes=size, sha256=""))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: cannot be read: Too many levels"):
        check_file(tmp_path / "loop", FileRecord(name="loop", size_bytes=1, sha256=""))


@pytest.mark.parametrize("content", [None, "", "step-", "step-00000099\n", "../../etc\n", "\0\xff"])
@pytest.mark.fault(9)
def test_whatever_the_pointer_says_tags_are_looked_for(store, content):
    save(store, 10)
    save(store, 20)
    pointer(store).unlink()
    if content is not None:
        pointer(store).write_text(content)
    tag, _, passed_over = store.newest_valid()
    assert tag == "step-00000020"
    if content and "99" in content:  # what was committed last is gone, which is worth a word
        assert passed_over == [
            f"{store.root}/step-00000099: gone, though it was committed last: going on from step-00000020 instead"
        ]
    else:
        assert passed_over == []


@pytest.mark.parametrize("content", ["step-00000020\n", "", "bogus"])
@pytest.mark.fault(9, 10)
def test_where_something_was_committed_and_nothing_is_left_no_run_starts_over(store, content):
    save(store, 20)
    shutil.rmtree(store.path("step-00000020"))
    pointer(store).write_text(content)
    assert store.once_committed()
    with pytest.raises(CheckpointError, match=r"no checkpoint is there, but newest says .*--fresh$"):
        store.newest_valid()
    with pytest.raises(CheckpointError, match="no checkpoint is there"):
        locate(store.root.parent)


@pytest.mark.fault(15)
def test_a_later_start_replaces_a_tag_of_the_same_step_and_an_older_one_does_not(store):
    save(store, 10, generation=1)
    save(store, 10, generation=2)
    assert read_sound(store, "step-00000010").generation == 2
    with pytest.raises(CheckpointError, match="start 2 of the run has saved this step, so start 1 may not"):
        save(store, 10, generation=1)
    assert read_sound(store, "step-00000010").generation == 2
    _flip_in_manifest(store.path("step-00000010"))
    save(store, 10, generation=1)
    assert store.highest_generation() == 1
    assert store.prune(TWO, "step-00000010") == [".tmp-step-00000010-removed"]


@pytest.mark.fault(15)
def test_a_tag_of_a_start_that_was_overtaken_is_passed_over_and_goes_when_newer_ones_do(store):
    save(store, 100, generation=1)
    save(store, 150, generation=2)
    save(store, 200, generation=1)  # a rank that did not know
    tag, _, passed_over = store.newest_valid()
    assert tag == "step-00000150"
    (line,) = passed_over
    assert "step-00000200: saved by start 1 of the run after start 2 had gone on from a lower step" in line
    assert store.highest_generation() == 2
    save(store, 250, generation=2)
    assert store.newest_valid()[0] == "step-00000250"
    store.prune(TWO, "step-00000250")
    assert store.tags() == ["step-00000150", "step-00000200", "step-00000250"]
    save(store, 300, generation=2)
    store.prune(TWO, "step-00000300")
    assert store.tags() == ["step-00000250", "step-00000300"]


def test_the_highest_generation_is_known_from_a_save_that_was_cut_off_too(store):
    save(store, 10, generation=2)
    store.staging(20, generation=5)
    assert store.highest_generation() == 5


def test_a_tag_that_replaces_a_pinned_one_is_pinned_too(store):
    save(store, 10)
    pin_branch(store.path("step-00000010"))
    save(store, 20)
    flip_a_bit(store.path("step-00000010"))  # so the run came by the same step again
    save(store, 10, generation=2)
    assert store.manifest("step-00000010").generation == 2
    assert store.is_pinned("step-00000010")
    assert not store.is_pinned("step-00000020")


def test_pruning_after_a_sound_tag_that_is_gone_removes_nothing(store):
    for step in (10, 20, 30):
        save(store, step)
    shutil.rmtree(store.path("step-00000030"))
    for look in (store.doomed, store.prune):
        with pytest.raises(CheckpointError, match=r"step-00000030: gone, .*: no other checkpoint is removed$"):
            look(CheckpointSection(keep_last=1), "step-00000030")
    (store.path("step-00000020") / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged: .*: no other checkpoint is removed$"):
        store.prune(CheckpointSection(keep_last=1), "step-00000020")
    assert store.tags() == ["step-00000010", "step-00000020"]


def test_a_folder_that_cannot_be_read_is_told_and_what_is_in_one_is_not_removed(store, monkeypatch):
    for step in (10, 20, 30):
        save(store, step)

    def refusing(path, name):
        def ask(self, *arguments):
            if self == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return original(self, *arguments)

        original = getattr(Path, name)
        return ask

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", refusing(store.root, "iterdir"))
        for look in (store.tags, store.newest_valid, store.once_committed):
            with pytest.raises(
                CheckpointError, match=r"checkpoints: cannot be read: Permission denied: mend it"
            ) as told:
                look()
            assert told.value.status == ExitStatus.USER_ERROR
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", refusing(store.path("step-00000010") / "keep", "exists"))
        assert store.prune(CheckpointSection(keep_last=1), "step-00000030") == ["step-00000020"]
    store.root.rename(store.root.with_name("away"))
    store.root.write_text("no folder")
    assert store.tags() == []
    with pytest.raises(FileExistsError):
        store.prepare()


def test_a_server_that_is_away_is_worth_another_start(store, monkeypatch):
    save(store, 10)

    def gone(self):
        raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))

    monkeypatch.setattr(Path, "iterdir", gone)
    with pytest.raises(CheckpointError, match="cannot be read: Cannot send after transport") as told:
        store.newest_valid()
    assert told.value.status == ExitStatus.TRANSIENT


def test_the_folder_is_tried_before_there_is_anything_to_save(store, monkeypatch):
    store.prepare()
    store.prepare()
    assert list(store.root.iterdir()) == []
    assert not store.once_committed()


def test_a_replaced_file_is_flushed_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    file = tmp_path / "record"
    file.write_text("old")
    with cut_at(monkeypatch, 100, _Cut()) as happened:
        replace_file(file, "new")
    assert [entry.split()[0] for entry in happened] == ["fsync", "replace", "fsync"]
    assert file.read_text() == "new"
    with (
        cut_at(monkeypatch, 1, OSError(errno.EIO, os.strerror(errno.EIO))),
        pytest.raises(OSError, match="Input/output error"),
    ):
        replace_file(file, "newer")
    assert file.read_text() == "new"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", _no_space)
        with pytest.raises(OSError, match="No space left"):
            replace_file(file, "newer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["record"]
    assert file.read_text() == "new"


def test_pruning_by_all_three_rules(store):
    keep = CheckpointSection(keep_last=1, keep_every_steps=30, keep_best="val/top1")
    for step, top1 in ((10, 0.1), (20, 0.9), (30, 0.2), (40, 0.5), (50, 0.3)):
        tag = save(store, step, metrics={"val/top1": top1})
        store.prune(keep, tag)
    assert store.tags() == ["step-00000020", "step-00000030", "step-00000050"]


@pytest.mark.parametrize("damage", [truncate, _flip_in_manifest, lambda d: (d / "manifest.json").unlink()])
def test_a_damaged_tag_does_not_count_among_the_newest(store, damage):
    for step in (10, 20, 30):
        save(store, step)
    damage(store.path("step-00000020"))
    assert store.prune(TWO, "step-00000030") == []
    save(store, 40)
    assert store.prune(TWO, "step-00000040") == ["step-00000010", "step-00000020"]


def test_a_tag_newer_than_the_sound_one_neither_counts_nor_goes(store):
    for step in (10, 20, 30, 40):
        save(store, step)
    flip_a_bit(store.path("step-00000040"))  # of which sizes tell nothing
    assert store.prune(TWO, "step-00000030") == ["step-00000010"]
    assert store.newest_valid()[0] == "step-00000030"


def test_a_pinned_tag_stays(store, caplog):
    for step in (10, 20, 30):
        save(store, step)
    pin_branch(store.path("step-00000010"))
    assert store.prune(CheckpointSection(keep_last=1), "step-00000030") == ["step-00000020"]
    assert read_sound(store, "step-00000010").step == 10
    pin_branch(store.path("step-00000020"))
    assert "step-00000020: cannot be pinned (No such file or directory)" in caplog.text
    (store.path("step-00000010") / "keep").unlink()
    assert store.prune(CheckpointSection(keep_last=1), "step-00000030") == ["step-00000010"]


def test_what_cut_off_saves_left_goes_and_what_another_save_is_at_stays(store):
    for step, generation in ((30, 1), (20, 2), (25, 2), (30, 2), (40, 3), (10, 3)):
        staging = store.staging(step, generation)
        (staging / rank_file_name(0)).write_bytes(b"half")
    (store.root / ".tmp-step-00000005-removed").mkdir()
    tag = store.commit(*stage(store, 25, 2))
    assert store.tags() == [tag]
    assert store.newest_valid()[0] == tag
    gone = store.prune(TWO, tag)
    assert gone == [".tmp-step-00000005-removed", ".tmp-step-00000020-g2", ".tmp-step-00000030-g1"]
    # Other ranks may have begun the next save, and a newer start its own.
    assert store.unfinished() == [".tmp-step-00000010-g3", ".tmp-step-00000030-g2", ".tmp-step-00000040-g3"]


def test_a_tag_that_is_committed_while_another_process_looks_is_not_touched(store, monkeypatch):
    for step in (10, 20, 30):
        save(store, step)
    look = CheckpointStore.manifests

    def look_and_save(self):
        found = look(self)
        save(store, 40)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointStore, "manifests", look_and_save)
        assert store.newest_valid()[0] == "step-00000030"
        shutil.rmtree(store.path("step-00000040"))
        assert store.prune(CheckpointSection(keep_last=1), "step-00000030") == ["step-00000010", "step-00000020"]
    assert store.newest_valid()[0] == "step-00000040"


def test_what_cannot_be_removed_is_told_and_left(store, monkeypatch, caplog):
    for step in (10, 20, 30):
        save(store, step)

    def refuse(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        assert store.prune(TWO, "step-00000030") == []
    assert "step-00000010: cannot be removed: Device or resource busy: tried again after the next save" in caplog.text
    assert store.prune(TWO, "step-00000030") == [".tmp-step-00000010-removed"]

    def gone(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    save(store, 40)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        caplog.clear()
        patched.setattr(shutil, "rmtree", gone)
        assert store.prune(TWO, "step-00000040") == []
    assert not caplog.records


def _no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Cut(BaseException):
    """The power goes."""


@contextmanager
def cut_at(monkeypatch, count: int, failure: BaseException) -> Iterator[list[str]]:
    """Let the first `count` effects on the disk happen and fail at the next; names those that happened."""
    happened: list[str] = []

    def counted(name, effect):
        def call(*arguments, **keywords):
            if len(happened) == count:
                raise failure
            happened.append(f"{name} {Path(str(arguments[0])).name}")
            return effect(*arguments, **keywords)

        return call

    with monkeypatch.context() as patched:
        for owner, names in ((os, ("fsync", "unlink", "rmdir")), (Path, ("rename", "replace", "write_text"))):
            for name in names:
                patched.setattr(owner, name, counted(name, getattr(owner, name)))
        yield happened


@pytest.mark.parametrize("failure", [_Cut(), OSError(errno.ENOSPC, "No space left on device")], ids=["cut", "full"])
@pytest.mark.fault(4, 5)
def test_a_save_that_is_cut_at_any_instant_leaves_the_old_tags_and_a_pointer_to_a_sound_one(
    tmp_path, monkeypatch, failure
):
    outcomes = []
    for count in range(30):
        store = CheckpointStore(tmp_path / str(count))
        save(store, 10)
        save(store, 20)
        flip_a_bit(store.path("step-00000020"))  # the run fell back and comes by the same step again
        staging, manifest = stage(store, 20, generation=2)
        try:
            with cut_at(monkeypatch, count, failure) as happened:
                tag = store.commit(staging, manifest)
                store.prune(CheckpointSection(keep_last=1), tag)
        except type(failure):
            pass
        else:
            outcomes.append("done")
            if outcomes[-2:] == ["done", "done"]:
                break
            continue
        newest, found, _ = store.newest_valid()
        outcomes.append(newest)
        assert (newest, found.generation) in {("step-00000010", 1), ("step-00000020", 2)}, happened
        assert pointer(store).read_text().strip() in {"step-00000010", "step-00000020"}
        # The next save and its pruning clear up.
        tag = save(store, 30, generation=3)
        store.prune(CheckpointSection(keep_last=1), tag)
        assert store.tags() == ["step-00000030"]
        assert store.unfinished() == []
    assert {"step-00000010", "step-00000020", "done"} == set(outcomes)


def test_the_order_of_a_commit(store, monkeypatch):
    staging, manifest = stage(store, 10)
    with cut_at(monkeypatch, 100, _Cut()) as happened:
        store.commit(staging, manifest)
    names = [entry.split()[0] for entry in happened]
    # Manifest, its directory entry, the tag's name, and only then the pointer: each flushed before the next.
    assert names == ["write_text", "fsync", "fsync", "rename", "fsync", "fsync", "replace", "fsync"]


def test_a_metric_that_is_no_number_survives(store):
    save(store, 10, metrics={"val/loss": float("nan"), "val/top1": float("inf")})
    assert read_sound(store, "step-00000010").metrics["val/top1"] == float("inf")


def test_locate_takes_a_run_or_a_tag_and_says_what_it_passes_over(store, tmp_path, caplog):
    save(store, 10)
    save(store, 20)
    assert locate(store.root.parent)[1].step == 20
    assert locate(store.path("step-00000010"))[1].step == 10
    truncate(store.path("step-00000020"))
    assert locate(store.root.parent)[1].step == 10
    assert "passing over a checkpoint" in caplog.text
    with pytest.raises(CheckpointError, match=r"bytes where .*: restore it from a copy, or take another checkpoint$"):
        locate(store.path("step-00000020"))
    (tmp_path / "step-00000030").symlink_to("step-00000030")
    for nothing in (tmp_path, tmp_path / "step-00000030", tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"no checkpoint here|cannot be read: Too many levels"):
            locate(nothing)


def test_locate_tells_a_tag_that_may_not_be_looked_at(store, monkeypatch):
    save(store, 10)

    def refuse(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(CheckpointError, match="step-00000010: cannot be read: Permission denied"):
        locate(store.path("step-00000010"))


def test_locate_checks_the_directory_that_it_gives_wherever_it_lies_and_however_it_is_named(
    store, tmp_path, monkeypatch
):
    save(store, 10)
    copy = store.root.parent / "copies" / "step-00000010"
    shutil.copytree(store.path("step-00000010"), copy)
    assert locate(copy) == (copy, store.manifest("step-00000010"))
    shutil.move(copy, tmp_path)
    copy = tmp_path / "step-00000010"
    (tmp_path / "link").symlink_to(copy)
    monkeypatch.chdir(copy)
    for name in (copy, Path(), Path("../step-00000010"), tmp_path / "link"):
        assert locate(name)[0] == copy
    pin_branch(locate(Path())[0])
    assert (copy / "keep").exists()
    assert not store.is_pinned("step-00000010")
    copies = store.root.parent / "copies"
    shutil.move(copy, copies)
    flip_a_bit(copies / "step-00000010")
    with pytest.raises(CheckpointError, match=r"copies/step-00000010/rank-00001\.safetensors: its SHA-256"):
        locate(copies / "step-00000010")
    shutil.move(copies / "step-00000010", copies / "step-00000020")
    with pytest.raises(CheckpointError, match="copies/step-00000020: holds the checkpoint of step 10"):
        locate(copies / "step-00000020")


def test_a_manifest_without_files_is_sound(store):
    staging = store.staging(10, 1)
    store.commit(staging, manifest_of(10))
    assert store.faults("step-00000010") == []
