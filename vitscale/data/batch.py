"""What a loader hands over: micro-batches, the cursor to resume from, and the samples that were replaced."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from numpy.typing import NDArray
from torch import Tensor

from vitscale.errors import CheckpointError


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its data: position = images seen; the rest names the order it is a position of."""

    position: int
    dataset: str
    seed: int
    lanes: int
    block: int
    repeats: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**values)


def check_cursor(saved: Cursor, now: Cursor, name: str) -> None:
    """Make sure that a saved position means the same samples now as in the run that saved it.

    Args:
        saved: of the checkpoint.
        now: the same position in this run.
        name: what this run trains on, for the message.

    Raises:
        CheckpointError: it belongs to another dataset, seed, lanes, block or number of repeats.
    """
    if saved.dataset != now.dataset:
        raise CheckpointError(
            f"{name}: not the data the checkpoint was trained on (hash {now.dataset[:12]}, not {saved.dataset[:12]}): "
            "point data.train or data.mix at that data"
        )
    for field, key in (
        ("seed", "run.seed"),
        ("lanes", "data.lanes"),
        ("block", "data.block"),
        ("repeats", "data.augment.repeats"),
    ):
        before, after = getattr(saved, field), getattr(now, field)
        if before != after:
            raise CheckpointError(f"{key} is {after}, the checkpoint's data order has {before}: set {key}={before}")


@dataclass(frozen=True)
class Substitution:
    """A sample that could not be read, and the key of the one delivered in its place.

    `replaced_by` is empty in evaluation, where a bad sample is left out (valid=False), because a replacement
    would be counted twice.
    """

    position: int
    key: str
    shard: str
    reason: str
    replaced_by: str


@dataclass(frozen=True)
class Traffic:
    """What loader processes moved so far."""

    read_bytes: int = 0
    """Bytes read from the shards."""
    used_bytes: int = 0
    """Bytes of images among them."""
    reads: int = 0
    """Ranges that they were read in."""

    def __add__(self, other: Self) -> Self:
        """Both together."""
        return type(self)(
            self.read_bytes + other.read_bytes, self.used_bytes + other.used_bytes, self.reads + other.reads
        )


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B images of S x S pixels.

    `samples` are the rows of the index that were delivered, after substitution; in evaluation the positions
    are the rows too. Entries with valid=False are to be left out of every sum: padding (position and sample
    -1) and, in evaluation, bad samples.
    """

    images: Tensor  # uint8 [B, 3, S, S], channels last in memory, page-locked where there is a GPU
    labels: Tensor  # int64 [B]
    positions: Tensor  # int64 [B]
    samples: Tensor  # int64 [B]
    valid: Tensor  # bool [B]
    substitutions: tuple[Substitution, ...]


@dataclass(frozen=True)
class TrainBatch(Batch):
    """A training micro-batch; its cursor is where the run stands once the whole step it belongs to is done.

    `drawn` is what augmentation drew for its images; `traffic` what the rank's loader has moved since it began.
    """

    drawn: dict[str, NDArray[Any]]
    cursor: Cursor
    traffic: Traffic
