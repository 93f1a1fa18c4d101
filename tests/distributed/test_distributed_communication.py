"""What travels between ranks at each ZeRO stage, and that every way to partition trains as one process does."""

import statistics

import pytest
import torch
import torch.distributed as dist
from distributed_runner import run_distributed_test
from engine_cases import GLOBAL_BATCH, MICRO_BATCH, load, micro_batches, micro_model, save, train

from vitscale.bench.communication import measure
from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import MASTER, create_engine, record_communication
from vitscale.losses import classification_loss
from vitscale.optim import parameter_groups
from vitscale.ranks.groups import Ranks

WAYS = {
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 3": {"zero_stage": 3},
    "stage 2, overlapped": {"zero_stage": 2, "overlap_comm": True},
    "stage 3, overlapped": {"zero_stage": 3, "overlap_comm": True},
    "stage 2, offloaded": {"zero_stage": 2, "offload": "optimizer"},
    "stage 3, offloaded": {"zero_stage": 3, "offload": "optimizer"},
    "stage 3, all offloaded": {"zero_stage": 3, "offload": "optimizer_and_params", "offload_pin_memory": False},
    "stage 3, second partition": {"zero_stage": 3, "hpz": 2},
}


def build(rank, world_size, *, micro_batch=MICRO_BATCH, seed=0, **settings):
    model = micro_model(seed)
    engine = EngineSection.model_validate({"precision": "fp32", "bucket_elements": 10_000} | settings)
    return create_engine(
        model,
        torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95)),
        classification_loss("softmax", 0.1),
        engine,
        split=BatchSplit(GLOBAL_BATCH, micro_batch, GLOBAL_BATCH // (micro_batch * world_size), world_size),
        clip_norm=0.5,
        device=torch.device("cpu"),
        rank=rank,
    )


def _known_collectives(rank, world_size):
    """A record of collectives whose sizes are known, another of one part of them, and what was seen outside."""
    tensor, whole = torch.ones(30), torch.zeros(30 * world_size)
    with record_communication() as everything:
        dist.all_reduce(tensor)
        with record_communication() as part:
            dist.all_gather_into_tensor(whole, tensor)
            dist.all_gather(list(torch.zeros(world_size, 30)), tensor)
            dist.reduce_scatter_tensor(tensor, whole)
        dist.all_reduce(tensor, async_op=True).wait()
        dist.reduce(tensor, 0)
        dist.broadcast(tensor, 0)
        dist.all_to_all_single(torch.zeros(30), tensor)
        dist.barrier()
    seconds = everything.seconds(), part.seconds()
    dist.all_reduce(tensor)
    return everything.by_kind, part.by_kind, seconds, dist.ProcessGroup.allreduce.__module__, everything.seconds()


def _measured(rank, world_size):
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    return measure(ranks, precision="bf16"), measure(ranks, precision="fp32", grad_accums=(1,), depth=9)


def _counted(rank, world_size):
    return _known_collectives(rank, world_size), *_measured(rank, world_size)


@pytest.fixture(scope="module")
def counted():
    return run_distributed_test(_counted, 2)


def test_collectives_of_known_size_are_counted_once_each(counted):
    for (everything, part, seconds, _, _), _, _ in counted:
        payload = {kind: (t.calls, t.payload_bytes, t.wire_bytes) for kind, t in everything.items()}
        assert payload == {
            "all_reduce": (2, 240, 240.0),
            "all_gather": (2, 480, 240.0),
            "reduce_scatter": (1, 240, 120.0),
            "reduce": (1, 120, 60.0),
            "broadcast": (1, 120, 60.0),
            "all_to_all": (1, 120, 60.0),
            "barrier": (1, 0, 0.0),
        }
        assert {kind: traffic.calls for kind, traffic in part.items()} == {"all_gather": 2, "reduce_scatter": 1}
        assert 0 < seconds[1] < seconds[0]


