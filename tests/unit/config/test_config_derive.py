import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vitscale.config import BatchSection, ScheduleSection, lay_out, split_batch, usable_ranks
from vitscale.errors import ConfigError

batches = st.builds(
    BatchSection,
    global_batch=st.integers(min_value=1, max_value=300).map(lambda half: 2 * half),
    micro_batch=st.integers(min_value=1, max_value=24).map(lambda half: 2 * half),
)
world_sizes = st.integers(min_value=1, max_value=16)


@given(batches, world_sizes)
def test_a_batch_is_split_exactly_or_refused_with_numbers_that_can_be(batch, world_size):
    try:
        split = split_batch(batch, world_size)
    except ConfigError as error:
        check_refusal(str(error), batch, world_size)
        return
    assert (split.global_batch, split.micro_batch, split.world_size) == (
        batch.global_batch,
        batch.micro_batch,
        world_size,
    )
    assert split.grad_accum >= 1
    assert world_size * split.rank_batch == batch.global_batch
    assert split.rank_batch == split.micro_batch * split.grad_accum


def check_refusal(message, batch, world_size):
    """The numbers it offers work, and no number that works is nearer."""
    assert batch.global_batch % (world_size * batch.micro_batch)
    offered = numbers(message, "batch.global_batch")
    works = [g for g in range(1, 2000) if g % (world_size * batch.micro_batch) == 0]
    assert offered == sorted(
        [
            max((g for g in works if g < batch.global_batch), default=None),
            min(g for g in works if g > batch.global_batch),
        ]
        if works[0] < batch.global_batch
        else [works[0]]
    )
    fitting = [m for m in range(2, batch.global_batch + 1, 2) if batch.global_batch % (world_size * m) == 0]
    offered = numbers(message, "batch.micro_batch")
    assert len(offered) == min(2, len(fitting))
    assert set(offered) <= set(fitting)
    if offered:
        farthest = max(abs(m - batch.micro_batch) for m in offered)
        assert all(abs(m - batch.micro_batch) >= farthest for m in fitting if m not in offered)


def numbers(message, key):
    match = re.search(rf"{re.escape(key)}=([\d or]+)", message)
    return [int(number) for number in match[1].split(" or ")] if match else []


@pytest.mark.parametrize(
    ("global_batch", "ranks", "mends"),
    [
        (100, 2, "batch.global_batch=96 or 128, batch.micro_batch=2 or 10, or batch.pad=true"),
        (96, 4, "batch.global_batch=64 or 128, batch.micro_batch=8 or 12, 3 or 6 ranks, or batch.pad=true"),
        (96, 7, "batch.global_batch=112, 6 ranks, or batch.pad=true"),
    ],
)
def test_the_message_names_keys_ranks_and_the_mend(global_batch, ranks, mends):
    with pytest.raises(ConfigError) as error:
        split_batch(BatchSection(global_batch=global_batch, micro_batch=16), ranks)
    assert str(error.value) == (
        f"batch.global_batch {global_batch} is not {ranks} ranks x batch.micro_batch 16 x a whole number: use {mends}"
    )


@given(batches, world_sizes)
def test_a_padded_batch_is_split_over_any_ranks_with_the_fewest_places(batch, world_size):
    padded = batch.model_copy(update={"pad": True})
    split = split_batch(padded, world_size)
    assert split.global_batch == batch.global_batch
    assert split.micro_batch % 2 == 0
    assert split.micro_batch <= batch.micro_batch
    assert split.grad_accum == math.ceil(batch.global_batch / (world_size * batch.micro_batch))
    assert 0 <= split.padding == split.world_size * split.micro_batch * split.grad_accum - batch.global_batch
    assert split.padding < 2 * world_size * split.grad_accum, "a pair less in each micro-batch would do"
    if usable_ranks(ScheduleSection(length=1), batch, world_size) == world_size:
        assert split == split_batch(batch, world_size)


