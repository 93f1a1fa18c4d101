"""TensorBoard's Custom Scalars page: a run's story from top to bottom, five groups of charts."""

import re
from collections.abc import Mapping, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, create_summary_metadata
from tensorboard.util.tensor_util import make_tensor_proto

from vitscale.telemetry import tags

Charts = Mapping[str, Sequence[str]]
"""The tags of each chart, by its title; one that ends in a slash stands for all tags that begin so."""

STORY: Mapping[str, Charts] = {
    "Learning": {
        "training loss": (tags.TRAIN_LOSS, tags.TRAIN_LOSS_EMA),
        "validation loss": (tags.VAL_LOSS, tags.VAL_AVERAGE_LOSS),
        "validation accuracy": (tags.VAL_TOP1, tags.VAL_TOP5, tags.VAL_AVERAGE_TOP1, tags.VAL_AVERAGE_TOP5),
    },
    "Rate": {
        "images a second": (tags.PERF_IMAGES_PER_S,),
        "model FLOPs utilization": (tags.PERF_MFU, tags.PERF_EXECUTED_MFU),
    },
    "Step": {
        "where the time goes (fractions)": (
            tags.PERF_FORWARD_FRACTION,
            tags.PERF_BACKWARD_FRACTION,
            tags.PERF_OPTIMIZER_FRACTION,
            tags.PERF_COMMUNICATION_FRACTION,
            tags.PERF_DATA_WAIT_FRACTION,
            tags.PERF_CHECKPOINT_FRACTION,
            tags.PERF_OTHER_FRACTION,
        ),
        "seconds a step": (tags.PERF_STEP_TIME_S,),
    },
    "Health": {
        "gradient norm": (tags.TRAIN_GRAD_NORM,),
        "gradient norm by part": (tags.GRAD_NORM_PARTS,),
        "update norm by part": (tags.UPDATE_NORM_PARTS,),
        "learning rate": (tags.TRAIN_LR,),
        "skipped steps, spikes, substituted samples": (
            tags.TRAIN_SKIPPED_STEPS,
            tags.TRAIN_SPIKES,
            tags.DATA_SUBSTITUTIONS,
        ),
    },
    "Machine": {
        "peak memory, bytes": (tags.MACHINE_DEVICE_PEAK_BYTES, tags.MACHINE_HOST_PEAK_BYTES),
        "lag of the slowest rank": (tags.MACHINE_SLOWEST_RANK_LAG,),
        "the slowest rank": (tags.MACHINE_SLOWEST_RANK,),
    },
}


def layout_summary(groups: Mapping[str, Charts]) -> Summary:
    """What makes the Custom Scalars plugin show these groups of charts."""
    layout = Layout(
        category=[
            Category(title=title, chart=[_chart(*chart) for chart in charts.items()])
            for title, charts in groups.items()
        ]
    )
    tensor = make_tensor_proto(layout.SerializeToString())
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, metadata=create_summary_metadata(), tensor=tensor)])


def _chart(title: str, shown: Sequence[str]) -> Chart:
    # The plugin takes regular expressions.
    patterns = [f"^{re.escape(tag)}" + ("" if tag.endswith("/") else "$") for tag in shown]
    return Chart(title=title, multiline=MultilineChartContent(tag=patterns))
