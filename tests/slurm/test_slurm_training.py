"""The real thing on a real cluster: two nodes, one rank each, ZeRO-2, requeued in the middle."""

import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster
from PIL import Image

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]
STEPS = 200

CONFIG = f"""
model:
  {{name: vit_tiny_patch16_224, num_classes: 2, img_size: 16, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}}
data: {{train: {{path: shards, split: train}}, lanes: 4, block: 1, workers: 0}}
batch: {{global_batch: 8, micro_batch: 2}}
optim: {{peak_lr: 1e-3}}
schedule: {{length: {STEPS}, warmup: 5}}
engine: {{zero_stage: 2, precision: fp32}}
log: {{every_steps: 1}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's working directory: run.yaml, and shards of two classes with 24 images each."""
    rng = np.random.default_rng(0)
    (tmp_path / "classes").mkdir()
    for wnid in ("n00000001", "n00000002"):
        with tarfile.open(tmp_path / "classes" / f"{wnid}.tar", "w") as tar:
            for number in range(24):
                jpeg = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(jpeg, "JPEG")
                member = tarfile.TarInfo(f"{wnid}_{number}.JPEG")
                member.size = len(jpeg.getvalue())
                jpeg.seek(0)
                tar.addfile(member, jpeg)
    build = ["-m", "data_tools", "build", "--source", "class-tars", "classes", "--out", "shards", "--workers", "1"]
    subprocess.run([sys.executable, *build], cwd=tmp_path, check=True, timeout=60)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of every record so far."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


def test_requeued_job_ends_with_the_losses_of_an_uninterrupted_run(cluster: Cluster, folder: Path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it: the number of threads decides the last bits
    submit = [sys.executable, REPOSITORY / "launch" / "submit.py", "run.yaml", "--nodes", "2", "--tasks-per-node", "1"]
    job_id = cluster.run([*submit, "run.dir=slurm-run"], cwd=folder).stdout.split()[1].rstrip(":")
    deadline = time.monotonic() + 120
    while len(losses(folder / "slurm-run")) < 10:
        assert time.monotonic() < deadline, "the job takes no steps"
        time.sleep(0.05)
    cluster.run(["scontrol", "requeue", job_id])
    job = cluster.wait_for_job(job_id, ["COMPLETED", "FAILED", "CANCELLED"], limit_s=120)
    log = (folder / "slurm-run" / "slurm" / f"{job_id}_0_log.out").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log

    stopped, finished = sorted(path.name for path in (folder / "slurm-run" / "checkpoints").glob("step-*"))
    assert 10 <= int(stopped.removeprefix("step-")) < STEPS, "the requeued job did not go on from a checkpoint"
    assert finished == f"step-{STEPS:08d}"

    torchrun = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", "--standalone"]
    train = ["-m", "vitscale", "train", "run.yaml", "run.dir=local-run"]
    subprocess.run([*torchrun, *train], cwd=folder, check=True, capture_output=True, timeout=120)

    uninterrupted = losses(folder / "local-run")
    assert [step for step, _ in uninterrupted] == list(range(1, STEPS + 1))
    assert losses(folder / "slurm-run") == uninterrupted