@given(batches, st.lists(batches, max_size=2), st.integers(0, 60), st.integers(1, 9))
def test_the_usable_ranks_are_the_most_that_every_phase_can_run_on(batch, others, available, ranks_per_node):
    phases = [
        {"until": f"{10 * (place + 1)} %", "global_batch": other.global_batch, "micro_batch": other.micro_batch}
        for place, other in enumerate(others)
    ]
    schedule = ScheduleSection(length=1000, phases=phases)

    def runs(ranks, pad):
        try:
            timeline = lay_out(schedule, batch.model_copy(update={"pad": pad}), ranks, epoch_images=100)
        except ConfigError:
            return False
        return [phase.split.global_batch for phase in timeline.phases] == [b.global_batch for b in (*others, batch)]

    whole_nodes = range(ranks_per_node, available + 1, ranks_per_node)
    found = usable_ranks(schedule, batch, available, ranks_per_node)
    assert found == max((ranks for ranks in whole_nodes if runs(ranks, pad=False)), default=0)
    padded = usable_ranks(schedule, batch.model_copy(update={"pad": True}), available, ranks_per_node)
    assert padded == max(whole_nodes, default=0)
    assert not padded or runs(padded, pad=True)


def steps_of(length, global_batch=100, epoch_images=1000, **schedule):
    micro = global_batch if global_batch % 2 == 0 else 2 * global_batch
    batch = BatchSection(global_batch=micro, micro_batch=micro)
    return lay_out(ScheduleSection(length=length, **schedule), batch, 1, epoch_images)


@given(
    epochs=st.integers(min_value=1, max_value=300),
    half_batch=st.integers(min_value=1, max_value=32768),
    epoch_images=st.integers(min_value=1, max_value=14_000_000),
)
def test_epochs_are_covered_by_the_fewest_steps(epochs, half_batch, epoch_images):
    steps = steps_of(f"{epochs} epochs", 2 * half_batch, epoch_images).total_steps
    wanted = Fraction(epochs * epoch_images, 2 * half_batch)
    assert steps - 1 < wanted <= steps


def test_every_unit_of_a_length():
    lengths = {
        7: 7,
        "7": 7,
        "7 steps": 7,
        "1 step": 1,
        "0.5 epochs": 5,
        "0.001 epochs": 1,
        "1e3 images": 10,
        "1001images": 11,
    }
    for length, steps in lengths.items():
        assert steps_of(length).total_steps == steps, length


@pytest.mark.parametrize(
    ("warmup", "steps"), [(7, 7), ("10 %", 5), ("10%", 5), ("3 percent", 2), ("1 epoch", 10), ("300 images", 3), (0, 0)]
)
def test_warm_up_and_cool_down_take_every_unit(warmup, steps):
    timeline = steps_of(50, kind="constant", warmup=warmup, cooldown=warmup)
    assert (timeline.warmup_steps, timeline.cooldown_steps) == (steps, steps)


def test_a_warm_up_as_long_as_the_run_is_refused():
    assert steps_of(10, warmup=9).total_steps == 10
    with pytest.raises(ConfigError) as error:
        steps_of(10, warmup=10)
    assert str(error.value) == "schedule.warmup 10 leaves nothing of the run's 10 steps: use at most 9"
    with pytest.raises(ConfigError, match=r"schedule.warmup 6 with schedule.cooldown 4 leaves nothing"):
        steps_of(10, kind="constant", warmup=6, cooldown=4)


def test_an_rsqrt_timescale_in_images_follows_the_batch():
    schedule = {"kind": "rsqrt", "timescale": "40960000 images"}
    assert steps_of(9, 4096, **schedule).timescale_steps == 10_000
    assert steps_of(9, 32768, **schedule).timescale_steps == 1250


