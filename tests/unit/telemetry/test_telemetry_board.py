import io

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vitscale.telemetry import STORY, TensorBoardSink, tags


def read_board(directory):
    board = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    return board


def test_tensorboard_reads_what_was_written_before_the_file_is_closed(tmp_path):
    sink = TensorBoardSink(tmp_path / "board")
    sink.write(10, {"train/loss": 2.5, "train/lr": 0.125})
    sink.write(20, {"train/loss": 1.5})
    board = read_board(tmp_path / "board")
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(10, 2.5), (20, 1.5)]
    assert [(e.step, e.value) for e in board.Scalars("train/lr")] == [(10, 0.125)]
    sink.close()


def test_tensorboard_reads_the_files_of_two_starts_as_one_run(tmp_path):
    for step in (1, 2):
        sink = TensorBoardSink(tmp_path)
        sink.write(step, {"train/loss": float(step)})
        sink.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert [(e.step, e.value) for e in read_board(tmp_path).Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]


def test_tensorboard_finds_hparams_and_texts(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.hparams({"peak_lr": 0.5, "model": "vit_huge_patch14_224", "zero_stage": 2})
    sink.text("config", "*model*: huge")
    sink.write(1, {"train/loss": 1.0})
    sink.text("later", "second")
    sink.write(2, {"train/loss": 1.0})
    sink.close()
    board = read_board(tmp_path)
    assert [e.tensor_proto.string_val for e in board.Tensors("config")] == [[b"*model*: huge"]]
    assert [e.tensor_proto.string_val for e in board.Tensors("later")] == [[b"second"]]
    assert board.SummaryMetadata("config").plugin_data.plugin_name == "text"
    (content,) = board.PluginTagToContent("hparams").values()
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["peak_lr"].number_value == 0.5
    assert hparams["model"].string_value == "vit_huge_patch14_224"
    assert hparams["zero_stage"].number_value == 2


def test_tensorboard_sink_without_metrics_writes_nothing(tmp_path):
    sink = TensorBoardSink(tmp_path / "board")
    sink.hparams({"seed": 0})
    sink.flush()
    sink.close()
    assert not (tmp_path / "board").exists()


def png(height, width):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_tensorboard_finds_pictures_with_their_size(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step, picture in ((4, png(5, 300)), (8, png(7, 70000))):
        sink.images(step, "pictures/predictions", picture)
    board = read_board(tmp_path)
    assert board.SummaryMetadata("pictures/predictions").plugin_data.plugin_name == "images"
    assert [(e.step, list(e.tensor_proto.string_val)) for e in board.Tensors("pictures/predictions")] == [
        (4, [b"300", b"5", png(5, 300)]),
        (8, [b"70000", b"7", png(7, 70000)]),
    ]


def read_layout(board):
    (event,) = board.Tensors("custom_scalars__config__")
    return Layout.FromString(event.tensor_proto.string_val[0])


def test_tensorboard_finds_the_layout(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.layout({"Learning": {"loss": ("train/loss", "val/loss")}, "Health": {"norms": ("grad_norm/",)}})
    sink.write(1, {"train/loss": 1.0})
    board = read_board(tmp_path)
    assert board.SummaryMetadata("custom_scalars__config__").plugin_data.plugin_name == "custom_scalars"
    found = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in read_layout(board).category
    }
    assert found == {
        "Learning": {"loss": ["^train/loss$", "^val/loss$"]},
        "Health": {"norms": ["^grad_norm/"]},
    }


def test_the_story_tells_of_all_that_a_run_measures():
    shown = {tag for charts in STORY.values() for chart in charts.values() for tag in chart}
    known = {value for name, value in vars(tags).items() if name.isupper()}
    assert shown <= known
    # What is left to the Scalars page.
    assert {tag for tag in known - shown if not tag.startswith("pictures/")} == {
        tags.TRAIN_IMAGES_SEEN,
        tags.TRAIN_EPOCH,
        tags.PERF_PAUSE_S,
        tags.DATA_READY_BATCHES,
        tags.DATA_READ_BYTES_PER_S,
        tags.DATA_READ_AMPLIFICATION,
        tags.MACHINE_SLOWEST_RANK_STEP_S,
        tags.WEIGHT_NORM_PARTS,
    }
    assert list(STORY) == ["Learning", "Rate", "Step", "Health", "Machine"]
