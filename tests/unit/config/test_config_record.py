"""vitscale/config/record.py: what a later start may change."""

import pytest
import yaml
from micro_run import micro_tree

from vitscale.config import Config, check_recorded
from vitscale.errors import RunDirectoryError


@pytest.fixture
def tree(tmp_path):
    return micro_tree(tmp_path / "data", tmp_path / "run")


@pytest.fixture
def recorded(tree, tmp_path):
    """RUN/config.yaml, as a start leaves it."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(Config.model_validate(tree).model_dump(mode="json")))
    return file


def changed(tree, **run):
    return Config.model_validate(tree | {"run": tree["run"] | run})


def test_without_a_record_anything_goes(tree, tmp_path):
    check_recorded(tmp_path / "none.yaml", changed(tree, seed=7))


def test_the_same_config_goes_on(tree, recorded):
    check_recorded(recorded, Config.model_validate(tree))


def test_changed_keys_are_named_and_can_be_allowed(tree, recorded):
    with pytest.raises(RunDirectoryError, match=r"differs in run.seed: choose .* --allow-change run.seed"):
        check_recorded(recorded, changed(tree, seed=7))
    check_recorded(recorded, changed(tree, seed=7), ["run.seed"])
    with pytest.raises(RunDirectoryError, match=r"differs in run.branch_from: "):
        check_recorded(recorded, changed(tree, seed=7, branch_from="x"), ["run.seed"])


def test_keys_that_are_newer_than_the_record_have_their_defaults_in_it(tree, recorded):
    old = yaml.safe_load(recorded.read_text())
    del old["watchdog"]
    recorded.write_text(yaml.safe_dump(old))
    check_recorded(recorded, Config.model_validate(tree))


@pytest.mark.parametrize("content", [b"", b"[1]", b"nonsense", b"\xff\xfe", b"[" * 2_000, b"a: 2026-13-01"])
def test_a_damaged_record_is_named_with_the_mend(tree, recorded, content):
    recorded.write_bytes(content)
    with pytest.raises(
        RunDirectoryError, match=rf"^{recorded}: .*: put back what .*or remove the file to go on"
    ) as told:
        check_recorded(recorded, Config.model_validate(tree))
    assert "\n" not in str(told.value)


def test_keys_that_are_gone_are_named(tree, recorded):
    old = yaml.safe_load(recorded.read_text())
    recorded.write_text(yaml.safe_dump(old | {"gone": 1}))
    with pytest.raises(RunDirectoryError, match="differs in gone: "):
        check_recorded(recorded, Config.model_validate(tree))