def test_nothing_is_recorded_or_patched_after_the_block(counted):
    for (_, _, seconds, module, later_s), _, _ in counted:
        assert later_s == seconds[0]
        assert module != "vitscale.engine.communication"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_payload_of_a_step_is_what_zero_promises(counted, stage):
    for _, bf16, fp32 in counted:
        for row in (row for row in [*bf16, *fp32] if row.zero_stage == stage):
            element = 2 if row.precision == "bf16" else 4
            sent = {kind: t.payload_bytes / row.parameters / element for kind, t in row.by_kind.items()}
            case = row.precision, stage, row.grad_accum
            if stage < 3:
                # Gradients: all-reduced, not reduce-scattered, after the last micro-step or after each. Weights: once.
                assert sent["all_reduce"] == pytest.approx(row.grad_accum if stage == 2 else 1, rel=1e-3), case
                assert sent["all_gather"] == pytest.approx(1, rel=1e-3), case
            else:
                assert sent["reduce_scatter"] == pytest.approx(row.grad_accum, rel=1e-3), case
                # In forward and in backward, but for what is kept from one to the other.
                assert row.grad_accum < sent["all_gather"] <= 2 * row.grad_accum * 1.001, case
                assert sent["all_reduce"] < 1e-3, case
            assert set(sent) <= {"all_reduce", "all_gather", "reduce_scatter"}
            # Two ranks: all-reduces send their payload, the others half of it.
            halves = sum(t.payload_bytes * (1 if kind == "all_reduce" else 0.5) for kind, t in row.by_kind.items())
            assert row.wire_bytes_a_parameter * row.parameters == pytest.approx(halves), case


def test_a_block_is_gathered_once_a_direction(counted):
    _, bf16, fp32 = counted[0]
    shallow = {row.grad_accum: row.gathers for row in bf16 if row.zero_stage == 3}
    (deep,) = (row.gathers for row in fp32 if row.zero_stage == 3)
    print(f"gathers a step: 6 blocks {shallow[1]}, with accumulation 3 {shallow[3]}; 9 blocks {deep}")
    assert deep - shallow[1] == 2 * (9 - 6)
    # Tokens, positions, patch embedding, final norm and head come with what is gathered ahead of and after the blocks.
    assert shallow[1] <= 2 * 6 + 2
    assert shallow[3] == 3 * shallow[1]


STAGES_ALONE = [way for way, settings in WAYS.items() if len(settings) == 1]


def _all_ways(rank, world_size, ways):
    """Curves of 50 steps where only the stage differs, of 10 for the other ways."""
    return {
        way: train(build(rank, world_size, **WAYS[way]), range(50 if way in STAGES_ALONE else 10), rank, world_size)
        for way in ways
    }


def _mean_losses(by_rank, way):
    return [
        statistics.fmean(loss for loss, _ in step) for step in zip(*(curves[way] for curves in by_rank), strict=True)
    ]


@pytest.mark.parametrize(
    "ways", [STAGES_ALONE, pytest.param(list(WAYS), marks=pytest.mark.slow)], ids=["stages", "all"]
)
def test_every_way_to_partition_matches_the_single_process_oracle(ways):
    oracle = train(build(0, 1, kind="torch"), range(50), 0, 1)
    by_rank = run_distributed_test(_all_ways, 2, ways, timeout_s=280)
    for way, curve in by_rank[0].items():
        mean = _mean_losses(by_rank, way)
        expected = [loss for loss, _ in oracle[: len(mean)]]
        print(f"{way}: {max(abs(a / b - 1) for a, b in zip(mean, expected, strict=True)):.1e} in {len(mean)} steps")
        assert mean == pytest.approx(expected, rel=1e-5), way
        assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in oracle[: len(mean)]], rel=1e-4), way
    assert oracle[-1][0] < oracle[0][0] - 0.5, "the oracle itself has to learn"


def _hpz_across_nodes(rank, world_size):
    """Curves over 4 ranks with and without a second partition in each half of them, and gathers within a half."""
    curves, gathers = {}, {}
    for hpz in (1, 2):
        engine = build(
            rank, world_size, zero_stage=3, hpz=hpz, micro_batch=GLOBAL_BATCH // world_size, bucket_elements=2000
        )
        curves[hpz] = _whole_batches(engine, range(10), rank, world_size)
        with record_communication() as record:
            _whole_batches(engine, range(1), rank, world_size)
        gathers[hpz] = record.by_kind["all_gather"]
    return curves, gathers


