"""launch/sweep.py: the points of a sweep, their names and configs, and every refusal."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import draw_points, name_point, split_values

from vitscale.config import load_config
from vitscale.errors import ConfigError, LaunchError

CONFIG = """
run: {dir: runs/base}
model: {name: vit_tiny_patch16_224, num_classes: 2}
data: {train: {path: shards, split: train}}
batch: {global_batch: 8, micro_batch: 2}
optim: {peak_lr: 1e-3}
schedule: {length: 10}
"""
values = st.recursive(
    st.integers() | st.text("abc, ", min_size=1), lambda inner: st.lists(inner) | st.dictionaries(st.just("k"), inner)
)


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path / "run.yaml"


@settings(max_examples=30)
@given(st.lists(values, min_size=1, max_size=5))
def test_values_that_yaml_writes_in_one_line_are_told_apart(written):
    texts = [yaml.safe_dump(v, default_flow_style=True, default_style='"', width=1e9).strip() for v in written]
    assert [yaml.safe_load(part) for part in split_values(",".join(texts))] == [yaml.safe_load(t) for t in texts]


def test_without_a_sweep_there_is_one_point(config):
    (point,) = draw_points(config, ["optim.peak_lr=2e-3"], [])
    assert point.config == load_config(config, ["optim.peak_lr=2e-3"])
    assert point.run_dir == Path("runs/base")


def test_sweeps_are_multiplied_and_a_files_items_stay_together(config, tmp_path):
    (tmp_path / "shapes.yaml").write_text(
        "- {model.depth: 6, model.embed_dim: 96}\n- {model.depth: 12}\n- {schedule.phases: '[]'}"
    )
    sweeps = ["optim.peak_lr=1e-3,3e-3", str(tmp_path / "shapes.yaml")]
    points = draw_points(config, ["run.seed=7"], sweeps)
    found = [
        (str(p.run_dir), p.config.optim.peak_lr, p.config.model.depth, p.config.model.embed_dim, p.config.run.seed)
        for p in points
    ]
    assert found == [
        ("runs/base/optim.peak_lr-1e-3_model.depth-6_model.embed_dim-96", 1e-3, 6, 96, 7),
        ("runs/base/optim.peak_lr-1e-3_model.depth-12", 1e-3, 12, None, 7),
        ("runs/base/optim.peak_lr-1e-3_schedule.phases", 1e-3, None, None, 7),
        ("runs/base/optim.peak_lr-3e-3_model.depth-6_model.embed_dim-96", 3e-3, 6, 96, 7),
        ("runs/base/optim.peak_lr-3e-3_model.depth-12", 3e-3, 12, None, 7),
        ("runs/base/optim.peak_lr-3e-3_schedule.phases", 3e-3, None, None, 7),
    ]


@given(st.text(max_size=400))
def test_a_name_is_one_folder_whatever_the_value(value):
    name = name_point([f"a.b={value}"])
    assert name.startswith("a.b")
    assert Path("x", name).parent == Path("x")
    assert len(name) <= 200


def test_a_point_that_cannot_be_is_named(config):
    with pytest.raises(ConfigError, match=r"optim.peak_lr=fast .*: optim.peak_lr: .*valid number"):
        draw_points(config, [], ["optim.peak_lr=1e-3,fast"])


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("optim.peak_lr=", "--sweep optim.peak_lr=: write section.key=value,value"),
        ("optim.peak_lr=1,,2", "--sweep optim.peak_lr=1,,2: write section.key=value,value"),
        ("=1,2", "--sweep =1,2: write section.key=value,value"),
        ("run.dir=a,b", "--sweep run.dir=a,b: each point gets a run directory of its own: leave run.dir out"),
        ("optim.peak_lr=1e-3,1e-3", "--sweep: two points have the run directory runs/base/optim.peak_lr-1e-3"),
        ("none.yaml", "--sweep none.yaml: No such file or directory: write section.key=value,value or a YAML file"),
    ],
)
def test_what_is_no_sweep(config, sweep, message):
    with pytest.raises(LaunchError, match=message):
        draw_points(config, [], [sweep])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.peak_lr: 1e-3", "no list of mappings from keys to values"),
        ("- optim.peak_lr=1e-3", "no list of mappings from keys to values"),
        ("- {optim: {peak_lr: 1e-3}}", "no list of mappings from keys to values"),
        ("[]", "write section.key=value,value or the name of a YAML file"),
        ("- {a: 1", "not valid YAML: "),
    ],
)
def test_a_file_that_is_no_sweep(config, tmp_path, text, message):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(LaunchError, match=f"sweep.yaml: {message}"):
        draw_points(config, [], [str(tmp_path / "sweep.yaml")])
