"""Every YAML under configs/ is a run that can be loaded and planned, a part of one, or a cluster's defaults."""

from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from job_request import draw_request

from vitscale.cli.plan import command as plan
from vitscale.config import load_config
from vitscale.config.load import BASE_KEY
from vitscale.train.build import build_model

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
CLUSTERS = [path for path in FILES if path.parent.name == "cluster"]
RUNS = [path for path in FILES if path.parent.name != "parts" and path not in CLUSTERS]


def bases(path):
    found = yaml.safe_load(path.read_text(encoding="utf-8")).get(BASE_KEY, [])
    return {(path.parent / base).resolve() for base in ([found] if isinstance(found, str) else found)}


def name(path):
    return path.relative_to(CONFIGS).as_posix()


def test_the_configs_the_documentation_names_are_here():
    assert {"demo-pretrain.yaml", "demo-finetune.yaml", "in21k/vit_huge_patch14.yaml"} <= set(map(name, RUNS))
    assert not [path for path in CONFIGS.rglob("*") if path.is_file() and path not in FILES]
    in21k = {
        f"in21k/vit_{size}_augreg.yaml"
        for size in ("base_patch16", "large_patch16", "huge_patch14", "giant_patch14", "gigantic_patch14")
    }
    assert in21k < set(map(name, RUNS))


def test_every_part_is_part_of_a_run():
    parts = {path.resolve() for path in FILES if path.parent.name == "parts"}
    assert parts <= set().union(*map(bases, FILES))


@pytest.mark.parametrize("path", CLUSTERS, ids=name)
def test_a_clusters_defaults_make_a_request(path, tmp_path):
    request = draw_request({"nodes": "2"}, path.stem, site_file=tmp_path / "none")
    assert request.ranks_per_node == request.gpus_per_node > 1


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_the_config_loads_and_its_model_is_built(path):
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight.shape[0] == config.model.num_classes


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_the_config_is_planned(path):
    result = CliRunner().invoke(plan, [str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "\nparameters  " in result.output


def test_the_huge_config_is_the_published_shape():
    config = load_config(CONFIGS / "in21k/vit_huge_patch14.yaml")
    with torch.device("meta"):
        model = build_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 660_385_363
    assert model.pre_logits.fc.weight.shape == (1280, 1280)
