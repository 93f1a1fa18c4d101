"""The store: what exists, what is refused, and that nothing half-written is ever taken."""

import json
import os
from pathlib import Path

import pytest
import torch

from vitscale.checkpoint import CheckpointStore, Manifest, locate, rank_file_name, record_file, write_fragments
from vitscale.engine import MASTER, Fragment
from vitscale.errors import CheckpointError


def manifest(step: int, generation: int = 1, files=()) -> Manifest:
    return Manifest(
        step=step, generation=generation, world_size=1, optimizer_steps=step, cursor={"position": step}, config={},
        model={}, labels=[], shapes={"w": [4]}, metrics={}, versions={}, saved_at="", files=list(files),
    )  # fmt: skip


def commit(store: CheckpointStore, step: int, generation: int = 1) -> str:
    staging = store.staging(step, generation)
    path = staging / rank_file_name(0)
    write_fragments([Fragment("w", 0, {MASTER: torch.full((4,), float(step))}, True)], path)
    return store.commit(staging, manifest(step, generation, [record_file(path)]))


def test_the_newest_tag_by_step_is_taken(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.newest_valid() is None
    for step in (9, 100, 20):
        commit(store, step)
    tag, found, passed_over = store.newest_valid()
    assert (tag, found.step, passed_over) == ("step-00000100", 100, [])


def test_a_save_that_was_cut_off_is_no_checkpoint_and_is_pruned(tmp_path):
    store = CheckpointStore(tmp_path)
    commit(store, 10)
    staging = store.staging(20, 1)
    (staging / rank_file_name(0)).write_bytes(b"half")
    assert store.tags() == ["step-00000010"]
    assert store.prune(keep_last=2) == [staging.name]
    assert not staging.exists()


def test_prune_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        commit(store, step)
    store.prune(keep_last=2)
    assert store.tags() == ["step-00000020", "step-00000030"]


def _truncate(directory: Path) -> None:
    path = directory / rank_file_name(0)
    os.truncate(path, path.stat().st_size - 1)


def _flip_a_bit(directory: Path) -> None:
    path = directory / rank_file_name(0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _flip_in_manifest(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"optimizer_steps": 20', '"optimizer_steps": 21'))


def _rewrite_schema(directory: Path) -> None:
    from vitscale.checkpoint.manifest import _digest

    path = directory / "manifest.json"
    body = json.loads(path.read_text())["manifest"] | {"schema_version": 99}
    path.write_text(json.dumps({"sha256": _digest(body), "manifest": body}))


def _wrong_field(directory: Path) -> None:
    from vitscale.checkpoint.manifest import _digest

    path = directory / "manifest.json"
    body = json.loads(path.read_text())["manifest"] | {"step": "many"}
    path.write_text(json.dumps({"sha256": _digest(body), "manifest": body}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "bytes where"),
        (_flip_a_bit, "SHA-256"),
        (lambda d: (d / rank_file_name(0)).unlink(), "missing"),
        (lambda d: (d / "manifest.json").unlink(), "never finished"),
        (lambda d: (d / "manifest.json").write_text("{"), "damaged"),
        (_flip_in_manifest, "digest does not match"),
        (_rewrite_schema, "schema 99"),
        (_wrong_field, "step"),
    ],
)
def test_a_damaged_tag_is_passed_over_by_name_and_alone_it_stops_the_run(tmp_path, damage, said):
    store = CheckpointStore(tmp_path)
    commit(store, 10)
    commit(store, 20)
    damage(store.path("step-00000020"))
    tag, _, passed_over = store.newest_valid()
    assert tag == "step-00000010"
    assert len(passed_over) == 1
    assert "step-00000020" in passed_over[0]
    assert said in passed_over[0]

    damage(store.path("step-00000010")) if damage is not _flip_in_manifest else _truncate(store.path("step-00000010"))
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is valid"):
        store.newest_valid()


def test_a_later_start_replaces_a_tag_of_the_same_step(tmp_path):
    store = CheckpointStore(tmp_path)
    commit(store, 10, generation=1)
    commit(store, 10, generation=2)
    assert store.verify("step-00000010").generation == 2


def test_locate_takes_a_run_or_a_tag(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    commit(store, 10)
    commit(store, 20)
    assert locate(tmp_path / "run")[1].step == 20
    assert locate(store.path("step-00000010"))[1].step == 10
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        locate(tmp_path)
