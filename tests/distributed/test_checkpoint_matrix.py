"""Every layout's checkpoint into every other layout: the state bitwise, then losses against an oracle's.

A layout is an engine, a ZeRO stage and a number of ranks; accumulation changes with both. The losses at the layout
that saved are those of the run that was never interrupted, bitwise.
"""

from typing import NamedTuple

import pytest
import torch
from distributed_runner import run_distributed_test
from engine_cases import ADAMW, GLOBAL_BATCH, build, manifest_of, micro_batches, micro_model, save, train
from recorded_gradients import assemble, state_of

from vitscale.checkpoint import Manifest, read_fragments, record_file, stored_weights, write_index
from vitscale.config import AverageSection, OptimSection

WORLD_SIZES = (1, 2, 3, 4)
BEFORE = range(4)
"""Steps up to the save."""
AVERAGED = AverageSection(decay=0.9, every_steps=2)
CASES = {
    "adamw": {"optim": ADAMW},
    "averaged adafactor": {"optim": OptimSection(kind="adafactor", peak_lr=1e-3), "average": AVERAGED},
    "averaged lamb": {"optim": OptimSection(kind="lamb", peak_lr=1e-3, weight_decay=0.1), "average": AVERAGED},
    "bf16": {"optim": ADAMW, "precision": "bf16"},
}


class Layout(NamedTuple):
    """Where training state lies."""

    case: str
    kind: str
    stage: int
    world_size: int

    @property
    def micro_batch(self):
        """Images a rank and pass; the accumulation is 1 or 2."""
        return GLOBAL_BATCH // (self.world_size * (2 - (self.stage + self.world_size) % 2))

    @property
    def folder(self):
        return "-".join(map(str, self)).replace(" ", "-")

    def build(self, rank):
        return build(self.kind, self.stage, rank, self.world_size, micro_batch=self.micro_batch, **CASES[self.case])

    def losses(self, engine, steps, rank):
        return [loss for loss, _ in train(engine, steps, rank, self.world_size, self.micro_batch)]


LAYOUTS = [
    *(Layout("adamw", "deepspeed", stage, world_size) for stage in range(4) for world_size in WORLD_SIZES),
    *(Layout("adamw", "torch", 0, world_size) for world_size in WORLD_SIZES),
    Layout("averaged adafactor", "torch", 0, 1),
    Layout("averaged adafactor", "deepspeed", 1, 2),
    Layout("averaged adafactor", "deepspeed", 3, 3),
    Layout("averaged adafactor", "deepspeed", 2, 4),
    Layout("averaged lamb", "deepspeed", 3, 1),
    Layout("averaged lamb", "deepspeed", 2, 2),
    Layout("averaged lamb", "torch", 0, 3),
    Layout("bf16", "deepspeed", 3, 1),
    Layout("bf16", "deepspeed", 1, 2),
    Layout("bf16", "deepspeed", 2, 3),
]


class Saved(NamedTuple):
    """What is known of a checkpoint without reading it."""

    manifest: Manifest
    state: dict
    """(parameter, value) -> all its elements."""


def at(world_size):
    return [layout for layout in LAYOUTS if layout.world_size == world_size]


def _save_all(rank, world_size, folder, after):
    found = []
    for layout in at(world_size):
        engine = layout.build(rank)
        layout.losses(engine, BEFORE, rank)
        steps = save(engine, folder / layout.folder, rank)
        logits = engine.predict(next(micro_batches(0, 0, 1))[0])
        found.append((steps, state_of(engine), logits, layout.losses(engine, after, rank)))
    return found


