"""What a user can get wrong, through the real command: one line with the mend, exit status 2, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked_command import vitscale
from micro_run import REPOSITORY, micro_tree


def refused(*words: object) -> str:
    result = vitscale(*words)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.peek_lr=1", "did you mean optim.peak_lr?"),
        ("optim.peak_lr=fast", "optim.peak_lr"),
        ("batch.global_batch=9", "use an even number, such as 10"),
        ("model.name=vit_enormous_patch14", "vit_enormous_patch14"),
        ("model.num_classes=5", "set model.num_classes=3"),
        ("model.img_size=17", "use model.img_size=16 or 24"),
        ("model.img_size=[16,32]", "the loaders crop squares: give one number"),
        ("model.in_chans=1", "use model.in_chans=3"),
        ("data.train.split=test", "it has train, val"),
        ("data.train.path=nowhere", "nowhere"),
        ("init.path=nowhere", "nowhere"),
        ("init.path=weights.pth", "`vitscale import weights.pth --model NAME --out FOLDER`, then init.path=FOLDER"),
        ("model.act=relu", "model.act"),
        ("optim.peak_lr", "write section.key=value"),
    ],
)
@pytest.mark.fault(29)
def test_a_wrong_setting_is_one_line_with_the_mend(micro_config, override, said):
    assert said in refused("train", micro_config, override)


@pytest.fixture
def own_dataset(tmp_path, digits_dataset) -> Path:
    return Path(shutil.copytree(digits_dataset, tmp_path / "dataset"))


def _remove_a_shard(dataset: Path) -> str:
    next(dataset.glob("train-*.tar")).unlink()
    return "shard is missing"


def _truncate_a_shard(dataset: Path) -> str:
    path = next(dataset.glob("train-*.tar"))
    os.truncate(path, path.stat().st_size - 512)
    return path.name


def _swap_the_index(dataset: Path) -> str:
    shutil.copy(dataset / "val.parquet", dataset / "train.parquet")
    return "train.parquet"


@pytest.mark.parametrize("damage", [_remove_a_shard, _truncate_a_shard, _swap_the_index])
@pytest.mark.fault(29)
def test_shards_and_index_that_do_not_belong_together(tmp_path, own_dataset, damage):
    said = damage(own_dataset)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(micro_tree(own_dataset, tmp_path / "run")))
    assert said in refused("train", config)


def test_export_and_fine_tuning_refuse_what_is_damaged_or_does_not_fit(micro_config, tmp_path):
    run_dir, out = tmp_path / "run", tmp_path / "export"
    assert "no checkpoint here" in refused("export", run_dir, "--out", out)
    assert vitscale("train", micro_config, "schedule.length=3").returncode == 0
    assert vitscale("export", run_dir, "--out", out).returncode == 0
    card = json.loads((out / "card.json").read_text())
    assert card["labels"] == [f"n{10_000_000 + digit}" for digit in range(3)]
    assert card["representation_size"] == 16
    assert card["trained"]["step"] == 3
    assert "exists already" in refused("export", run_dir, "--out", out)

    tune = ["train", micro_config, f"run.dir={tmp_path / 'tune'}", f"init.path={out}", "schedule.length=3"]
    assert "embed_dim 32, the model 64" in refused(*tune, "model.embed_dim=64")
    assert "set model.representation_size=16" in refused(
        *tune, "init.representation=keep", "model.representation_size=8"
    )
    os.truncate(out / "model.safetensors", 1000)
    assert "model.safetensors: 1000 bytes where" in refused(*tune)

    (tag,) = (run_dir / "checkpoints").glob("step-*")
    os.truncate(tag / "rank-00000.safetensors", 1000)
    text = refused("export", run_dir, "--out", tmp_path / "other")
    assert "1000 bytes where" in text


def test_help_answers_without_torch_and_shows_examples():
    lines = ["import sys", "from vitscale.cli import main", "try: main(['--help'])"]
    listing = "\n".join([*lines, "except SystemExit: print('torch' in sys.modules)"])
    result = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout.strip().endswith("False")
    for command in ("train", "checkpoint", "export", "import", "convert", "plan", "models", "bench"):
        result = vitscale(command, "--help")
        assert result.returncode == 0
        assert "Example" in result.stdout
