from pathlib import Path

from vitscale.telemetry import tags

MONITORING = Path(__file__).parents[3] / "docs" / "monitoring.md"
TAGS = {name: value for name, value in vars(tags).items() if name.isupper()}


def test_every_tag_is_explained():
    text = MONITORING.read_text(encoding="utf-8")
    unexplained = [value for value in TAGS.values() if f"`{value}" not in text]
    assert not unexplained


def test_a_name_is_its_group_and_no_tag_has_two():
    assert len(set(TAGS.values())) == len(TAGS)
    for name, value in TAGS.items():
        group, _, rest = value.partition("/")
        if rest:
            assert name.startswith({"pictures": "PICTURE"}.get(group, group.upper())), value