@st.composite
def phased(draw):
    """A schedule of up to four phases whose ends rise, with batches of their own."""
    unit = draw(st.sampled_from(["steps", "images", "epochs", "%"]))
    ends = sorted(draw(st.sets(st.integers(1, 99), max_size=4)))
    scale = {"steps": 10, "images": 10_000, "epochs": 1, "%": 1}[unit]
    batches = [draw(st.sampled_from([8, 16, 24])) for _ in ends]
    phases = [
        {"until": f"{end * scale} {unit}", "global_batch": batch, "img_size": draw(st.sampled_from([None, 160]))}
        for end, batch in zip(ends, batches, strict=True)
    ]
    length = {
        "steps": 1000,
        "images": "1e6 images",
        "epochs": "100 epochs",
        "%": draw(st.sampled_from([1000, "1e6 images"])),
    }
    return ScheduleSection(length=length[unit], phases=phases)


@given(phased())
def test_phases_join_without_gap_in_steps_and_images(schedule):
    timeline = lay_out(schedule, BatchSection(global_batch=16, micro_batch=4), 2, epoch_images=10_000)
    step = image = 0
    for phase in timeline.phases:
        assert (phase.first_step, phase.first_image) == (step, image)
        assert phase.split.world_size * phase.split.micro_batch * phase.split.grad_accum == phase.split.global_batch
        assert timeline.images_at(step) == image
        assert timeline.phase_at(step) is phase
        assert timeline.phase_at(phase.end_step - 1) is phase
        image += (phase.end_step - step) * phase.split.global_batch
        step = phase.end_step
    assert (timeline.total_steps, timeline.images_at(timeline.total_steps)) == (step, image)
    assert len(timeline.phases) == len(schedule.phases) + 1
    if schedule.length.unit == "images":
        assert image - 16 < schedule.length.amount <= image


def test_phases_out_of_order_and_batches_that_do_not_split_are_refused():
    with pytest.raises(
        ConfigError, match=r"phases\[1\].until 50 % is no later than where the phase begins \(step 80\)"
    ):
        steps_of(100, phases=[{"until": "80 %"}, {"until": "50 %"}])
    with pytest.raises(ConfigError, match=r"schedule.phases end at step 100, schedule.length 100 steps at step 100"):
        steps_of(100, phases=[{"until": "100 %"}])
    with pytest.raises(ConfigError, match=r"batch.global_batch 70 is not 1 ranks"):
        steps_of(100, phases=[{"until": "50 %", "global_batch": 70}])


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        ({"length": "3 %"}, "length 3 %: give steps, images or epochs, more than 0"),
        ({"length": 0}, "length 0 steps: give steps"),
        ({"length": "ten epochs"}, "give a number of steps, or a text such as 90 epochs, 1e9 images or 3 %"),
        ({"length": "10 hours"}, "give a number of steps, or a text such as"),
        ({"length": True}, "give a number of steps, or a text such as"),
        ({"length": -5}, "a length is not negative"),
        ({"length": 1.5}, "give whole steps"),
        ({"length": 9, "warmup": "101 %"}, "give at most 100 %"),
        ({"length": 9, "cooldown": 3}, "cooldown is for rsqrt and constant, cosine goes down by itself"),
        ({"length": 9, "kind": "constant", "final_lr": 1e-5}, "final_lr is for cosine and linear"),
        ({"length": 9, "kind": "rsqrt"}, "give timescale with kind rsqrt"),
        ({"length": 9, "timescale": 10}, "give timescale with kind rsqrt"),
        ({"length": 9, "kind": "rsqrt", "timescale": "9 %"}, "timescale 9 %: give steps, images or epochs"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule, complaint):
    with pytest.raises(ValidationError, match=re.escape(complaint)):
        ScheduleSection(**schedule)


def test_a_schedule_written_out_is_the_same_schedule():
    schedule = ScheduleSection(length="90 epochs", warmup="3 %", phases=[{"until": "1e9 images", "img_size": 160}])
    plain = schedule.model_dump(mode="json")
    assert (plain["length"], plain["warmup"], plain["phases"][0]["until"]) == ("90 epochs", "3 %", "1000000000 images")
    assert ScheduleSection(**plain) == schedule
