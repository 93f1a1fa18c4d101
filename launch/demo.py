"""`make demo`: the whole path in small, on real images, by the commands a user types.

class tars -> shards -> ZeRO pretraining (stopped and resumed) -> export -> fine-tuning against scratch -> table

The images are the 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998).
Honest by construction: the downstream validation images are set aside before anything else and are in no
training set; fine-tuning and scratch get the same images, steps and augmentation; scratch gets the best of
four learning rates, chosen on the validation images to its favour, while fine-tuning takes the one its
config names.
"""

import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path("runs/demo")
# The WordNet 3.0 synsets of the ten digits, so that the layout is that of ImageNet-21k's winter21 release.
WNIDS = (
    "n13742358", "n13742573", "n13743269", "n13744044", "n13744304",
    "n13744521", "n13744722", "n13744916", "n13745086", "n13745270",
)  # fmt: skip
IN21K_DIGITS = range(8)
VAL_A_DIGIT, TRAIN_A_DIGIT = 60, 6
IMAGE_PX = 32
SEEDS = (0, 1, 2)
SCRATCH_LRS = (1e-3, 2e-3, 4e-3, 8e-3)
LEAST_PRETRAIN_TOP1 = 0.6  # chance is 1/8
VITSCALE = [sys.executable, "-m", "vitscale"]
PRETRAIN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    "-m", "vitscale", "train", "configs/demo-pretrain.yaml",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> int:
    """Run the demo; 0 only if pretraining learned and its transfer beats training from scratch."""
    started_s = time.monotonic()
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)

    say("1. Images: 1,797 handwritten digits of 8x8 pixels, upscaled to 32x32 JPEGs, one tar a class")
    write_sources()
    say("2. Shards: globally shuffled WebDataset tars with a Parquet index")
    build("in21k", "--val-fraction", "0.12")
    build("downstream-train", "--val-fraction", "0")
    build("downstream-val", "--val-fraction", "1")

    say("3. Pretraining on 2 ranks under ZeRO-2, stopped in the middle by SIGTERM to torchrun")
    stopped_at = pretrain_and_stop()
    say(f"   stopped at step {stopped_at}; the same command goes on at step {stopped_at + 1}")
    run(PRETRAIN)
    steps = [step for step, record in read_metrics(ROOT / "pretrain") if "train/loss" in record]
    assert steps == sorted(set(steps)), "a step was recorded twice"

    say("4. Export: fp32 safetensors + card")
    run([*VITSCALE, "export", str(ROOT / "pretrain"), "--out", str(ROOT / "export")])

    say("5. Downstream: all ten digits, 6 labelled images of each; fine-tuned against trained from scratch")
    tuned, scratch, scratch_lr = downstream()

    return report(tuned, scratch, scratch_lr, time.monotonic() - started_s)


def write_sources() -> None:
    """Split the digits and write one tar of JPEGs a class for each of the three parts."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    parts: dict[str, dict[str, list[int]]] = {"in21k": {}, "downstream-train": {}, "downstream-val": {}}
    for digit, wnid in enumerate(WNIDS):
        rows = rng.permutation(np.flatnonzero(digits.target == digit)).tolist()
        val, train, rest = np.split(rows, [VAL_A_DIGIT, VAL_A_DIGIT + TRAIN_A_DIGIT])
        parts["downstream-val"][wnid] = val.tolist()
        parts["downstream-train"][wnid] = train.tolist()
        if digit in IN21K_DIGITS:
            parts["in21k"][wnid] = rest.tolist()
    for part, classes in parts.items():
        write_class_tars(ROOT / "source" / part, classes, digits.images)


def write_class_tars(folder: Path, classes: Mapping[str, Sequence[int]], images: NDArray[np.float64]) -> None:
    """One tar of JPEGs a class, of these rows of the digits' images [N, 8, 8]."""
    folder.mkdir(parents=True)
    for wnid, rows in classes.items():
        with tarfile.open(folder / f"{wnid}.tar", "w") as tar:
            for row in rows:
                content = jpeg(images[row])
                member = tarfile.TarInfo(f"{wnid}_{row}.JPEG")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    say(f"   {folder}: {len(classes)} class tars, {sum(map(len, classes.values()))} images")


def jpeg(image: NDArray[np.float64]) -> bytes:
    """One digit, 8x8 with values 0 to 16, as a 32x32 JPEG."""
    grey = Image.fromarray((image * (255 / 16)).astype(np.uint8))
    buffer = io.BytesIO()
    grey.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def build(part: str, *options: str, root: Path = ROOT) -> None:
    """Build the shards of one part."""
    source, out = root / "source" / part, root / "shards" / part
    command = [sys.executable, "-m", "data_tools", "build", "--source", "class-tars", str(source), "--out", str(out)]
    run([*command, "--seed", "0", "--shard-images", "400", *options])


def pretrain_and_stop() -> int:
    """Start pretraining, send SIGTERM to torchrun in the middle, and give the step it saved."""
    with subprocess.Popen(PRETRAIN, env=ENVIRONMENT) as process:
        while process.poll() is None and newest_step(ROOT / "pretrain") < 300:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    end = json.loads((ROOT / "pretrain" / "exit.json").read_text())
    assert end["status"] == 75, f"expected to be stopped, but: {end}"
    return int(end["step"])


