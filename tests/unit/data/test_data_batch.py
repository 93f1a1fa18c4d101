import json
from dataclasses import replace
from pathlib import Path

import pytest

from vitscale.data.batch import Cursor, check_cursor
from vitscale.data.index import open_split
from vitscale.errors import CheckpointError


def test_cursor_travels_through_json() -> None:
    cursor = Cursor(position=96, dataset="ab", seed=1, lanes=4, block=3)
    assert Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor


def test_a_cursor_of_another_order_is_refused(dataset: Path) -> None:
    index = open_split(dataset, "train")
    cursor = Cursor(position=96, dataset=index.hash, seed=1, lanes=4, block=3)
    check_cursor(cursor, index, seed=1, lanes=4, block=3)
    for field, key in (("seed", "run.seed"), ("lanes", "data.lanes"), ("block", "data.block")):
        with pytest.raises(CheckpointError, match=f"{key} is .*: set {key}=9$"):
            check_cursor(replace(cursor, **{field: 9}), index, seed=1, lanes=4, block=3)
    with pytest.raises(CheckpointError, match="not the data the checkpoint was trained on"):
        check_cursor(replace(cursor, dataset="0" * 64), index, seed=1, lanes=4, block=3)
