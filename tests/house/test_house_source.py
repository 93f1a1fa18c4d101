"""Rules of the house that ruff has no rule for."""

import ast
from pathlib import Path
from typing import get_args

import pytest

from vitscale import config

ROOT = Path(__file__).parents[2]
PACKAGES = ("vitscale", "data_tools", "launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SECTIONS = {
    name: section
    for name, section in vars(config).items()
    if isinstance(section, type) and issubclass(section, config.schema.Section)
}


def test_the_rules_see_the_sources():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert {"Config", "ModelSection", "SplitSection"} < set(SECTIONS)


def test_no_file_is_named_after_nothing():
    everywhere = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    assert not [path for path in everywhere if path.stem in {"util", "utils", "helper", "helpers", "common", "misc"}]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_short_and_has_no_hidden_import(path):
    text = path.read_text(encoding="utf-8")
    # The aim is 300; a file may grow past it for a while, not without end.
    assert text.count("\n") <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    hidden = [node.lineno for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not hidden, "imports belong to the top of the file, where the floors can be seen"
    assert "TYPE_CHECKING" not in text


def test_every_field_of_a_config_is_described():
    for name, section in SECTIONS.items():
        for field, info in section.model_fields.items():
            # A section as a field is described by its own docstring.
            assert info.description or section_in(info.annotation), f"{name}.{field}"


def section_in(annotation):
    """The section that a field of this type holds, if any."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if kind in SECTIONS.values()]
    return kinds[0] if kinds else None


def names_of_sections(tree):
    """Which identifiers hold which section: fields of other sections, and annotated names of `tree`."""
    names = {}
    for section in SECTIONS.values():
        for field, info in section.model_fields.items():
            if held := section_in(info.annotation):
                names.setdefault(field, set()).add(held)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and getattr(node.annotation, "id", None) in SECTIONS:
            name = node.arg if isinstance(node, ast.arg) else getattr(node.target, "id", None)
            names.setdefault(name, set()).add(SECTIONS[node.annotation.id])
    return names


def fields_read(tree):
    """(section, field) for every `<section>.field`; a section dumped whole is passed on with every field."""
    names = names_of_sections(tree)
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            for section in names.get(getattr(node.value, "id", getattr(node.value, "attr", None)), ()):
                dumped = node.attr == "model_dump" and section is not config.Config
                read |= {(section, field) for field in (section.model_fields if dumped else [node.attr])}
    return read | fields_of_properties(tree)


def fields_of_properties(tree):
    """What the properties of sections read of their own and of the sections they hold; others ask for the property."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name in SECTIONS]
    functions = [node for owner in classes for node in owner.body if isinstance(node, ast.FunctionDef)]
    properties = [f for f in functions if any(getattr(d, "id", None) == "property" for d in f.decorator_list)]
    attributes = {node.attr for f in properties for node in ast.walk(f) if isinstance(node, ast.Attribute)}
    return {(section, field) for section in SECTIONS.values() for field in attributes & section.model_fields.keys()}


def test_every_field_of_a_config_is_read():
    sources = [path for path in SOURCES if path != ROOT / "vitscale/config/schema.py"]
    read = set().union(*(fields_read(ast.parse(path.read_text(encoding="utf-8"))) for path in sources))
    unread = [
        f"{name}.{field}"
        for name, section in SECTIONS.items()
        for field in section.model_fields
        if (section, field) not in read and section is not config.Config
    ]
    assert not unread


def test_the_search_for_unread_fields_finds_one():
    tree = ast.parse("def f(optim: OptimSection, c: Config, path):\n    return optim.eps, c.run.seed, path.name")
    read = fields_read(tree)
    assert {(config.OptimSection, "eps"), (config.RunSection, "seed")} <= read
    assert (config.OptimSection, "name") not in read
    assert (config.RunSection, "dir") not in read
    tree = ast.parse(
        "class DataSection:\n    @property\n    def p(self):\n        return self.lanes\n    def q(self): self.block"
    )
    assert fields_read(tree) == {(config.DataSection, "lanes")}