def downstream() -> tuple[list[float], list[float], float]:
    """Validation accuracies of fine-tuning and of scratch, a seed each, and the rate scratch did best with."""
    init = [f"init.path={ROOT / 'export'}"]
    tuned_jobs = [train_downstream(f"finetune-seed{seed}", seed, init) for seed in SEEDS]
    rate_jobs = [train_downstream(f"scratch-lr{lr:g}-seed0", 0, [f"optim.peak_lr={lr}"]) for lr in SCRATCH_LRS]
    accuracy = run_jobs({**dict(tuned_jobs), **dict(rate_jobs)})
    scratch_lr = max(SCRATCH_LRS, key=lambda lr: accuracy[f"scratch-lr{lr:g}-seed0"])
    more = [
        train_downstream(f"scratch-lr{scratch_lr:g}-seed{seed}", seed, [f"optim.peak_lr={scratch_lr}"])
        for seed in SEEDS[1:]
    ]
    accuracy |= run_jobs(dict(more))
    tuned = [accuracy[f"finetune-seed{seed}"] for seed in SEEDS]
    return tuned, [accuracy[f"scratch-lr{scratch_lr:g}-seed{seed}"] for seed in SEEDS], scratch_lr


def train_downstream(name: str, seed: int, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Name and command of one downstream training."""
    run_dir = ROOT / "downstream" / name
    fixed = [f"run.dir={run_dir}", f"run.seed={seed}"]
    return name, [*VITSCALE, "train", "configs/demo-finetune.yaml", *fixed, *overrides]


def run_jobs(jobs: Mapping[str, Sequence[str]], runs: Path = ROOT / "downstream") -> dict[str, float]:
    """Run trainings, two at a time, and give each one's final validation accuracy; `runs` has their directories."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda name: run(jobs[name], log=runs.parent / "logs" / f"{name}.txt"), jobs))
    accuracy = {name: last_value(runs / name, "val/top1") for name in jobs}
    for name, top1 in accuracy.items():
        say(f"   {name}: {top1:.1%}")
    return accuracy


def report(tuned: Sequence[float], scratch: Sequence[float], scratch_lr: float, seconds: float) -> int:
    """Print the table, keep it in ROOT, and judge it."""
    pretrain_top1 = last_value(ROOT / "pretrain", "val/top1")
    rates = [record["perf/images_per_s"] for _, record in read_metrics(ROOT / "pretrain") if "train/loss" in record]
    margin = statistics.mean(tuned) - statistics.mean(scratch)
    error = math.sqrt((statistics.variance(tuned) + statistics.variance(scratch)) / len(SEEDS))
    learned, transferred = pretrain_top1 >= LEAST_PRETRAIN_TOP1, margin >= 2 * error and margin > 0
    lines = [
        f"{'pretraining, top-1 on held-out images of 8 digits':58} {pretrain_top1:8.1%}",
        f"{'pretraining, images/s (median)':58} {statistics.median(rates):8.0f}",
        f"{'fine-tuned on 10 digits, top-1, mean of 3 seeds':58} {statistics.mean(tuned):8.1%}",
        f"{f'from scratch (best rate {scratch_lr:g}), top-1, mean of 3 seeds':58} {statistics.mean(scratch):8.1%}",
        f"{'margin +- standard error':58} {margin:8.1%} +- {error:.1%}",
        f"{'seconds':58} {seconds:8.0f}",
        "",
        f"shards      {ROOT}/shards           run          {ROOT}/pretrain",
        f"export      {ROOT}/export           downstream   {ROOT}/downstream",
        f"watch       .venv/bin/tensorboard --logdir {ROOT}",
        "try next    .venv/bin/vitscale plan configs/in21k/vit_huge_patch14.yaml --gpus 64",
        "            .venv/bin/vitscale train configs/demo-pretrain.yaml run.dir=runs/mine optim.peak_lr=1e-3",
        "",
        f"pretraining learned: {'yes' if learned else 'NO'} (at least {LEAST_PRETRAIN_TOP1:.0%}; chance is 12.5%)",
        f"transfer helps: {'yes' if transferred else 'NO'} (margin at least 2 standard errors)",
    ]
    (ROOT / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    say("\n" + "\n".join(lines))
    return 0 if learned and transferred else 1


def read_metrics(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """Records of a run's metrics.jsonl by step; a line still being written is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    return [(record["step"], record) for record in records]


def newest_step(run_dir: Path) -> int:
    """The last step a run has recorded."""
    return max((step for step, _ in read_metrics(run_dir)), default=0)


def last_value(run_dir: Path, tag: str) -> float:
    """The newest value of a metric."""
    return [record[tag] for _, record in read_metrics(run_dir) if tag in record][-1]


def run(command: Sequence[str], log: Path | None = None) -> None:
    """Run a command, its output to the terminal or to `log`; end the demo with its status if it fails."""
    if log is None:
        status = subprocess.run(command, env=ENVIRONMENT, check=False).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            status = subprocess.run(command, env=ENVIRONMENT, check=False, stdout=file, stderr=file).returncode
    if status != 0:
        say(f"failed with status {status}: {' '.join(command)}" + (f" (see {log})" if log else ""))
        sys.exit(status)


def say(text: str) -> None:
    """Tell the person who watches."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