def _whole_batches(engine, steps, rank, world_size, lr=2e-3):
    """This rank's losses, each step of one micro-batch."""
    losses = []
    for step in steps:
        images, labels = zip(*micro_batches(step, rank, world_size), strict=True)
        losses.append(float(engine.train_step([(torch.cat(images), torch.cat(labels))], lr).loss))
    return losses


@pytest.mark.slow
def test_a_second_partition_gathers_in_halves_and_trains_the_same():
    by_rank = run_distributed_test(_hpz_across_nodes, 4, timeout_s=250)
    oracle = _whole_batches(build(0, 1, kind="torch", micro_batch=GLOBAL_BATCH), range(10), 0, 1)
    for hpz in (1, 2):
        mean = [statistics.fmean(step) for step in zip(*(curves[hpz] for curves, _ in by_rank), strict=True)]
        assert mean == pytest.approx(oracle, rel=1e-5), hpz
    gathers = by_rank[0][1]
    whole = 4 * sum(p.numel() for p in micro_model().parameters())  # fp32, gathered once in forward
    for hpz, within in ((1, 4), (2, 2)):
        again = gathers[hpz].payload_bytes - whole
        assert again > whole / 4, "backward has to gather what forward has let go"
        # In a ring of n each rank sends (n - 1) / n of the whole: forward's rings have 4 ranks.
        sent = whole * 3 / 4 + again * (within - 1) / within
        assert gathers[hpz].wire_bytes == pytest.approx(sent, rel=1e-3), hpz
    assert gathers[2].calls == gathers[1].calls


def _save_offloaded(rank, world_size, folder):
    outcome = {}
    for way in ("stage 2, offloaded", "stage 3, all offloaded", "stage 3, second partition"):
        engine = build(rank, world_size, **WAYS[way])
        train(engine, range(4), rank, world_size)
        counted = save(engine, folder / way, rank)
        onward = train(engine, range(4, 8), rank, world_size)
        dist.barrier()
        again = build(rank, world_size, **WAYS[way])
        load(again, folder / way, world_size, counted)
        masters = {fragment.values[MASTER].device.type for fragment in again.fragments()}
        outcome[way] = onward, train(again, range(4, 8), rank, world_size), masters
    return outcome


@pytest.mark.slow
def test_state_that_is_offloaded_or_partitioned_twice_resumes_bitwise(tmp_path):
    for outcome in run_distributed_test(_save_offloaded, 2, tmp_path):
        for way, (onward, resumed, masters) in outcome.items():
            assert resumed == onward, way
            assert masters == {"cpu"}


def _curves_by_seed(rank, world_size, seeds, steps):
    curves = {}
    for precision in ("fp32", "bf16"):
        for seed in seeds:
            engine = build(rank, world_size, zero_stage=2, precision=precision, seed=seed, micro_batch=12)
            curves[precision, seed] = _whole_batches(
                engine, range(10_000 * seed, 10_000 * seed + steps), rank, world_size
            )
    return curves


@pytest.mark.slow
def test_200_steps_in_bf16_stay_within_the_noise_of_seeds():
    seeds, tail = range(4), 50
    by_rank = run_distributed_test(_curves_by_seed, 2, seeds, 200, timeout_s=280)
    level = {case: statistics.fmean(loss for curves in by_rank for loss in curves[case][-tail:]) for case in by_rank[0]}
    noise = statistics.stdev(level["fp32", seed] for seed in seeds)
    shift = [level["bf16", seed] - level["fp32", seed] for seed in seeds]
    print(f"fp32 {[level['fp32', s] for s in seeds]}, seed noise {noise:.5f}, bf16 - fp32 {shift}")
    assert abs(statistics.fmean(shift)) <= noise
    assert max(map(abs, shift)) <= 2 * noise
    for seed in seeds:
        assert level["fp32", seed] < by_rank[0]["fp32", seed][0] - 0.5, "it has to learn"
