"""What the trainer takes over at its start: where a checkpoint stands, and the records of the steps before."""

from types import SimpleNamespace

import pytest
import torch

from vitscale.config import GuardSection
from vitscale.data.batch import Cursor
from vitscale.errors import CheckpointError, RunDirectoryError
from vitscale.ranks.groups import Ranks
from vitscale.train.guard import StepGuard
from vitscale.train.loop import Trainer
from vitscale.train.saving import Progress

CURSOR = {"position": 40, "dataset": "d", "seed": 0, "lanes": 4, "block": 4}


@pytest.mark.parametrize(
    ("cursor", "course"),
    [
        ({}, {}),
        (CURSOR | {"position": "x"}, {}),
        (CURSOR | {"more": 1}, {}),
        (CURSOR, {"detours": 5}),
        (CURSOR, {"detours": [[1]]}),
        (CURSOR, {"guard": [1]}),
    ],
)
def test_a_manifest_that_does_not_say_where_the_run_stands_is_refused(cursor, course):
    source = SimpleNamespace(cursor=lambda position: Cursor(position, "d", 0, 4, 4), name="digits")
    timeline = SimpleNamespace(images_at=lambda step: 8 * step)
    trainer = SimpleNamespace(
        blueprint=SimpleNamespace(source=source, timeline=timeline), guard=StepGuard(GuardSection())
    )
    with pytest.raises(CheckpointError, match="the manifest of step 5 does not say where the run stands in its data: "):
        Trainer.follow(trainer, Progress(5, course=course), cursor)
    Trainer.follow(trainer, Progress(5), CURSOR)
    assert (trainer.saved_step, trainer.course.images_seen(6)) == (5, 48)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples/rank-00000.jsonl"])
def test_records_that_cannot_be_opened_are_told(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    trainer = SimpleNamespace(ranks=ranks, directory=tmp_path, progress=Progress(5))
    with pytest.raises(RunDirectoryError, match=rf"the records of its steps cannot be opened: .*{name}': mend it"):
        Trainer.open_records(trainer)
