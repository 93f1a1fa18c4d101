import copy
import math

import pytest
from config_cases import MINIMAL, changed
from pydantic import ValidationError

from vitscale.config import parse_config
from vitscale.errors import ConfigError


def test_nothing_changes_after_load():
    config = parse_config(MINIMAL, source="here")
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.peak_lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.optim = config.optim


def test_a_config_survives_the_way_through_plain_values():
    config = parse_config(changed(optim={"betas": [0.9, 0.95]}, run={"dir": "runs/a"}), source="here")
    assert parse_config(config.model_dump(mode="json"), source="here") == config


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        (
            "loss",
            {"kind": "sigmoid", "distill": {"teacher": "t", "kind": "soft"}},
            "loss: distill.kind soft compares softmax probabilities, kind=sigmoid trains other ones",
        ),
        ("loss", {"distill": {"teacher": "t", "tau": 3}}, "loss.distill: tau 3.0 has no effect with kind=hard"),
        (
            "engine",
            {"kind": "torch", "deepspeed_overrides": {"a": 1}},
            "engine.deepspeed_overrides has no effect with engine.kind=torch: remove it",
        ),
        ("model", {"num_classes": 0}, "model.num_classes is 0, which builds no head to train"),
        ("checkpoint", {"mirror": "runs/b"}, "checkpoint.mirror: 'runs/b' is no URL of an object store: begin it with"),
        ("checkpoint", {"mirror": "s3://"}, "checkpoint.mirror: 's3://' is no URL of an object store"),
        ("checkpoint", {"mirror": "s3://me:it@b"}, "checkpoint.mirror: credentials belong into the environment"),
        ("data", {"crop_scale": [0.5, 0.25]}, "data: crop_scale [0.5, 0.25]: give 0 < least <= most <= 1"),
        ("data", {"crop_scale": [0, 1]}, "data: crop_scale [0.0, 1.0]: give 0 < least <= most <= 1"),
        ("data", {"crop_ratio": [1.5, 0.5]}, "data: crop_ratio [1.5, 0.5]: give 0 < least <= most"),
        ("data", {"crop_ratio": [-1, 1]}, "data: crop_ratio [-1.0, 1.0]: give 0 < least <= most"),
        ("data", {"train": None}, "data: give exactly one of train, mix and stream"),
        ("data", {"mix": [{"path": "a", "split": "b"}]}, "data: give exactly one of train, mix and stream"),
        (
            "data",
            {"train": None, "mix": [{"path": "a", "split": "b"}, {"path": "c", "split": "b", "weight": 2}]},
            "data: mix: give a weight to every source or to none",
        ),
        (
            "data",
            {"train": None, "mix": [{"path": "a", "split": "b"}] * 3, "lanes": 2},
            "data: lanes 2 is fewer than the 3 sources of mix: raise it",
        ),
        ("data", {"std": [0.5, 0, 0.5]}, "data.std.1: Input should be greater than 0 (got 0)"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(section, values, told):
    with pytest.raises(ConfigError) as error:
        parse_config(changed(**{section: values}), source="here")
    assert str(error.value).startswith(f"here: {told}")


def test_a_budget_refuses_dropout_which_torch_would_draw_anew_in_the_backward_pass():
    engine = {"compile": True, "activation_checkpointing": "budget", "activation_budget": 0.5}
    parse_config(changed(engine=engine), source="here")
    with pytest.raises(ConfigError, match="would draw dropout anew in the backward pass: use selective"):
        parse_config(changed(engine=engine, model={"drop_rate": 0.1}), source="here")


@pytest.mark.parametrize("value", [math.inf, math.nan, "inf", ".nan"])
@pytest.mark.parametrize(("section", "key"), [("optim", "peak_lr"), ("schedule", "final_lr"), ("data", "flip")])
def test_numbers_are_finite(section, key, value):
    tree = copy.deepcopy(MINIMAL)
    tree[section][key] = value
    with pytest.raises(ConfigError, match=rf"^here: {section}\.{key}: "):
        parse_config(tree, source="here")


def test_a_ledger_of_samples_needs_an_index():
    stream = {"train": None, "stream": {"shards": "a.tar", "num_classes": 2, "samples": 9}}
    with pytest.raises(ConfigError, match=r"log\.samples names samples by their index"):
        parse_config(changed(data=stream, log={"samples": True}), source="here")


def test_sources_and_their_weights():
    data = parse_config(MINIMAL, source="here").data
    assert [(source.path, source.split) for source in data.sources] == [(data.train.path, data.train.split)]
    assert data.weights is None
    mix = [{"path": "a", "split": "b", "weight": 1}, {"path": "c", "split": "d", "weight": 3}]
    data = parse_config(changed(data={"train": None, "mix": mix}), source="here").data
    assert ([source.path for source in data.sources], data.weights) == (["a", "c"], (1.0, 3.0))
