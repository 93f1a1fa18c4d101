"""Images a second from bytes to a resized crop: this package's decoder beside the usual stacks.

Every way gets the same images and boxes and resizes with the same interpolation, in turn image by image, so
that a drift of the machine's speed hits all of them. Rates are of processor time: every way runs in one thread,
and what else the machine does counts for none of them.
"""

import importlib
import importlib.util
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitscale.data import turbojpeg
from vitscale.data.augment import crop_box, draw_crops
from vitscale.data.decode import Box, Interpolation, crop_resize, decode, decode_crop

BASELINE = "Pillow"
SIZE_PX = 224
CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)

Way = Callable[[bytes, Box], Tensor]


@dataclass(frozen=True)
class PhotoKind:
    """Photographs of one size."""

    name: str
    width: int
    height: int
    size_bytes: int


PHOTO_KINDS = (
    PhotoKind("400 x 350, 98 KB", 400, 350, 98_000),
    PhotoKind("500 x 375, 102 KB", 500, 375, 102_000),
    PhotoKind("341 x 256, 29 KB", 341, 256, 29_000),
    PhotoKind("1600 x 1200, 600 KB", 1600, 1200, 600_000),
)


@dataclass(frozen=True)
class DecodeRate:
    """What one way of decoding reached on one kind of images."""

    way: str
    kind: str
    images_per_s: float
    ratio: float  # to the baseline; the median over the rounds


def photographs(count: int, seed: int = 0) -> dict[str, list[bytes]]:
    """`count` JPEGs (4:2:0) of each kind, near its size in bytes, with the statistics of natural images.

    They are drawn as dead leaves: discs of all sizes that hide one another, which gives the edges and the
    1/f spectrum of photographs (Lee, Mumford and Huang 2001, Occlusion Models for Natural Images).
    """
    scenes = [_dead_leaves(1200, 1600, np.random.default_rng((seed, i))) for i in range(count)]
    return {
        kind.name: [_jpeg_of_size(s.resize((kind.width, kind.height), Image.Resampling.LANCZOS), kind) for s in scenes]
        for kind in PHOTO_KINDS
    }


def decode_ways(interpolation: Interpolation) -> dict[str, Way]:
    """The ways this machine offers, by name; the first is the baseline."""
    ways: dict[str, Way] = {
        BASELINE: partial(_pillow, interpolation=interpolation, draft=False),
        "Pillow, draft mode (other pixels)": partial(_pillow, interpolation=interpolation, draft=True),
    }
    if importlib.util.find_spec("cv2"):
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(1)
        flag = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[interpolation]
        ways["simplejpeg, cv2 (no antialiasing)"] = lambda data, box: _packed(
            cv2.resize(_cut(simplejpeg.decode_jpeg(data, strict=True), box), (SIZE_PX, SIZE_PX), interpolation=flag)
        )
    ways["vitscale, whole image"] = partial(_whole, interpolation=interpolation)
    if turbojpeg.find():
        ways["vitscale, TurboJPEG 3"] = partial(decode_crop, size_px=SIZE_PX, interpolation=interpolation)
    ways["vitscale, scaled (other pixels)"] = partial(
        decode_crop, size_px=SIZE_PX, interpolation=interpolation, scaled=True
    )
    return ways


def compare_decoders(
    images: Mapping[str, Sequence[bytes]], interpolation: Interpolation, rounds: int
) -> Iterator[DecodeRate]:
    """Time all ways on one core, each round with other boxes.

    Args:
        images: JPEGs of each kind.
        interpolation: of every way.
        rounds: times that each image is decoded; one more goes before and is not counted.

    Yields:
        Kind by kind, way by way.
    """
    ways = decode_ways(interpolation)
    with _one_torch_thread():
        for kind, files in images.items():
            seconds: dict[str, list[float]] = {name: [0.0] * (rounds + 1) for name in ways}
            for round_ in range(rounds + 1):
                for data, box in _with_boxes(files, round_):
                    for name, way in ways.items():
                        started_s = time.thread_time()
                        way(data, box)
                        seconds[name][round_] += time.thread_time() - started_s
            baseline = seconds[BASELINE][1:]
            for name in ways:
                counted = seconds[name][1:]
                ratio = statistics.median(b / t for b, t in zip(baseline, counted, strict=True))
                yield DecodeRate(name, kind, len(files) / statistics.median(counted), ratio)


