"""Images a second from shards to training batches: this package's loader beside the usual ones.

All read the same photographs, crop and flip them at random, resize with the same filter, and run as many worker
processes. What each gives is measured twice: as uint8, which leaves the rest to the device, and as normalised
float32, the habit of most training code. Contenders take turns, several rounds, each time in a fresh process.
"""

import importlib
import importlib.util
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from vitscale.bench.photo_dataset import SPLIT
from vitscale.config import BatchSplit, DataSection
from vitscale.data.augment import Augmentation
from vitscale.data.augment.pipeline import mirror
from vitscale.data.loader import TrainLoader
from vitscale.data.mixture import Mixture, Samples
from vitscale.data.recipes import MixtureRecipe
from vitscale.data.split import open_split

Form = Literal["uint8", "float32"]
Batches = Generator[Tensor, None, None]
FORMS: tuple[Form, ...] = ("uint8", "float32")
OURS = "vitscale"

SIZE_PX = 224
CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN = STD = (0.5, 0.5, 0.5)
SHUFFLE_BUFFER = 500
ENDLESS = 10**7


@dataclass(frozen=True)
class Photos:
    """A dataset in both formats, and how it is to be read; `mds` is a folder in Streaming's format."""

    folder: Path
    mds: Path | None
    batch: int
    workers: int

    @property
    def shards(self) -> list[str]:
        """Paths of the tars."""
        return sorted(str(path) for path in self.folder.glob("*.tar"))


class Speed(NamedTuple):
    """Of one turn of one loader."""

    images_per_s: float
    cpu_ms: float


@dataclass(frozen=True)
class LoaderRate:
    """What one loader reached in one form."""

    loader: str
    form: Form
    images_per_s: float
    cpu_ms: float  # processor time an image, of all processes: what else the machine does counts for little
    ours_over_it: float  # in images a second
    ours_over_it_cpu: float  # in images a second of processor time


def compare_loaders(
    photos: Photos, loaders: Sequence[str], rounds: int, seconds: float, say: Callable[[str], None]
) -> Iterator[LoaderRate]:
    """Measure the loaders in turn, round by round, each for some seconds after as many of warming up.

    Yields:
        Form by form, loader by loader; the ratios need this package's among the loaders.
    """
    for form in FORMS:
        found: dict[str, list[Speed]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, speeds in found.items():
                say(f"{form}: {name}")
                speeds.append(in_a_fresh_process(speed_of, name, photos, form, seconds))
        for name, speeds in found.items():
            pairs = list(zip(found[OURS], speeds, strict=True))
            yield LoaderRate(
                loader=name,
                form=form,
                images_per_s=statistics.median(its.images_per_s for its in speeds),
                cpu_ms=statistics.median(its.cpu_ms for its in speeds),
                ours_over_it=statistics.median(ours.images_per_s / its.images_per_s for ours, its in pairs),
                ours_over_it_cpu=statistics.median(its.cpu_ms / ours.cpu_ms for ours, its in pairs),
            )


def available_loaders() -> list[str]:
    """Names of the loaders whose libraries are installed; the first is this package's."""
    return [name for name, (libraries, _) in LOADERS.items() if all(map(importlib.util.find_spec, libraries))]


def speed_of(name: str, photos: Photos, form: Form, seconds: float) -> Speed:
    """The speed of one loader, once its queues no longer feed on what was ready before."""
    _, open_loader = LOADERS[name]
    with closing(open_loader(photos, form)) as batches:
        _take(batches, seconds)
        return _take(batches, seconds)


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives in an interpreter that has done nothing else.

    It computes in one thread: the other cores belong to the workers, and idle threads of torch would spin on them.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *arguments).result()


def write_mds(photos: Path, out: Path) -> None:
    """The images of a dataset in the format of MosaicML Streaming, byte for byte."""
    streaming = importlib.import_module("streaming")
    index = open_split(photos, SPLIT)
    with streaming.MDSWriter(out=str(out), columns={"jpeg": "bytes", "cls": "int"}) as writer:
        for row in range(len(index)):
            with Path(index.shard_path(row)).open("rb") as shard:
                shard.seek(index.offset[row])
                writer.write({"jpeg": shard.read(index.size[row]), "cls": int(index.label[row])})


def train_recipe(
    folder: Path, section: DataSection, split: BatchSplit, rank: int = 0, start_position: int = 0
) -> MixtureRecipe:
    """What this package's loader makes of one dataset."""
    mixture = Mixture(Samples((open_split(folder, SPLIT),)), None, 0, section.lanes, section.block)
    augmentation = Augmentation(section.augment, 0, SIZE_PX, section.flip, MEAN, STD)
    return MixtureRecipe(section, augmentation, split, rank, start_position, mixture)


