"""Fixtures that many tests share."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import torch
import yaml
from builder_command import succeeded, vitscale_data
from micro_run import micro_tree, write_class_tars

from vitscale.config.cache import CACHE_VARIABLE

torch.set_num_threads(1)
# A deadline would make every property a timed test, which fails where the machine is slow or busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory) -> Iterator[None]:
    """A cache of the tests' own, for them and for every process they start."""
    with mock.patch.dict(os.environ, {CACHE_VARIABLE: str(tmp_path_factory.mktemp("cache"))}):
        yield


@pytest.fixture(scope="session")
def digits_dataset(tmp_path_factory) -> Path:
    """A dataset of 120 digits of three classes with the splits train and val, built by the real command."""
    source, out = tmp_path_factory.mktemp("class-tars"), tmp_path_factory.mktemp("digits") / "dataset"
    write_class_tars(source)
    succeeded(vitscale_data("build", "--source", "class-tars", source, "--out", out, "--val-fraction", 0.2))
    return out


@pytest.fixture
def micro_config(tmp_path, digits_dataset) -> Path:
    """A config of a micro model on the digits; its run directory is `run` beside it."""
    path = tmp_path / "micro.yaml"
    path.write_text(yaml.safe_dump(micro_tree(digits_dataset, tmp_path / "run")))
    return path