def compare_concurrency(
    files: Sequence[bytes], interpolation: Interpolation, workers: int, rounds: int
) -> dict[str, float]:
    """Images a second by the clock, best of the rounds, of one thread, threads of one process, and processes.

    They decode whole images; the rate is that of all workers together.
    """
    with _one_torch_thread():
        context = multiprocessing.get_context("spawn")
        pools: dict[str, Executor] = {
            "1 thread": ThreadPoolExecutor(1),
            f"{workers} threads": ThreadPoolExecutor(workers),
            f"{workers} processes": ProcessPoolExecutor(
                workers, context, initializer=torch.set_num_threads, initargs=(1,)
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in pools}
        for round_ in range(rounds + 1):
            for name, pool in pools.items():
                jobs = [files] * (workers * 4)
                started_s = time.perf_counter()
                list(pool.map(partial(_decode_all, interpolation=interpolation, round_=round_), jobs))
                rates[name].append(len(jobs) * len(files) / (time.perf_counter() - started_s))
        for pool in pools.values():
            pool.shutdown()
    return {name: max(found[1:]) for name, found in rates.items()}


def _decode_all(files: Sequence[bytes], interpolation: Interpolation, round_: int) -> None:
    for data, box in _with_boxes(files, round_):
        _whole(data, box, interpolation)


def _with_boxes(files: Sequence[bytes], round_: int) -> Iterator[tuple[bytes, Box]]:
    for data, draws in zip(files, draw_crops(round_, np.arange(len(files))), strict=True):
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        yield data, crop_box(draws, height, width, CROP_SCALE, CROP_RATIO)


def _whole(data: bytes, box: Box, interpolation: Interpolation) -> Tensor:
    return crop_resize(decode(data), box, SIZE_PX, interpolation)


def _pillow(data: bytes, box: Box, interpolation: Interpolation, draft: bool) -> Tensor:
    image = Image.open(io.BytesIO(data))
    width = image.width
    if draft:
        image.draft("RGB", (image.width * SIZE_PX // box.width, image.height * SIZE_PX // box.height))
    scale = image.width / width
    edges = (box.left * scale, box.top * scale, (box.left + box.width) * scale, (box.top + box.height) * scale)
    left, top, right, bottom = (round(edge) for edge in edges)
    crop = image.convert("RGB").crop((left, top, right, bottom))
    return _packed(np.array(crop.resize((SIZE_PX, SIZE_PX), Image.Resampling[interpolation.upper()])))


def _cut(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def _packed(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _dead_leaves(height: int, width: int, random: np.random.Generator) -> Image.Image:
    """Discs with power-law radii, each with a colour, a gradient and a grain of its own."""
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = random.uniform(0, 255, 3)
    noise = random.standard_normal((height, width), np.float32)
    rows, columns = np.ogrid[:height, :width]
    for radius in np.sort(1 / random.uniform(1 / 600, 1 / 8, 1500))[::-1]:
        y, x = random.uniform(0, height), random.uniform(0, width)
        top, left = max(0, int(y - radius)), max(0, int(x - radius))
        patch = np.s_[top : int(y + radius) + 1, left : int(x + radius) + 1]
        dy, dx = rows[patch[0]] - y, columns[:, patch[1]] - x
        inside = dy**2 + dx**2 <= radius**2
        shade = (random.normal() * dy + random.normal() * dx) * (40 / radius)
        leaf = random.uniform(0, 255, 3) + (shade + random.uniform(0, 18) * noise[patch])[..., None]
        canvas[patch] = np.where(inside[..., None], leaf, canvas[patch])
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _jpeg_of_size(image: Image.Image, kind: PhotoKind) -> bytes:
    """The image at the highest quality that keeps it within the kind's size, by bisection."""
    low, high = 5, 98
    while low < high:
        middle = (low + high + 1) // 2
        if len(_jpeg(image, middle)) <= kind.size_bytes:
            low = middle
        else:
            high = middle - 1
    return _jpeg(image, low)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
