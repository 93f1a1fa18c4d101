"""What a dataset holds: its classes and how unequal they are, the sizes of its images, how well batches mix them.

Only the columns that this needs are read: 14 million samples take seconds, and less than a gigabyte.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.mixing import Mixing, measure_mixing
from data_tools.quantities import byte_size, counted
from vitscale.data.index import DATASET_FILE, Dataset, read_dataset, read_index
from vitscale.data.labels import label_map, load_label_space
from vitscale.errors import ShardError

QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}

Quantiles = dict[str, float]


@dataclass(frozen=True)
class SplitColumns:
    """The samples of a split that have one of C classes, as columns of length N.

    `rows` are their places in the index, `label` is the class among the C; width and height, in pixels, are 0
    where the image cannot be read; `format` holds places in `formats`.
    """

    classes: tuple[str, ...]
    rows: NDArray[np.int64]
    label: NDArray[np.int32]
    size_bytes: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    format: NDArray[np.int32]
    formats: tuple[str, ...]

    def __len__(self) -> int:
        """Samples."""
        return len(self.rows)

    def class_images(self) -> NDArray[np.int64]:
        """Images of each of the C classes."""
        return np.bincount(self.label, minlength=len(self.classes))

    def short_edge_px(self) -> NDArray[np.int32]:
        """Shorter side of each image that can be read."""
        edges = np.minimum(self.width, self.height)
        return edges[edges > 0]

    def megapixels(self) -> NDArray[np.float32]:
        """Area of each image that can be read."""
        areas = self.width.astype(np.float32) * self.height / np.float32(1e6)
        return areas[areas > 0]

    def format_images(self) -> dict[str, int]:
        """Images of each format, the most frequent first."""
        images = np.bincount(self.format, minlength=len(self.formats))
        return {self.formats[place]: int(images[place]) for place in np.argsort(-images, kind="stable")}


@dataclass(frozen=True)
class SplitStats:
    """Statistics of a split.

    `class_images` has quantiles of the images a class, over the classes that have any. `gini` is 0 where these have
    equally many and nears 1 where one has all; as many equal classes as `effective_classes` have the same entropy.
    """

    split: str
    samples: int
    shards: int
    shard_bytes: int
    image_bytes: int
    unreadable: int
    classes: int
    classes_present: int
    class_images: Quantiles
    gini: float
    effective_classes: float
    short_edge_px: Quantiles
    megapixels: Quantiles
    size_bytes: Quantiles
    formats: dict[str, int]
    mixing: Mixing

    def lines(self) -> list[str]:
        """For people."""
        facts = {
            "samples": f"{counted(self.samples)} ({byte_size(self.image_bytes)})",
            "shards": f"{counted(self.shards)} ({byte_size(self.shard_bytes)})",
            "unreadable": counted(self.unreadable),
            "formats": ", ".join(f"{name} {counted(images)}" for name, images in self.formats.items()),
            "classes": f"{counted(self.classes_present)} of {counted(self.classes)} have images",
            "imbalance": f"Gini {self.gini:.3f}, as varied as {counted(self.effective_classes)} equal classes",
            "mixing": self.mixing.line(),
        }
        return [
            self.split,
            *(f"  {name:16}{fact}" for name, fact in facts.items()),
            " " * 18 + "".join(f"{name:>10}" for name in QUANTILES),
            _table_row("images a class", self.class_images, counted),
            _table_row("short edge, px", self.short_edge_px, counted),
            _table_row("megapixels", self.megapixels, "{:.3g}".format),
            _table_row("file", self.size_bytes, byte_size),
        ]


@dataclass(frozen=True)
class StatsReport:
    """Statistics of some splits of a dataset."""

    folder: Path
    dataset: Dataset
    label_space: str | None
    splits: tuple[SplitStats, ...]

    def lines(self) -> list[str]:
        """For people."""
        head = (
            f"{self.folder}: label space {self.label_space or 'of its own'}, seed {self.dataset.seed}, "
            f"hash {self.dataset.hash[:12]}"
        )
        return [head, *(line for split in self.splits for line in split.lines())]

    def tree(self) -> dict[str, Any]:
        """For machines."""
        splits = {
            split.split: {**asdict(split), "mixing": {**asdict(split.mixing), "score": split.mixing.score}}
            for split in self.splits
        }
        identity = {"hash": self.dataset.hash, "seed": self.dataset.seed, "label_space": self.label_space}
        return {"folder": str(self.folder), **identity, "splits": splits}


def stats(
    folder: Path, *, split: str | None, label_space: str | None, batch: int, lanes: int, block: int
) -> StatsReport:
    """Statistics of one split of a dataset, or of all.

    Args:
        folder: of the dataset.
        split: its name; None for all.
        label_space: count the samples of its classes alone; None takes the classes of the dataset.
        batch: samples a batch, for mixing.
        lanes: of the training order, for mixing.
        block: of the training order, for mixing.

    Raises:
        ConfigError: no label space has this name.
        ShardError: there is no finished dataset, or no such split, or an index is damaged, or no sample of a split
            has a class of the label space.
    """
    dataset = read_dataset(folder)
    names = tuple(dataset.splits) if split is None else (require_split(folder, dataset, split),)
    described = tuple(
        describe(dataset, name, read_columns(folder, dataset, name, label_space), batch=batch, lanes=lanes, block=block)
        for name in names
    )
    return StatsReport(folder, dataset, label_space or dataset.label_space, described)


def require_split(folder: Path, dataset: Dataset, split: str) -> str:
    """The name of a split, once it is known to be one.

    Raises:
        ShardError: the dataset has no such split.
    """
    if split not in dataset.splits:
        raise ShardError(f"{folder / DATASET_FILE}: no split {split!r}: it has {', '.join(sorted(dataset.splits))}")
    return split


def read_columns(folder: Path, dataset: Dataset, split: str, label_space: str | None) -> SplitColumns:
    """The columns of a split that statistics need, of the samples that have a class of the label space.

    Raises:
        ConfigError: no label space has this name.
        ShardError: the index is damaged, or no sample has a class of the label space.
    """
    table = read_index(folder, dataset, split, ("label", "size", "width", "height", "format"))
    classes = dataset.classes if label_space is None else load_label_space(label_space).wnids
    labels = table["label"].to_numpy()
    if classes != dataset.classes:
        labels = label_map(dataset.classes, classes)[labels]
        table = table.filter(pa.array(labels >= 0)).combine_chunks()
    rows = np.flatnonzero(labels >= 0)
    if len(rows) == 0:
        raise ShardError(f"{folder}: no sample of split {split} has a class of {label_space}: name another label space")
    image_format = table["format"].combine_chunks()
    return SplitColumns(
        classes=classes,
        rows=rows,
        label=labels[rows],
        size_bytes=table["size"].to_numpy(),
        width=table["width"].to_numpy(),
        height=table["height"].to_numpy(),
        format=image_format.indices.to_numpy(),
        formats=tuple(image_format.dictionary.to_pylist()),
    )


def describe(dataset: Dataset, split: str, columns: SplitColumns, *, batch: int, lanes: int, block: int) -> SplitStats:
    """Statistics of the columns of a split."""
    files = dataset.splits[split]
    edges = columns.short_edge_px()
    class_images = columns.class_images()
    present = class_images[class_images > 0]
    return SplitStats(
        split=split,
        samples=len(columns),
        shards=len(files.shards),
        shard_bytes=sum(shard.size_bytes for shard in files.shards),
        image_bytes=int(columns.size_bytes.sum()),
        unreadable=len(columns) - len(edges),
        classes=len(columns.classes),
        classes_present=len(present),
        class_images=_quantiles(present),
        gini=gini(present),
        effective_classes=effective_classes(present),
        short_edge_px=_quantiles(edges),
        megapixels=_quantiles(columns.megapixels()),
        size_bytes=_quantiles(columns.size_bytes),
        formats=columns.format_images(),
        mixing=measure_mixing(columns.label, batch=batch, lanes=lanes, block=block),
    )


def gini(amounts: NDArray[np.int64]) -> float:
    """Gini coefficient: the mean difference between two of the amounts, over twice their mean. [C] -> 0 to 1."""
    ranks = np.arange(1, len(amounts) + 1)
    return float(np.dot(2 * ranks - len(amounts) - 1, np.sort(amounts)) / (len(amounts) * amounts.sum()))


def effective_classes(class_images: NDArray[np.int64]) -> float:
    """Exponential of the entropy of the class of an image. [C], all above 0 -> 1 to C."""
    share = class_images / class_images.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def _quantiles(values: NDArray[Any]) -> Quantiles:
    """QUANTILES of the values, each of them one of the values; empty where there are none."""
    if len(values) == 0:
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def _table_row(name: str, quantiles: Quantiles, text: Callable[[float], str]) -> str:
    return f"  {name:16}" + "".join(f"{text(quantiles[point]) if quantiles else '-':>10}" for point in QUANTILES)
