"""The builder beside webdataset.ShardWriter: the same images, read from the same class tars in the same order.

Both write key.jpg, key.cls and key.wnid. The builder also tests each image's header, writes the index with sizes
and crc32, takes each shard's SHA-256 and waits until its bytes are on the disk. Contenders take turns, several
rounds each; the median counts. The start of processes is left out: a build lasts hours.
"""

import io
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data_tools.build import plan_only
from data_tools.plan_file import Plan, PlanSettings, read_rows
from data_tools.prepare import Preparation
from data_tools.shard_writer import ShardJob, read_image, write_shard
from data_tools.sources.kinds import Source
from data_tools.ustar import END_OF_TAR, entry
from data_tools.workers import ordered_map
from vitscale.errors import ConfigError

CLASSES = 20
DISTINCT = 64
SHARD_IMAGES = 500
KEY = "builder, {} process{}"
SHARD_WRITER = "webdataset.ShardWriter, 1 process"


@dataclass(frozen=True)
class BenchReport:
    """Images a second of each contender, a number a round."""

    image_bytes: int
    rates: dict[str, list[float]]

    def lines(self) -> list[str]:
        """What a person is told."""
        base = statistics.median(self.rates[SHARD_WRITER])
        return [
            f"{name:36} {rate:8.0f} images/s {rate * self.image_bytes / 1e6:7.0f} MB/s {rate / base:5.2f} x   "
            f"(rounds: {' '.join(f'{one:.0f}' for one in self.rates[name])})"
            for name, rate in ((name, statistics.median(rounds)) for name, rounds in self.rates.items())
        ]

    def tree(self) -> dict[str, object]:
        """What a machine is told."""
        base = statistics.median(self.rates[SHARD_WRITER])
        medians = {name: statistics.median(rounds) for name, rounds in self.rates.items()}
        return {
            "image_bytes": self.image_bytes,
            "images_per_s": {name: round(rate, 1) for name, rate in medians.items()},
            "ratio": {name: round(rate / base, 3) for name, rate in medians.items()},
            "rounds": self.rates,
        }


def bench(folder: Path, images: int, rounds: int) -> BenchReport:
    """Write made-up JPEGs of about 100 KB by each contender in turn, in a folder that is removed at the end.

    Raises:
        ConfigError: the folder is there already.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: is there already: give a new folder, it is removed at the end")
    folder.mkdir(parents=True)
    try:
        image_bytes = _write_source(folder / "source", images)
        out = folder / "out"
        settings = PlanSettings(
            source=Source(kind="class-tars", path=folder / "source"),
            seed=0,
            val_fraction=0,
            val_list=None,
            split_from_source=False,
            shard_images=SHARD_IMAGES,
            shard_bytes=None,
            classes="present",
            outside="drop",
            preparation=Preparation(check="header"),
            leakage=None,
            leakage_distance=0,
        )
        plan = plan_only(out, settings, 1).plan
        contenders = {
            SHARD_WRITER: partial(_shard_writer, folder / "webdataset", out, plan),
            KEY.format(1, ""): partial(_builder, out, plan, 1),
            KEY.format(2, "es"): partial(_builder, out, plan, 2),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                rates[name].append(contender())
        return BenchReport(image_bytes, rates)
    finally:
        shutil.rmtree(folder)


def _write_source(folder: Path, images: int) -> int:
    folder.mkdir()
    pictures = [_picture(number) for number in range(DISTINCT)]
    for place in range(CLASSES):
        wnid = f"n{place:08d}"
        with (folder / f"{wnid}.tar").open("wb") as tar:
            for number in range(place, images, CLASSES):
                tar.write(b"".join(entry(f"{wnid}_{number}.JPEG", pictures[number % DISTINCT])))
            tar.write(END_OF_TAR)
    return sum(map(len, pictures)) // DISTINCT


def _picture(seed: int) -> bytes:
    """A JPEG of 400 x 350 pixels with the detail of a photograph's bytes."""
    noise = np.random.default_rng(seed).normal(128, 42, (350, 400, 3)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _builder(out: Path, plan: Plan, workers: int) -> float:
    """Images a second, counted from the end of every process's first shard."""
    for shard in plan.shards:
        (out / shard.name).with_suffix(".parquet").unlink(missing_ok=True)
    os.sync()
    write = partial(write_shard, on_bad="fail", recheck=False)
    reports = ordered_map(write, [ShardJob(out, number) for number in range(len(plan.shards))], workers)
    for _ in range(workers):
        next(reports)
    started = time.perf_counter()
    images = sum(report.images for report in reports)
    return images / (time.perf_counter() - started)


def _shard_writer(folder: Path, out: Path, plan: Plan) -> float:
    """Images a second of one process."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    started = time.perf_counter()
    images = 0
    with webdataset.ShardWriter(str(folder / "train-%06d.tar"), maxcount=SHARD_IMAGES, verbose=0) as writer:
        for sample in _samples(out, plan):
            writer.write(sample)
            images += 1
    return images / (time.perf_counter() - started)


def _samples(out: Path, plan: Plan) -> Iterator[dict[str, object]]:
    for number in range(len(plan.shards)):
        for row in read_rows(out, number):
            data = read_image(out / plan.root, plan, row)
            wnid = plan.classes[row["label"]]
            yield {"__key__": row["key"], "jpg": data, "cls": row["label"], "wnid": wnid.encode()}
