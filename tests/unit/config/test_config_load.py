import copy

import pytest
import yaml
from config_cases import MINIMAL, changed
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config import differing_keys, load_config, parse_config
from vitscale.errors import ConfigError


def write(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def config_file(tmp_path):
    return write(tmp_path / "digits.yaml", MINIMAL)


def refusal(path, *overrides):
    """The one line a wrong config ends in."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_values_defaults_and_the_run_directory_of_the_file(config_file):
    config = load_config(config_file)
    assert config.batch.global_batch == 64
    assert config.optim.betas == (0.9, 0.999)
    assert config.run.dir.as_posix() == "runs/digits"


def test_the_run_directory_can_be_given(config_file):
    assert load_config(config_file, ["run.dir=elsewhere/a"]).run.dir.as_posix() == "elsewhere/a"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optim.peak_lr=1e-3", lambda c: c.optim.peak_lr, 1e-3),  # to YAML a string
        ("optim.clip_norm=null", lambda c: c.optim.clip_norm, None),
        ("optim.clip_norm=", lambda c: c.optim.clip_norm, None),
        ("optim.betas=[0.9, 0.95]", lambda c: c.optim.betas, (0.9, 0.95)),
        ("engine={zero_stage: 3}", lambda c: c.engine.zero_stage, 3),
        (
            "engine.deepspeed_overrides.comms_logger.enabled=true",
            lambda c: c.engine.deepspeed_overrides,
            {"comms_logger": {"enabled": True}},
        ),
    ],
)
def test_overrides_are_yaml_values_at_dotted_keys(config_file, override, read, value):
    assert read(load_config(config_file, [override])) == value


def test_overrides_together_make_a_section(config_file):
    config = load_config(config_file, ["data.val.path=a=b", "data.val.split=val"])
    assert (config.data.val.path, config.data.val.split) == ("a=b", "val")


def test_later_bases_and_then_the_file_and_then_the_overrides_win(tmp_path):
    write(tmp_path / "parts/first.yaml", changed(run={"seed": 1}, log={"every_steps": 1}, eval={"micro_batch": 1}))
    write(tmp_path / "parts/second.yaml", {"base": "third.yaml", "log": {"every_steps": 2}, "eval": {"micro_batch": 2}})
    write(tmp_path / "parts/third.yaml", {"run": {"seed": 3}, "log": {"every_steps": 3}})
    own = {"base": ["parts/first.yaml", "parts/second.yaml"], "eval": {"micro_batch": 4}, "schedule": {"length": 4}}
    config = load_config(write(tmp_path / "own.yaml", own), ["schedule.length=5"])
    assert (config.run.seed, config.log.every_steps, config.eval.micro_batch) == (3, 2, 4)
    assert str(config.schedule.length) == "5 steps"
    assert config.batch.global_batch == 64


def test_two_files_may_share_a_base(tmp_path):
    write(tmp_path / "shared.yaml", MINIMAL)
    write(tmp_path / "a.yaml", {"base": "shared.yaml"})
    write(tmp_path / "b.yaml", {"base": "shared.yaml", "run": {"seed": 5}})
    assert load_config(write(tmp_path / "own.yaml", {"base": ["a.yaml", "b.yaml"]})).run.seed == 5


def test_a_circle_of_bases_is_named(tmp_path):
    write(tmp_path / "a.yaml", {"base": "b.yaml"})
    write(tmp_path / "b.yaml", {"base": "a.yaml"})
    assert "base leads back to this file: a.yaml -> b.yaml -> a.yaml" in refusal(tmp_path / "a.yaml")


@pytest.mark.parametrize("base", [None, 3, ["a.yaml", 3], {"a": "b"}])
def test_a_base_that_is_no_path_is_refused(tmp_path, base):
    write(tmp_path / "a.yaml", MINIMAL)
    assert "base holds paths of other configs, not " in refusal(write(tmp_path / "own.yaml", {"base": base}))


def test_a_missing_file_is_named(tmp_path, config_file):
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such config file"
    own = write(tmp_path / "own.yaml", {"base": "gone.yaml"})
    assert refusal(own) == f"{tmp_path / 'gone.yaml'}: no such config file"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}")
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read: ")
    assert refusal(tmp_path / "latin.yaml").startswith(f"{tmp_path / 'latin.yaml'}: cannot be read: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("run: [", "not valid YAML"),
        ("run: {seed: 1}\nrun: {seed: 2}", "key 'run' is given twice"),
        ("run: {seed: 1, seed: 2}", "key 'seed' is given twice"),
        ("[1, 2]: 3", "found unhashable key"),
        ("run: {dir: 2026-13-01}", "not valid YAML: month must be in 1..12"),
        ("- run", "a config is a mapping of sections, this file holds list"),
        ("", "a config is a mapping of sections, this file holds NoneType"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, reason):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert reason in message


@pytest.mark.parametrize("word", ["optim.peak_lr", "=3", "optim.=3", ".peak_lr=3", "--verbose"])
def test_an_override_that_is_no_assignment_is_refused(config_file, word):
    message = refusal(config_file, word)
    assert message == f"override {word!r}: write section.key=value, such as optim.peak_lr=1e-3"


@pytest.mark.parametrize("word", ["optim.betas=[0.9", "run.dir=2026-13-01"])
def test_an_override_that_is_no_yaml_is_refused(config_file, word):
    assert refusal(config_file, word) == f"override {word!r}: the value is not valid YAML; quote it for the shell"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.peak_rl=1", "unknown key optim.peak_rl: did you mean optim.peak_lr?"),
        ("modle.depth=1", "unknown key modle: did you mean model?"),
        ("data.train.splitt=a", "unknown key data.train.splitt: did you mean data.train.split?"),
        ("log.xyzzy=1", "unknown key log.xyzzy: known keys: every_steps, samples"),
        ("batch.global_batch=many", "batch.global_batch: Input should be a valid integer"),
        ("engine.zero_stage=4", "engine.zero_stage: Input should be 0, 1, 2 or 3 (got 4)"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1: Input should be less than 1 (got 1.0)"),
        ("data.val={split: val}", "data.val.path is missing: give it in the file or as data.val.path=VALUE"),
        ("batch=7", "batch: Input should be a valid dictionary or instance of BatchSection (got 7)"),
        ("batch.micro_batch=3", "batch.micro_batch: images come in pairs: use an even number, such as 4 (got 3)"),
        ("schedule.phases=[{until: 50 %, global_batch: 7}]", "0.global_batch: images come in pairs"),
        ("schedule.epochs=2", "unknown key schedule.epochs: "),
        ("schedule.length=null", "schedule.length: give a number of steps, or a text such as 90 epochs"),
        ("schedule.phases=[{until: 50 %, px: 1}]", "unknown key schedule.phases.0.px: known keys: until, img_size"),
    ],
)
def test_a_wrong_key_or_value_is_told_with_its_place_and_the_mend(config_file, override, told):
    message = refusal(config_file, override)
    assert message.startswith(f"{config_file} {override}: ")
    assert told in message


@pytest.mark.parametrize("missing", sorted(MINIMAL))
def test_a_missing_section_is_named(missing):
    tree = {key: value for key, value in MINIMAL.items() if key != missing}
    with pytest.raises(ConfigError, match=rf"^here: {missing} is missing: give it in the file or as {missing}=VALUE$"):
        parse_config(tree, source="here")


def test_of_many_problems_the_misspelt_key_is_told_and_the_others_are_counted():
    tree = changed(optim={"peak_rl": 1})
    del tree["optim"]["peak_lr"], tree["schedule"]
    with pytest.raises(ConfigError, match=r"^here: unknown key optim\.peak_rl: did you mean .* \(and 2 more\)$"):
        parse_config(tree, source="here")


trees = st.recursive(
    st.integers() | st.none() | st.lists(st.integers(), max_size=2),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3),
)


def leaves(tree, prefix=""):
    """Values by dotted key; a mapping that holds nothing counts as a value."""
    found = {}
    for key, value in tree.items():
        below = leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        found |= below or {f"{prefix}{key}": value}
    return found


@given(st.dictionaries(st.sampled_from("abc"), trees, max_size=3))
def test_a_tree_differs_from_itself_in_nothing(tree):
    assert differing_keys(tree, copy.deepcopy(tree)) == []


@given(st.dictionaries(st.sampled_from("abc"), trees, max_size=3), st.data())
def test_a_changed_leaf_is_the_one_key_that_differs(tree, data):
    by_key = leaves(tree)
    if not by_key:
        return
    dotted = data.draw(st.sampled_from(sorted(by_key)))
    other = copy.deepcopy(tree)
    *parents, last = dotted.split(".")
    below = other
    for key in parents:
        below = below[key]
    below[last] = "changed"
    assert differing_keys(tree, other) == [dotted]
    assert differing_keys(other, tree) == [dotted]


def test_keys_of_either_side_are_compared_and_absence_equals_null():
    assert differing_keys({"a": {"x": 1}, "b": 2}, {"a": {"y": 1, "x": 1}, "c": 3, "d": None}) == ["a.y", "b", "c"]
