"""Weights & Biases; the only module that imports wandb, an extra."""

import io
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from PIL import Image

_STEP = "step"


class WandbSink:
    """One W&B run for all starts of a vitscale run, kept apart by the id in RUN/wandb_id.

    WANDB_MODE, WANDB_PROJECT (vitscale where it is not set), WANDB_ENTITY and WANDB_API_KEY are W&B's own. Steps
    that are done again after a resume are there twice: what W&B has, it keeps.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Start or resume the run; waits for the service unless WANDB_MODE=offline.

        Args:
            run_dir: the run directory; its name becomes the run's.
            config: hyperparameters to compare runs by.
        """
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vitscale"),
            id=_run_id(run_dir / "wandb_id"),
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            # The program's output and its code are the user's to send.
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        # W&B's own step may not go back, which a resumed run's does.
        self._run.define_metric("*", step_metric=_STEP)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._run.log({_STEP: step, **scalars})

    def images(self, step: int, tag: str, png: bytes) -> None:
        """See `Sink`."""
        self._run.log({_STEP: step, tag: wandb.Image(Image.open(io.BytesIO(png)))})

    def flush(self) -> None:
        """See `Sink`: nothing, W&B sends by itself."""

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


def _run_id(file: Path) -> str:
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
