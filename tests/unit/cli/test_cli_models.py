"""What `vitscale models` prints, and that the documentation prints the same."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from vitscale.cli.models import command
from vitscale.model import TABLE

DOCS = Path(__file__).parents[3] / "docs"


def models(*words):
    return CliRunner().invoke(command, words, catch_exceptions=False).output


def test_the_list_has_every_variant_once():
    lines = models().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(TABLE)
    assert len({len(line.rstrip()) for line in lines if line.endswith("yes")}) == 1  # the columns are aligned


def test_the_documentation_has_the_table_of_today():
    assert models("--markdown").strip() in (DOCS / "models.md").read_text(encoding="utf-8")


def test_the_detail_of_huge_has_the_published_figures():
    text = models("--detail", "vit_huge_patch14_224_in21k")
    for figure in ("660,385,363", "334.65 G forward", "1.0039 T training", "338 MB", "21 MB", "representation layer"):
        assert figure in text
    assert "ViT-H_14.npz" in text


@pytest.mark.parametrize("name", TABLE)
def test_the_parts_of_a_detail_add_up(name):
    text = models("--detail", name)
    assert text.startswith(f"{name}\n")
    *parts, total = [
        int(count.replace(",", "")) for count in re.findall(r"^  [a-zA-Z ]+? +([\d,]+)$", text, re.MULTILINE)
    ]
    assert len(parts) >= 4
    assert sum(parts) == total
