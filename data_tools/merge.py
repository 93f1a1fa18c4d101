"""Turns finished shards into a dataset: checks every fragment against the plan, then writes the split indexes,
rejects.parquet and, last of all, dataset.json.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.fragment import ShardProof, is_finished, read_fragment, read_proof
from data_tools.parts import LOCK_FILE, PART_LOCKS
from data_tools.plan_file import Plan
from data_tools.sources.spool import remove_spool
from vitscale.data.index import ShardFile, SplitFiles, write_dataset_json, write_split
from vitscale.errors import ShardError

REJECTS_FILE = "rejects.parquet"
REJECTS_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "source", "wnid", "shard", "reason")])


def merge(out: Path, plan: Plan, *, keep_spool: bool) -> None:
    """Make a finished dataset of a folder whose shards are all written.

    Raises:
        ShardError: a shard is missing, or all images were rejected.
        OSError: the disk is full or fails.
    """
    proofs = _proofs(out, plan)
    splits = {}
    for split in ("train", "val"):
        written = [name for name, proof in proofs.items() if name.startswith(f"{split}-") and proof.size_bytes]
        if written:
            splits[split] = _merge_split(out, split, {name: proofs[name] for name in written}, plan.classes)
    if not splits:
        raise ShardError(f"{out}: every image was rejected, nothing is left to build: check the source")
    _write_rejects(out, proofs)
    write_dataset_json(
        out,
        seed=plan.settings.seed,
        plan=plan.identity,
        classes=plan.classes,
        splits=splits,
        label_space=plan.label_space,
    )
    tidy(out, keep_spool=keep_spool)


def tidy(out: Path, *, keep_spool: bool) -> None:
    """Remove what only an unfinished build needs."""
    if not keep_spool:
        remove_spool(out)
    for lock in (out / LOCK_FILE, *out.glob(PART_LOCKS)):
        lock.unlink(missing_ok=True)


def _proofs(out: Path, plan: Plan) -> dict[str, ShardProof]:
    """What the fragments say, by shard, in the order of the plan."""
    proofs: dict[str, ShardProof] = {}
    missing = []
    for shard in plan.shards:
        proof = read_proof(out / shard.name)
        if proof and is_finished(out / shard.name, plan.identity, proof.on_bad, recheck=False):
            proofs[shard.name] = proof
        else:
            missing.append(shard.name)
    if missing:
        raise ShardError(
            f"{out}: {len(missing)} of {len(plan.shards)} shards are not finished, the first is {missing[0]}: "
            "run `vitscale-data build` of the missing parts again"
        )
    rules = sorted({proof.on_bad for proof in proofs.values() if proof.bad})
    if len(rules) > 1:
        raise ShardError(
            f"{out}: parts were built with --on-bad {' and '.join(rules)}: build all parts again with one of them"
        )
    return proofs


def _merge_split(out: Path, split: str, proofs: dict[str, ShardProof], classes: Sequence[str]) -> SplitFiles:
    tables = [read_fragment(out / name) for name in proofs]
    shards = [
        ShardFile(name=name, size_bytes=proof.size_bytes, samples=len(rows), sha256=proof.sha256)
        for (name, proof), rows in zip(proofs.items(), tables, strict=True)
    ]
    return write_split(out, split, classes, pa.concat_tables(tables), shards)


def _write_rejects(out: Path, proofs: dict[str, ShardProof]) -> None:
    rows = [
        {**reject.model_dump(include={"key", "source", "wnid", "reason"}), "shard": name}
        for name, proof in proofs.items()
        for reject in proof.rejects
    ]
    # Empty where no image is bad: then every rule gives the same dataset.
    on_bad = next((proof.on_bad for proof in proofs.values() if proof.bad), "")
    table = pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA.with_metadata({"on_bad": on_bad}))
    pq.write_table(table, out / REJECTS_FILE, compression="zstd")
