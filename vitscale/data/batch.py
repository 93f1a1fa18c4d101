"""What a loader hands over: micro-batches, the cursor to resume from, and the samples that were replaced."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from torch import Tensor

from vitscale.data.index import SplitIndex
from vitscale.errors import CheckpointError


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its data: position = images seen; the rest names the order it is a position of."""

    position: int
    dataset: str
    seed: int
    lanes: int
    block: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**values)


def check_cursor(cursor: Cursor, index: SplitIndex, seed: int, lanes: int, block: int) -> None:
    """Make sure that a cursor's position means the same samples in this run as in the run that saved it.

    Raises:
        CheckpointError: it belongs to another dataset, seed, lanes or block.
    """
    if cursor.dataset != index.hash:
        raise CheckpointError(
            f"{index.root}: split {index.split} is not the data the checkpoint was trained on "
            f"(hash {index.hash[:12]}, not {cursor.dataset[:12]}): point data.train at that data"
        )
    for name, saved, now in (
        ("run.seed", cursor.seed, seed),
        ("data.lanes", cursor.lanes, lanes),
        ("data.block", cursor.block, block),
    ):
        if saved != now:
            raise CheckpointError(f"{name} is {now}, the checkpoint's data order has {saved}: set {name}={saved}")


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
class Batch:
    """A micro-batch of B images of S x S pixels.

    `samples` are the rows of the index that were delivered, after substitution; in evaluation the positions
    are the rows too. Entries with valid=False are to be left out of every sum: padding (position and sample
    -1) and, in evaluation, bad samples.
    """

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    flips: Tensor  # bool [B]
    positions: Tensor  # int64 [B]
    samples: Tensor  # int64 [B]
    valid: Tensor  # bool [B]
    substitutions: tuple[Substitution, ...]

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; DataLoader's pin_memory calls this."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


@dataclass(frozen=True)
class TrainBatch(Batch):
    """A training micro-batch; its cursor is where the run stands once the whole step it belongs to is done."""

    cursor: Cursor
