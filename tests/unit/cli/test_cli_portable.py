"""`vitscale export`, `import` and `convert` from a real training checkpoint to every format and back."""

import importlib
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from micro_run import micro_tree
from safetensors.torch import load_file
from transformers import ViTModel

from vitscale.checkpoint import FORMATS, locate, read_portable, stored_weights
from vitscale.config import load_config
from vitscale.errors import CheckpointError, ExitStatus
from vitscale.train.run import run_training


def vitscale(command, *words):
    """What the command prints; its errors are raised."""
    module = importlib.import_module(f"vitscale.cli.{command}")
    result = CliRunner().invoke(module.command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, digits_dataset) -> Path:
    """A run of three steps of a micro model with a representation layer of 16 and a head of 3."""
    folder = tmp_path_factory.mktemp("micro")
    tree = micro_tree(digits_dataset, folder / "run")
    tree["engine"] = {"kind": "torch", "precision": "fp32"}
    tree["schedule"] = {"length": 3}
    path = folder / "micro.yaml"
    path.write_text(yaml.safe_dump(tree))
    with mock.patch.dict(os.environ):  # a rank's variables would pass on to what later tests start
        assert run_training(load_config(path)) == ExitStatus.FINISHED
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir) -> Path:
    out = run_dir.parent / "exported"
    vitscale("export", run_dir, "--out", out)
    return out


def certificate(folder):
    return json.loads((folder / "certificate.json").read_text())


def test_an_export_holds_the_checkpoints_weights_and_says_so(run_dir, exported):
    directory, manifest = locate(run_dir)
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == manifest.shapes.keys()
    assert all(torch.equal(weights[name], value) for name, value in stored_weights(directory, manifest).items())
    found = certificate(exported)
    assert found["origin"]["path"] == "run/step-00000003"
    assert found["round_trip"] == {"tensors": len(weights), "elements": sum(w.numel() for w in weights.values())}


@pytest.mark.parametrize("format_", [name for name in FORMATS if name != "vitscale"])
def test_every_format_from_the_checkpoint_and_back_to_ours(run_dir, exported, tmp_path, format_):
    out, back = tmp_path / "out", tmp_path / "back"
    features = ["--features-only"] if format_ in {"timm", "hf"} else []
    text = vitscale("export", run_dir, "--format", format_, *features, "--verify", "--out", out)
    assert "bitwise equal" in text
    assert "verified against" in text
    assert certificate(out)["verification"]["features"] < 1e-9
    vitscale("import_", out, "--out", back)
    expected, found = load_file(exported / "model.safetensors"), load_file(back / "model.safetensors")
    left_out = {"timm": ("head.", "pre_logits."), "hf": ("head.",)}.get(format_, ())
    assert found.keys() == {name for name in expected if not (left_out and name.startswith(left_out))}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_converting_from_ours_is_exporting_from_the_checkpoint(run_dir, exported, tmp_path):
    vitscale("export", run_dir, "--format", "npz", "--out", tmp_path / "a")
    vitscale("convert", exported, "--format", "npz", "--out", tmp_path / "b")
    assert (tmp_path / "a/model.npz").read_bytes() == (tmp_path / "b/model.npz").read_bytes()


def test_the_libraries_read_what_the_commands_wrote(exported, tmp_path):
    vitscale("convert", exported, "--format", "timm", "--features-only", "--out", tmp_path / "timm")
    vitscale("convert", exported, "--format", "hf", "--features-only", "--out", tmp_path / "hf")
    images = torch.randn(2, 3, 16, 16)
    ours = read_portable(exported).build()
    with torch.no_grad():
        features = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval().forward_features(images)
        pooled = ViTModel.from_pretrained(tmp_path / "hf")(images).pooler_output
        assert (features - ours.forward_features(images)).abs().max() <= 1e-5
        assert (pooled - ours.pre_logits(ours.forward_features(images)[:, 0])).abs().max() <= 1e-5


def test_bf16_and_another_image_size(exported, tmp_path):
    text = vitscale("convert", exported, "--format", "vitscale", "--precision", "bf16", "--out", tmp_path / "half")
    assert "vitscale, bf16" in text
    assert {value.dtype for value in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}
    vitscale("convert", exported, "--format", "vitscale", "--img-size", 32, "--out", tmp_path / "large")
    assert load_file(tmp_path / "large/model.safetensors")["pos_embed"].shape == (1, 17, 32)
    assert read_portable(tmp_path / "large").variant.img_size == 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "timm"], "--format timm: timm has no representation layer"),
        (["--format", "hf"], "--format hf: ViTForImageClassification has no representation layer"),
        (["--weights", "ema"], "holds no ema weights: use --weights raw"),
        (["--verify"], "--verify compares with another library's model"),
        (["--format", "npz", "--precision", "bf16"], "--precision bf16: NumPy has no bf16"),
        (["--img-size", "20"], "model.img_size 20 is no multiple of model.patch_size 8: use model.img_size=16 or 24"),
    ],
)
def test_what_export_refuses_leaves_nothing(run_dir, tmp_path, words, said):
    with pytest.raises(Exception, match=said.replace("(", r"\(")) as caught:
        vitscale("export", run_dir, *words, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_import_of_a_bare_state_dict_with_names_and_changes(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2, act_layer="gelu_tanh")
    torch.save({"model": model.state_dict()}, tmp_path / "mine.pth")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    out = tmp_path / "out"
    told = ["--model", "vit_tiny_patch16_224", "--labels", tmp_path / "classes.txt"]
    vitscale("import_", tmp_path / "mine.pth", "model.depth=1", "model.act=gelu_tanh", *told, "--out", out)
    found = read_portable(out)
    assert (found.labels, found.variant.act, found.variant.depth) == (("cat", "dog"), "gelu_tanh", 1)
    assert torch.equal(found.weights["head.weight"], model.state_dict()["head.weight"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "vit_tinny"], "--model vit_tinny: unknown"),
        (["--labels", "nowhere.txt"], "--labels nowhere.txt: cannot be read"),
        (["depth=1"], "override 'depth=1': write model.KEY=VALUE"),
        (["model.depth=[1"], "the value is not valid YAML"),
        (["model.depht=1"], "override 'model.depht=1': did you mean model.depth?"),
        (["model.drop_rate=0.1"], "override 'model.drop_rate=0.1': "),
        (["model.depth=deep"], "override model.depth: Input should be a valid integer"),
    ],
)
def test_what_import_refuses(tmp_path, words, said):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    with pytest.raises(CheckpointError) as caught:
        vitscale("import_", tmp_path / "mine.pth", *words, "--out", tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
