"""Small checkpoints for tests of the store and what stands on it: real files, made without an engine."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from vitscale.checkpoint import CheckpointStore, Manifest, rank_file_name, record_file

NUMEL = 64


def manifest_of(step: int, generation: int = 1, files=(), metrics=None, config=None, run_id="") -> Manifest:
    return Manifest(
        step=step, run_id=run_id, generation=generation, world_size=2, optimizer_steps=step,
        cursor={"position": 8 * step},
        config={"engine": {"kind": "deepspeed", "zero_stage": 2}} if config is None else config, model={}, labels=[],
        shapes={"w": [2, NUMEL]}, metrics=metrics or {}, versions={"torch": "2.14"},
        saved_at="2026-01-02T03:04:05+00:00", files=list(files),
    )  # fmt: skip


def stage(store: CheckpointStore, step: int, generation: int = 1, **known) -> tuple[Path, Manifest]:
    """What two ranks wrote, before the commit."""
    staging = store.staging(step, generation)
    files = []
    for rank in (0, 1):
        path = staging / rank_file_name(rank)
        value = torch.full((NUMEL,), step + rank / 2 + generation / 1000)
        keys = (f"w|{rank * NUMEL}|{value}" for value in ("master", "exp_avg"))
        save_file({key: value.clone() for key in keys}, path)
        files.append(record_file(path))
    return staging, manifest_of(step, generation, files, **known)


def save(store: CheckpointStore, step: int, generation: int = 1, **known) -> str:
    return store.commit(*stage(store, step, generation, **known))


def truncate(directory: Path) -> None:
    path = directory / rank_file_name(1)
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(directory: Path) -> None:
    path = directory / rank_file_name(1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