def section_for(folder: Path, **settings: Any) -> DataSection:
    """A data section over one dataset, with the crops that all loaders share."""
    train = {"path": str(folder), "split": SPLIT}
    return DataSection.model_validate({"train": train, "crop_scale": CROP_SCALE, "crop_ratio": CROP_RATIO, **settings})


def _take(batches: Batches, seconds: float) -> Speed:
    images, started_s, started_cpu_s = 0, time.perf_counter(), _cpu_s()
    while not images or time.perf_counter() - started_s < seconds:
        images += len(next(batches))
    passed_s = time.perf_counter() - started_s
    return Speed(images / passed_s, (_cpu_s() - started_cpu_s) / images * 1e3)


def _cpu_s() -> float:
    """Processor time of this process and all below it."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def _open_vitscale(photos: Photos, form: Form) -> Batches:
    section = section_for(photos.folder, workers=photos.workers, lanes=8)
    recipe = train_recipe(photos.folder, section, BatchSplit(photos.batch, photos.batch, 1, 1))
    loader = TrainLoader(recipe)
    try:
        for batch in loader:
            # Others flip in their workers, so it counts here too.
            if form == "uint8":
                yield mirror(batch.images, torch.from_numpy(batch.drawn["flip"]))
            else:
                yield recipe.augmentation.apply(batch.images, batch.labels, batch.drawn)[0]
    finally:
        loader.close()


def _open_webdataset(photos: Photos, form: Form) -> Batches:
    dataset = webdataset.WebDataset(photos.shards, shardshuffle=len(photos.shards))
    samples = (
        dataset.shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("jpeg", "cls")
        .map_tuple(_torchvision_transform(form), int)
        .batched(photos.batch)
        .repeat()
    )
    for images, _ in webdataset.WebLoader(samples, batch_size=None, num_workers=photos.workers):
        yield images


def _open_timm(photos: Photos, form: Form) -> Batches:
    data = importlib.import_module("timm.data")
    dataset = data.create_dataset(
        "wds/photos",
        root=str(photos.folder),
        split=f"{SPLIT}-{{000000..{len(photos.shards) - 1:06d}}}.tar",
        is_training=True,
        batch_size=photos.batch,
        num_samples=ENDLESS,
        input_key="jpeg;jpg",  # the second is what it calls the decoded image
        sample_shuffle_size=SHUFFLE_BUFFER,
        sample_initial_size=SHUFFLE_BUFFER,
    )
    loader = data.create_loader(
        dataset,
        SIZE_PX,
        photos.batch,
        is_training=True,
        scale=CROP_SCALE,
        ratio=CROP_RATIO,
        color_jitter=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=photos.workers,
        device=torch.device("cpu"),
    )
    for images, _ in loader if form == "float32" else loader.loader:
        yield images


def _open_streaming(photos: Photos, form: Form) -> Batches:
    streaming = importlib.import_module("streaming")
    dataset = streaming.StreamingDataset(
        local=str(photos.mds), shuffle=True, batch_size=photos.batch, num_canonical_nodes=1, epoch_size=ENDLESS // 10
    )
    decoded = _Decoded(dataset, _torchvision_transform(form))
    for images, _ in DataLoader(decoded, batch_size=photos.batch, num_workers=photos.workers):
        yield images


class _Decoded(IterableDataset[Any]):
    """Images and labels of samples that hold a JPEG's bytes."""

    def __init__(self, samples: Any, transform: Callable[[Image.Image], Tensor]) -> None:
        self._samples, self._transform = samples, transform

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for sample in self._samples:
            yield self._transform(Image.open(io.BytesIO(sample["jpeg"])).convert("RGB")), sample["cls"]


def _torchvision_transform(form: Form) -> Callable[[Image.Image], Tensor]:
    transforms = importlib.import_module("torchvision.transforms")
    steps = [transforms.RandomResizedCrop(SIZE_PX, CROP_SCALE, CROP_RATIO), transforms.RandomHorizontalFlip()]
    if form == "uint8":
        steps.append(transforms.PILToTensor())
    else:
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


LOADERS: dict[str, tuple[tuple[str, ...], Callable[[Photos, Form], Batches]]] = {
    OURS: ((), _open_vitscale),
    "webdataset + torchvision": (("torchvision",), _open_webdataset),
    "timm, wds reader": (("timm",), _open_timm),
    "MosaicML Streaming + torchvision": (("streaming", "torchvision"), _open_streaming),
}
"""Each loader's libraries beyond those that this package needs, and how to open it."""
