"""Training from shards that have no index, through the webdataset library, and with that library's limits.

There is no order to resume in: every worker reads all shards in an order of its own and shuffles through a buffer. So
an epoch is only a number of images, a sample may come twice before another comes once, and a run that goes on sees
other samples. Each sample needs an image and a .cls. Prefer `vitscale-data index`, which mends all of that in one pass.
"""

import functools
import hashlib
import io
import itertools
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from webdataset.filters import shuffle
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from vitscale.config import StreamSection
from vitscale.data.augment import draw_crops
from vitscale.data.batch import Cursor, Substitution, Traffic
from vitscale.data.decode import BadSample
from vitscale.data.order import STREAM, hash64
from vitscale.data.recipes import MAX_ATTEMPTS, Part, TrainRecipe, blank_images
from vitscale.data.shards import ShardBytes, open_shards
from vitscale.errors import ConfigError, ShardError

LIMITS = (
    "%s has no index: epochs are not exact, a resumed run sees other samples, and bad samples are skipped; "
    "`vitscale-data index` makes the order exact"
)
CHUNK_BYTES = 4 << 20
IMAGES = ("jpg", "jpeg", "png", "webp", "gif")


@dataclass(frozen=True)
class Stream:
    """Shards by a pattern; what the trainer asks of its source of samples."""

    section: StreamSection
    seed: int

    def __post_init__(self) -> None:
        """Refuse what would start a command.

        Raises:
            ConfigError: the pattern holds a pipe.
        """
        if any(url.startswith("pipe:") for url in expand_urls(self.section.shards)):
            raise ConfigError(
                f"data.stream.shards {self.section.shards}: commands are never executed: give paths or URLs of shards"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names for the classes, which .cls only numbers."""
        return tuple(f"class-{label:05d}" for label in range(self.section.num_classes))

    @property
    def epoch_images(self) -> int:
        """Images of one epoch."""
        return self.section.samples

    @property
    def name(self) -> str:
        """The pattern of the shards, for messages."""
        return self.section.shards

    def cursor(self, position: int) -> Cursor:
        """What a checkpoint keeps of a position."""
        return Cursor(position, hashlib.sha256(self.section.shards.encode()).hexdigest(), self.seed, 1, 1)


@dataclass(frozen=True)
class StreamRecipe(TrainRecipe):
    """Training parts from a stream."""

    stream: Stream

    def cursor(self, position: int) -> Cursor:
        """The cursor at a position."""
        return self.stream.cursor(position)

    def parts(self, worker: int, workers: int) -> Iterator[Part]:
        """One worker's parts of all micro-batches, in their order.

        Raises:
            ShardError: a shard cannot be read, a label is none of the classes, or too many samples in a row are bad.
        """
        samples = self._samples(worker)
        for positions in self.requests(worker, workers):
            yield self._make(positions, samples)

    def _samples(self, worker: int) -> Iterator[dict[str, Any]]:
        section = self.stream.section
        key = int(hash64(self.stream.seed, STREAM, self.start_position, self.rank, worker))
        # Each worker goes through all shards in an order of its own: no rank can run out before another.
        urls = np.array(expand_urls(section.shards))
        orders = (urls[np.argsort(hash64(key, turn, np.arange(len(urls))))] for turn in itertools.count())
        open_folder = functools.cache(lambda folder: open_shards(folder, self.config.remote))
        shards = (_open(str(url), open_folder) for order in orders for url in order)
        return iter(shuffle(section.shuffle_buffer, seed=key)(group_by_keys(tar_file_expander(shards))))

    def _make(self, positions: NDArray[np.int64], samples: Iterator[dict[str, Any]]) -> Part:
        images = blank_images(len(positions), self.augmentation.img_size)
        labels = np.empty(len(positions), dtype=np.int64)
        substitutions: list[Substitution] = []
        draws = draw_crops(self.stream.seed, positions)
        for place, position in enumerate(positions.tolist()):
            images[place], labels[place], skipped = self._next(position, draws[place], samples)
            substitutions += skipped
        tensors = {
            "images": images,
            "labels": torch.from_numpy(labels),
            "samples": torch.full((len(positions),), -1, dtype=torch.int64),
        }
        return Part(tensors, self.augmentation.draw(positions), tuple(substitutions), Traffic())

    def _next(
        self, position: int, draws: Sequence[float], samples: Iterator[dict[str, Any]]
    ) -> tuple[Tensor, int, list[Substitution]]:
        """Image, label and skipped samples: the next readable one of the stream."""
        bad: list[tuple[str, str, str]] = []
        for _ in range(MAX_ATTEMPTS):
            try:
                sample = next(samples)
            except (OSError, ValueError, tarfile.TarError) as error:
                raise ShardError(f"{self.stream.section.shards}: cannot be read ({error}): check the shards") from None
            key, shard = sample["__key__"], sample["__url__"]
            try:
                image = self.crop(draws, _image_of(sample))
            except BadSample as error:
                bad.append((key, shard, str(error)))
                continue
            label = _label_of(sample, self.stream.section.num_classes)
            return image, label, [Substitution(position, k, s, reason, key) for k, s, reason in bad]
        key, shard, reason = bad[-1]
        raise ShardError(
            f"{shard}: {MAX_ATTEMPTS} samples in a row are bad, {key} the last ({reason}): check the shards"
        )


def _open(url: str, open_folder: Callable[[str], ShardBytes]) -> dict[str, Any]:
    """A shard as webdataset takes it; read by our own readers, as its own would start shell commands for a URL."""
    folder, _, name = url.rpartition("/")
    return {"url": url, "stream": io.BufferedReader(_ShardStream(open_folder(folder or "."), name), CHUNK_BYTES)}


class _ShardStream(io.RawIOBase):
    """A shard from its beginning to its end."""

    def __init__(self, shards: ShardBytes, name: str) -> None:
        self._shards, self._name = shards, name
        self._at, self._size = 0, shards.stat(name).size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._at)
        if count:
            buffer[:count] = self._shards.read(self._name, self._at, count)
        self._at += count
        return count


def _image_of(sample: dict[str, Any]) -> bytes:
    for extension in IMAGES:
        if extension in sample:
            return bytes(sample[extension])
    raise BadSample(f"it holds no image, only {', '.join(sorted(k for k in sample if not k.startswith('__')))}")


def _label_of(sample: dict[str, Any], num_classes: int) -> int:
    where = f"{sample['__url__']}: sample {sample['__key__']}"
    text = bytes(sample.get("cls", b"")).decode(errors="replace").strip()
    if not text.isdecimal():
        raise ShardError(f"{where}: {'no label' if not text else repr(text[:40])} in .cls: each sample needs a number")
    if int(text) >= num_classes:
        raise ShardError(f"{where}: label {text} is none of the {num_classes} classes: set data.stream.num_classes")
    return int(text)
