"""What a rank says in its log."""

import logging
import re

import pytest

from vitscale.cli.train import start_log

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.mark.parametrize(
    ("rank", "for_eyes", "lines"),
    [
        (0, True, "told\nwarned\n"),
        (0, False, f"{TIME} told\n{TIME} warned\n"),
        (3, True, "rank 3: warned\n"),
        (3, False, f"{TIME} rank 3: warned\n"),
    ],
)
def test_rank_0_tells_all_and_a_file_has_the_times(monkeypatch, capsys, rank, for_eyes, lines):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    start_log(rank, for_eyes)
    logging.getLogger("vitscale.train").info("told")
    logging.getLogger("vitscale.train").warning("warned")
    assert re.fullmatch(lines, capsys.readouterr().err)
