import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config import BatchSection, ScheduleSection, split_batch, total_steps
from vitscale.errors import ConfigError

batches = st.builds(
    BatchSection,
    global_batch=st.integers(min_value=1, max_value=600),
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


def test_the_message_names_keys_ranks_and_the_mend():
    with pytest.raises(ConfigError) as error:
        split_batch(BatchSection(global_batch=100, micro_batch=16), world_size=2)
    assert str(error.value) == (
        "batch.global_batch 100 is not 2 ranks x batch.micro_batch 16 x a whole number: "
        "use batch.global_batch=96 or 128, or batch.micro_batch=2 or 10"
    )


@given(
    epochs=st.integers(min_value=1, max_value=300),
    global_batch=st.integers(min_value=1, max_value=65536),
    train_samples=st.integers(min_value=1, max_value=14_000_000),
)
def test_epochs_are_covered_by_the_fewest_steps(epochs, global_batch, train_samples):
    steps = total_steps(ScheduleSection(epochs=epochs), global_batch, train_samples)
    wanted = Fraction(epochs * train_samples, global_batch)
    assert steps - 1 < wanted <= steps


def test_parts_of_an_epoch_and_steps():
    assert total_steps(ScheduleSection(epochs=0.5), 100, 1000) == 5
    assert total_steps(ScheduleSection(epochs=0.001), 100, 1000) == 1
    assert total_steps(ScheduleSection(steps=7), 100, 1000) == 7


def test_a_warm_up_as_long_as_the_run_is_refused():
    assert total_steps(ScheduleSection(steps=10, warmup_steps=9), 1, 1) == 10
    with pytest.raises(ConfigError) as error:
        total_steps(ScheduleSection(steps=10, warmup_steps=10), 1, 1)
    assert str(error.value) == "schedule.warmup_steps 10 leaves nothing of the run's 10 steps: use at most 9"