def _load_all(rank, world_size, folder, saved, trained, after):
    """By (from, to): how many elements of each value this rank was given and writes, and its losses if it goes on."""
    found = {}
    for layout in at(world_size):
        engine = layout.build(rank)
        sources = [source for source in saved if source.case == layout.case]
        own = sources.index(layout)
        for shift, source in enumerate(sources[own:] + sources[:own]):  # its own goes into the fresh engine
            read_fragments(engine.fragments(), folder / source.folder, saved[source].manifest)
            engine.state_loaded(len(BEFORE))
            counted = _compare(engine, saved[source].state)
            losses = layout.losses(engine, after, rank) if shift in trained else None
            found[source, layout] = counted, losses
    return found


def _compare(engine, state):
    counted = dict.fromkeys(state, 0)
    for fragment in engine.fragments():
        for key, value in fragment.values.items():
            expected = state[fragment.name, key][fragment.offset : fragment.offset + value.numel()]
            assert torch.equal(value, expected), (fragment.name, key)
            counted[fragment.name, key] += value.numel() * fragment.saved_here
    return counted


def oracle_losses(case, saved, after):
    """Of one process with plain fp32 torch, whose state was never on a disk."""
    engine = build("torch", 0, 0, 1, **{**CASES[case], "precision": "fp32"})
    for fragment in engine.fragments():
        for key, value in fragment.values.items():
            value.copy_(saved.state[fragment.name, key])
    engine.state_loaded(len(BEFORE))
    return [loss for loss, _ in train(engine, after, 0, 1)]


@pytest.mark.parametrize(
    ("world_sizes", "trained", "steps"),  # places in the list of tags, counted from the layout's own; steps after each
    [
        # The layout's own, and one of another stage, number of ranks and accumulation.
        pytest.param((1, 2, 3), (0, 7), 4, marks=pytest.mark.timeout(600), id="some"),
        pytest.param(
            WORLD_SIZES, range(len(LAYOUTS)), 10, marks=[pytest.mark.slow, pytest.mark.timeout(2000)], id="all"
        ),
    ],
)
@pytest.mark.fault(11, 12)
def test_every_layouts_checkpoint_goes_on_in_every_other_layout(tmp_path, world_sizes, trained, steps):
    after = range(len(BEFORE), len(BEFORE) + steps)
    saved, onward = {}, {}
    for world_size in world_sizes:
        by_rank = run_distributed_test(_save_all, world_size, tmp_path, after)
        for layout, *outcomes in zip(at(world_size), *by_rank, strict=True):
            counts, states, logits, losses = zip(*outcomes, strict=True)
            assert set(counts) == {len(BEFORE)}
            directory = tmp_path / layout.folder
            index = record_file(write_index(directory, world_size))
            manifest = manifest_of(world_size, len(BEFORE)).model_copy(update={"files": [index]})
            saved[layout] = Saved(manifest, assemble(states))
            onward[layout] = losses
            if layout.case == "adamw":
                assert_exports(directory, manifest, logits[0])
    expected = {layout: oracle_losses(layout.case, tag, after) for layout, tag in saved.items()}

    for world_size in world_sizes:
        by_rank = run_distributed_test(_load_all, world_size, tmp_path, saved, trained, after, timeout_s=1000)
        for source, layout in by_rank[0]:
            case = f"{source} -> {layout}"
            counts, losses = zip(*(found[source, layout] for found in by_rank), strict=True)
            for what, value in saved[source].state.items():
                assert sum(count[what] for count in counts) == value.numel(), (case, what)
            if source == layout:
                assert losses == onward[layout], case
            if losses[0] is None:
                continue
            mean = [sum(of_step) / world_size for of_step in zip(*losses, strict=True)]
            # bf16 has 8 bits of mantissa.
            tolerance = 2e-2 if layout.case == "bf16" else 1e-5
            assert mean == pytest.approx(expected[source], rel=tolerance), case


def assert_exports(directory, manifest, logits):
    """The checkpoint's weights without any engine give what the engine gave."""
    model = micro_model().eval()
    model.load_state_dict(stored_weights(directory, manifest))
    with torch.no_grad():
        torch.testing.assert_close(model(next(micro_batches(0, 0, 1))[0]), logits, rtol=0, atol=1e-6)
