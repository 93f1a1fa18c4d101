import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitscale.telemetry import STORY, JsonlSink, TensorBoardSink, draw_similarity, purge_after, purge_jsonl


def record(run_dir, steps):
    """One start of a run: metrics of these steps in both files."""
    jsonl, board = JsonlSink(run_dir / "metrics.jsonl"), TensorBoardSink(run_dir / "tensorboard")
    board.hparams({"seed": 3})
    board.text("config", "seed: 3")
    for step in steps:
        for sink in (jsonl, board):
            sink.write(step, {"train/loss": 1 / step, "train/lr": step / 8})
    jsonl.close()
    board.close()


def read_jsonl(run_dir, tag):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r[tag]) for r in map(json.loads, lines)]


def read_board(run_dir, tag):
    # purge_orphaned_data would hide records that are still in the files.
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    board.Reload()
    return [(e.step, e.value) for e in board.Scalars(tag)], board


def test_a_resumed_run_has_one_value_a_step_and_tag(tmp_path):
    record(tmp_path, [2, 4, 6, 8])
    purge_after(tmp_path, 4)
    record(tmp_path, [6, 8, 10])
    purge_after(tmp_path, 6)
    record(tmp_path, [8, 10, 12])
    for tag, value in [("train/lr", lambda step: step / 8), ("train/loss", lambda step: 1 / step)]:
        wanted = [(step, value(step)) for step in (2, 4, 6, 8, 10, 12)]
        assert read_jsonl(tmp_path, tag) == wanted
        scalars, _ = read_board(tmp_path, tag)
        assert [step for step, _ in scalars] == [step for step, _ in wanted]
        assert [v for _, v in scalars] == pytest.approx([v for _, v in wanted], rel=1e-7)  # stored as float32


def test_hparams_and_texts_survive(tmp_path):
    record(tmp_path, [1, 2])
    purge_after(tmp_path, 0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == []
    assert [e.tensor_proto.string_val for e in board.Tensors("config")] == [[b"seed: 3"]]
    assert list(board.PluginTagToContent("hparams")) == ["_hparams_/session_start_info"]


def test_pictures_are_purged_with_their_step_and_the_layout_stays(tmp_path):
    png = draw_similarity(np.ones((1, 1, 4), dtype=np.float32))
    for steps in ([2, 4, 6], [6, 8]):
        board = TensorBoardSink(tmp_path / "tensorboard")
        board.layout(STORY)
        for step in steps:
            board.write(step, {"val/top1": step / 8})
            board.images(step, "pictures/predictions", png)
        board.close()
        purge_after(tmp_path, 4 if steps[0] == 2 else 6)
    scalars, board = read_board(tmp_path, "val/top1")
    assert [step for step, _ in scalars] == [2, 4, 6]
    assert [e.step for e in board.Tensors("pictures/predictions")] == [2, 4, 6]
    assert {e.tensor_proto.string_val[2] for e in board.Tensors("pictures/predictions")} == {png}
    layouts = [e.tensor_proto.string_val[0] for e in board.Tensors("custom_scalars__config__")]
    assert len(layouts) == 2
    assert len(set(layouts)) == 1


def test_files_with_nothing_beyond_the_step_are_not_rewritten(tmp_path):
    record(tmp_path, [1, 2])
    files = [tmp_path / "metrics.jsonl", *(tmp_path / "tensorboard").iterdir()]
    before = [(file.stat().st_ino, file.read_bytes()) for file in files]
    purge_after(tmp_path, 2)
    assert [(file.stat().st_ino, file.read_bytes()) for file in files] == before


def test_a_fresh_run_directory_has_nothing_to_purge(tmp_path):
    purge_after(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_nothing_temporary_is_left_beside_the_files(tmp_path):
    record(tmp_path, [1, 2])
    before = sorted(tmp_path.rglob("*"))
    purge_after(tmp_path, 1)
    assert sorted(tmp_path.rglob("*")) == before


@settings(max_examples=30)
@given(cut_bytes=st.integers(min_value=1, max_value=150))
def test_a_killed_writer_costs_only_the_records_it_cut(tmp_path_factory, cut_bytes):
    run_dir = tmp_path_factory.mktemp("run")
    record(run_dir, [1, 2, 3, 4])
    (event_file,) = (run_dir / "tensorboard").iterdir()
    for path in (event_file, run_dir / "metrics.jsonl"):
        path.write_bytes(path.read_bytes()[:-cut_bytes])
    whole_lines = (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    whole_records = [step for step, _ in read_board(run_dir, "train/lr")[0]]
    assert 0 < whole_lines < 4
    assert 0 < len(whole_records) < 4

    purge_after(run_dir, 4)
    assert [step for step, _ in read_jsonl(run_dir, "train/lr")] == [1, 2, 3, 4][:whole_lines]
    assert [step for step, _ in read_board(run_dir, "train/lr")[0]] == whole_records
    purge_after(run_dir, 1)
    record(run_dir, [2, 3, 4])
    assert [step for step, _ in read_jsonl(run_dir, "train/lr")] == [1, 2, 3, 4]
    assert [step for step, _ in read_board(run_dir, "train/lr")[0]] == [1, 2, 3, 4]


def test_a_line_cut_before_its_newline_is_removed_though_it_is_whole_json(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    purge_jsonl(path, 9)
    assert path.read_text() == '{"step": 1}\n'


def test_lines_that_are_no_records_are_removed(tmp_path):
    path = tmp_path / "ledger.jsonl"
    odd = [b"", b"5", b"[1]", b"{}", b'{"step": null}', b'{"step": "2"}', b"\xff", b"[" * 100_000]
    path.write_bytes(b"\n".join([*odd, b'{"step": 2}', b""]))
    purge_jsonl(path, 9)
    assert path.read_text() == '{"step": 2}\n'


def test_an_event_file_that_cannot_be_purged_is_a_warning(tmp_path, caplog):
    record(tmp_path, [1, 2, 3])
    (tmp_path / "tensorboard" / "events.out.tfevents.0").mkdir()
    purge_after(tmp_path, 1)
    (warning,) = caplog.messages
    assert "events.out.tfevents.0: cannot be purged after step 1" in warning
    assert [step for step, _ in read_jsonl(tmp_path, "train/lr")] == [1]
