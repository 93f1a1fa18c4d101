"""The config of the data plane: which samples, in which order, read from where, and how they become batches."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vitscale.config.augment import AugmentSection
from vitscale.config.remote import RemoteSection
from vitscale.config.section import RGB, AboveZero, Count, Fraction, Positive, Section


class SplitSection(Section):
    """One split of one built dataset."""

    path: str
    """Folder or URL of what `vitscale-data build` or `index` wrote (it holds dataset.json)."""
    split: str
    """Name of the split in dataset.json, such as train or val."""


class SourceSection(SplitSection):
    """One of several sources that are mixed."""

    weight: AboveZero | None = None
    """Share of the stream, relative to the other weights; all sources in proportion to their samples when left out."""


class StreamSection(Section):
    """Shards without an index, streamed as they are: neither an exact resume nor exact epochs."""

    shards: str
    """Where the shards are: a path or URL with braces, such as data/train-{000000..001023}.tar."""
    num_classes: Positive
    """Number of classes that the labels (.cls) count."""
    samples: Positive
    """Samples that count as one epoch."""
    shuffle_buffer: Positive = 5000
    """Samples each worker holds to shuffle among."""


class DataSection(Section):
    """Which samples, in which order, and how they become batches."""

    train: SplitSection | None = None
    """Training split; give this, `mix` or `stream`."""
    mix: tuple[SourceSection, ...] = ()
    """Training splits that are mixed by weight; every source is seen in exact epochs of its own."""
    stream: StreamSection | None = None
    """Training shards that have no index."""
    val: SplitSection | None = None
    """Validation split; no validation when left out."""
    label_space: str | None = None
    """Label space to train in, such as in21k_p_fall11; the datasets' own when left out. Samples of other classes are
    left out."""
    lanes: Positive = 64
    """Canonical data streams of the order, fixed for the life of the run."""
    block: Positive = 64
    """Neighbouring samples that one lane reads in sequence; 1 shuffles sample by sample (small sets)."""
    workers: Count = 4
    """Loader processes of each rank; 0 decodes in the training process."""
    prefetch_batches: Positive = 4
    """Micro-batches that are held ready."""
    read_ahead_mb: Positive = 1024
    """Memory for the bytes that a rank reads ahead, in MiB; whole blocks of its lanes should fit in half of it."""
    remote: RemoteSection = RemoteSection()
    crop_scale: tuple[Fraction, Fraction] = (0.05, 1.0)
    """Area of a training crop as a fraction of the image: least, most (inception crop)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a training crop: least, most."""
    scaled_decode: bool = False
    """Let the JPEG decoder halve large images before the training crop is resized: faster, but other pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip in training."""
    augment: AugmentSection = AugmentSection()
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of every resize."""
    val_crop: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Side of the validation's centre crop over the resized image's shorter side."""
    mean: RGB = (0.5, 0.5, 0.5)
    """Mean that is taken from the pixels, in units of 0 to 1."""
    std: tuple[AboveZero, AboveZero, AboveZero] = (0.5, 0.5, 0.5)
    """Standard deviation the pixels are divided by, in units of 0 to 1."""
    bad_sample_budget: Count = 100
    """Unreadable samples that may be replaced before the run stops with a ShardError."""

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """The indexed training splits: those of `mix`, or `train` alone."""
        if self.train is not None:
            return (SourceSection(path=self.train.path, split=self.train.split),)
        return self.mix

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Weights of the sources; None for a share in proportion to their samples."""
        return tuple(source.weight for source in self.mix if source.weight is not None) or None

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> Self:
        if sum((self.train is not None, bool(self.mix), self.stream is not None)) != 1:
            raise ValueError("give exactly one of train, mix and stream")
        if len({source.weight is None for source in self.mix}) == 2:
            raise ValueError("mix: give a weight to every source or to none")
        if self.lanes < len(self.mix):
            raise ValueError(f"lanes {self.lanes} is fewer than the {len(self.mix)} sources of mix: raise it")
        return self

    @model_validator(mode="after")
    def _crops(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"crop_scale [{low}, {high}]: give 0 < least <= most <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio [{low}, {high}]: give 0 < least <= most")
        return self
