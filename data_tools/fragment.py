"""The proof that a shard is finished: train-000000.parquet beside train-000000.tar.

It holds the shard's rows of the index and, in its metadata, which plan it follows, the shard's size and SHA-256,
and the images that were rejected. It is written after the shard has its name and its bytes are on the disk.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from vitscale.data.index import INDEX_SCHEMA, sha256_of_file
from vitscale.errors import ShardError

METADATA_KEY = b"vitscale.shard"


class Reject(BaseModel):
    """An image that is not in the dataset, or is in it though it cannot be read: `bad` tells that one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    source: str
    wnid: str
    reason: str
    bad: bool


class ShardProof(BaseModel):
    """What a fragment says of its shard. A shard that lost all its images has no tar: `size_bytes` is 0.

    `plan` is the identity of the plan, `on_bad` what was done with bad images; it is empty where there are none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    size_bytes: int
    sha256: str
    on_bad: str
    rejects: tuple[Reject, ...]

    @property
    def bad(self) -> int:
        """Number of images that cannot be read."""
        return sum(reject.bad for reject in self.rejects)


def fragment_path(shard: Path) -> Path:
    """Where the fragment of a shard lies."""
    return shard.with_suffix(".parquet")


def write_fragment(shard: Path, rows: pa.Table, proof: ShardProof) -> None:
    """Write the fragment of a shard, whole or not at all.

    Raises:
        OSError: the disk is full or fails.
    """
    temporary = fragment_path(shard).with_suffix(f".parquet.{os.getpid()}.tmp")
    stored = {**INDEX_SCHEMA.metadata, METADATA_KEY: proof.model_dump_json().encode()}
    pq.write_table(rows.replace_schema_metadata(stored), temporary, compression="zstd")
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(fragment_path(shard))


def read_proof(shard: Path) -> ShardProof | None:
    """What the fragment of a shard says; None if it is missing or damaged, so that the shard is written again."""
    try:
        stored = pq.read_metadata(fragment_path(shard)).metadata or {}
        return ShardProof.model_validate_json(stored.get(METADATA_KEY, b""))
    except (OSError, pa.ArrowException, ValidationError):
        return None


def is_finished(shard: Path, plan: str, on_bad: str, recheck: bool) -> ShardProof | None:
    """The proof of a shard that need not be written again; None if it must.

    Args:
        shard: its path.
        plan: identity of the plan it must follow.
        on_bad: what to do with bad images, if it has any.
        recheck: compare the shard's bytes with their SHA-256, not its size alone.
    """
    proof = read_proof(shard)
    if proof is None or proof.plan != plan or (proof.bad and proof.on_bad != on_bad):
        return None
    if proof.size_bytes == 0:
        return proof
    if not shard.is_file() or shard.stat().st_size != proof.size_bytes:
        return None
    if recheck and sha256_of_file(shard) != proof.sha256:
        return None
    return proof


def read_fragment(shard: Path) -> pa.Table:
    """Rows of a shard's index.

    Raises:
        ShardError: the fragment is damaged.
    """
    try:
        return pq.read_table(fragment_path(shard)).replace_schema_metadata(INDEX_SCHEMA.metadata)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{fragment_path(shard)}: damaged ({error}): remove it and build again") from None
