"""The second sink: a service beside RUN/metrics.jsonl and TensorBoard, each an extra to install."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vitscale.errors import ConfigError
from vitscale.telemetry.background import BackgroundSink
from vitscale.telemetry.sinks import Sink

SecondSink = Literal["wandb"]


def check_second_sink(name: SecondSink | None) -> None:
    """Make sure that the client library of a second sink is installed.

    Raises:
        ConfigError: it is not.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise ConfigError(f"log.second_sink={name}: {name} is not installed: pip install 'vitscale[{name}]'")


def open_second_sink(name: SecondSink, run_dir: Path, config: Mapping[str, Any]) -> Sink:
    """The sink, behind a thread: no step waits for the service, and its failure is a warning.

    Args:
        name: which one.
        run_dir: the run directory.
        config: hyperparameters to compare runs by.
    """

    def opened() -> Sink:
        # Its client is an extra that most runs do without.
        sink: Sink = importlib.import_module(f"vitscale.telemetry.{name}_sink").WandbSink(run_dir, config)
        return sink

    return BackgroundSink(opened)
