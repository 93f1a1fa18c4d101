"""Is what it learns real? Pretraining at three model sizes, what each is worth downstream, with seeds and intervals.

    .venv/bin/python launch/digits_study.py        about a quarter of an hour on 2 cores; prints a Markdown report

The digits of the demo (scikit-learn's, 8x8 pixels): eight are pretrained on, all ten are the downstream task, with 2, 6
or 20 labelled images of each. The downstream validation images are set aside first and are in no training set.
Fine-tuning and scratch get the same images, steps and augmentation; scratch gets the better of two learning rates,
chosen on the validation images to its favour.
"""

import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from demo import IN21K_DIGITS, VAL_A_DIGIT, VITSCALE, WNIDS, build, run, run_jobs, say, write_class_tars
from sklearn.datasets import load_digits

ROOT = Path("runs/digits-study")
SIZES = {"width-32": (32, 2), "width-64": (64, 2), "width-128": (128, 4)}
LABELS = (2, 6, 20)
SEEDS = (0, 1, 2)
SCRATCH_LRS = (2e-3, 4e-3)


def main() -> None:
    """Build, pretrain, fine-tune, report."""
    shutil.rmtree(ROOT, ignore_errors=True)
    write_sources()
    build("in21k", "--val-fraction", "0.12", root=ROOT)
    build("val", "--val-fraction", "1", root=ROOT)
    for labels in LABELS:
        build(f"train-{labels}", "--val-fraction", "0", root=ROOT)

    pretrained = run_jobs(
        {f"{size}-{seed}": pretraining(size, seed) for size in SIZES for seed in SEEDS}, ROOT / "pretrain"
    )
    for name in pretrained:
        run([*VITSCALE, "export", str(ROOT / "pretrain" / name), "--out", str(ROOT / "export" / name)])
    jobs = {}
    for size in SIZES:
        for labels in LABELS:
            for seed in SEEDS:
                init = f"init.path={ROOT / 'export' / f'{size}-{seed}'}"
                jobs[f"tuned-{size}-{labels}-{seed}"] = downstream("tuned", size, labels, seed, [init])
                for lr in SCRATCH_LRS:
                    way = f"scratch{lr:g}"
                    jobs[f"{way}-{size}-{labels}-{seed}"] = downstream(way, size, labels, seed, [f"optim.peak_lr={lr}"])
    accuracy = run_jobs(jobs, ROOT / "downstream")
    lines = list(report(pretrained, accuracy))
    (ROOT / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    say("\n" + "\n".join(lines))


def write_sources() -> None:
    """Split the digits: validation first, then nested downstream sets, the rest of eight digits to pretrain on."""
    digits = load_digits()
    rng = np.random.default_rng(1)
    parts: dict[str, dict[str, Sequence[int]]] = {
        part: {} for part in ("in21k", "val", *(f"train-{n}" for n in LABELS))
    }
    for digit, wnid in enumerate(WNIDS):
        rows = rng.permutation(np.flatnonzero(digits.target == digit)).tolist()
        parts["val"][wnid], rest = rows[:VAL_A_DIGIT], rows[VAL_A_DIGIT:]
        for labels in LABELS:
            parts[f"train-{labels}"][wnid] = rest[:labels]
        if digit in IN21K_DIGITS:
            parts["in21k"][wnid] = rest[max(LABELS) :]
    for part, classes in parts.items():
        write_class_tars(ROOT / "source" / part, classes, digits.images)


def shape(size: str) -> list[str]:
    """Overrides that give a model of this size."""
    width, heads = SIZES[size]
    return [f"model.embed_dim={width}", f"model.num_heads={heads}"]


def pretraining(size: str, seed: int) -> list[str]:
    """The command of one pretraining, on one rank."""
    data = [f"data.{split}={{path: {ROOT / 'shards' / 'in21k'}, split: {split}}}" for split in ("train", "val")]
    fixed = [f"run.dir={ROOT / 'pretrain' / f'{size}-{seed}'}", f"run.seed={seed}", "model.representation_size=64"]
    own = ["batch.micro_batch=64", "log.every_steps=50", "eval.every_steps=null", "checkpoint.every_steps=1000"]
    return [*VITSCALE, "train", "configs/demo-pretrain.yaml", *fixed, *data, *own, *shape(size)]


def downstream(way: str, size: str, labels: int, seed: int, overrides: Sequence[str]) -> list[str]:
    """The command of one downstream training."""
    shards = ROOT / "shards"
    fixed = [f"run.dir={ROOT / 'downstream' / f'{way}-{size}-{labels}-{seed}'}", f"run.seed={seed}"]
    data = [
        f"data.train={{path: {shards / f'train-{labels}'}, split: train}}",
        f"data.val={{path: {shards / 'val'}, split: val}}",
    ]
    batch = ["batch={global_batch: 20, micro_batch: 20}", "log.every_steps=50", "log.pictures=0"]
    return [*VITSCALE, "train", "configs/demo-finetune.yaml", *fixed, *data, *batch, *shape(size), *overrides]


def report(pretrained: dict[str, float], accuracy: dict[str, float]) -> list[str]:
    """Mean and standard error over seeds, as Markdown."""
    lines = ["| model | pretraining top-1 | " + " | ".join(f"{n} labels: tuned | scratch" for n in LABELS) + " |"]
    lines.append("|---|--:|" + "--:|--:|" * len(LABELS))
    for size in SIZES:
        cells = [spread([pretrained[f"{size}-{seed}"] for seed in SEEDS])]
        for labels in LABELS:
            tuned = [accuracy[f"tuned-{size}-{labels}-{seed}"] for seed in SEEDS]
            rates = [[accuracy[f"scratch{lr:g}-{size}-{labels}-{seed}"] for seed in SEEDS] for lr in SCRATCH_LRS]
            cells += [spread(tuned), spread(max(rates, key=statistics.mean))]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    lines.append(f"\nTop-1 in percent on {10 * VAL_A_DIGIT} images, mean +- standard error of {len(SEEDS)} seeds.")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and standard error, in percent."""
    return f"{100 * statistics.mean(values):.1f} +- {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


if __name__ == "__main__":
    sys.exit(main())
