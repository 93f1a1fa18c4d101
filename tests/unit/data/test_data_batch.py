import json
from dataclasses import replace

import pytest
from micro_data import mixture_of

from vitscale.config import DataSection
from vitscale.data.batch import Cursor, check_cursor
from vitscale.errors import CheckpointError


def test_cursor_travels_through_json() -> None:
    cursor = Cursor(position=96, dataset="ab", seed=1, lanes=4, block=3)
    assert Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor


def test_a_cursor_of_another_order_is_refused(section: DataSection) -> None:
    mixture = mixture_of(section, seed=1)
    cursor = Cursor(position=96, dataset=mixture.hash, seed=1, lanes=4, block=3)
    check_cursor(cursor, mixture.cursor(96), mixture.name)
    for field, key in (
        ("seed", "run.seed"),
        ("lanes", "data.lanes"),
        ("block", "data.block"),
        ("repeats", "data.augment.repeats"),
    ):
        with pytest.raises(CheckpointError, match=f"{key} is .*: set {key}=9$"):
            check_cursor(replace(cursor, **{field: 9}), mixture.cursor(96), mixture.name)
    with pytest.raises(CheckpointError, match="not the data the checkpoint was trained on"):
        check_cursor(replace(cursor, dataset="0" * 64), mixture.cursor(96), mixture.name)
