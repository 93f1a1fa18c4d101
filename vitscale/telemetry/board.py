"""TensorBoard's event files."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.image.metadata import create_summary_metadata as create_image_metadata
from tensorboard.plugins.text.metadata import create_summary_metadata as create_text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from vitscale.telemetry.layout import Charts, layout_summary


class TensorBoardSink:
    """An event file for TensorBoard, one for each start of a run.

    It is opened with the first record, so that a directory that cannot be written fails in `write`, as any
    sink may. Every record is on its way to the disk when its method returns: a kill loses none.
    """

    def __init__(self, directory: Path) -> None:
        """Name the directory of the event files; it need not exist yet."""
        self._directory = directory
        self._pending: list[Summary] = []
        self._file: RecordWriter | None = None

    def hparams(self, values: Mapping[str, bool | float | int | str]) -> None:
        """Hyperparameters of the run, for TensorBoard's HParams tab; written with the next record."""
        self._pending.append(hparams_pb(dict(values)))

    def layout(self, groups: Mapping[str, Charts]) -> None:
        """Groups of charts for TensorBoard's Custom Scalars tab; written with the next record."""
        self._pending.append(layout_summary(groups))

    def text(self, tag: str, markdown: str) -> None:
        """A text for TensorBoard's Text tab; written with the next record."""
        metadata = create_text_metadata(display_name="", description="")
        value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(markdown))
        self._pending.append(Summary(value=[value]))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the metrics of a step."""
        self._record(step, Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items()]))

    def images(self, step: int, tag: str, png: bytes) -> None:
        """Append a picture."""
        width, height = struct.unpack(">II", png[16:24])  # of the header that every PNG file begins with
        tensor = make_tensor_proto([str(width).encode(), str(height).encode(), png])
        metadata = create_image_metadata(display_name="", description="")
        self._record(step, Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)]))

    def flush(self) -> None:
        """See `Sink`."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """See `Sink`."""
        if self._file is not None:
            self._file.close()

    def _record(self, step: int, summary: Summary) -> None:
        if self._file is None:
            self._file = self._open()
            self._append(self._file, Event(file_version="brain.Event:2"))
        for pending in self._pending:
            self._append(self._file, Event(summary=pending))
        self._pending.clear()
        self._append(self._file, Event(step=step, summary=summary))
        self._file.flush()

    def _open(self) -> RecordWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        return RecordWriter((self._directory / name).open("xb"))

    @staticmethod
    def _append(file: RecordWriter, event: Event) -> None:
        event.wall_time = time.time()
        file.write(event.SerializeToString())
