from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config import BatchSection, ScheduleSection, lay_out
from vitscale.errors import RunDirectoryError
from vitscale.train.course import Course, Detour, read_detours, write_detours


def timeline(length=40, phases=()):
    schedule = ScheduleSection(length=length, phases=phases)
    return lay_out(schedule, BatchSection(global_batch=4, micro_batch=2), 1, epoch_images=100)


def walked(course):
    """(position of the first image, images) of every step, by stretches one after the other."""
    steps, step = [], 0
    while step < course.timeline.total_steps:
        stretch = course.stretch_from(step)
        assert stretch.first_step == step < stretch.end_step <= stretch.phase.end_step
        assert stretch.phase is course.timeline.phase_at(step)
        batch = stretch.phase.split.global_batch
        steps += [(stretch.position + place * batch, batch) for place in range(stretch.end_step - step)]
        step = stretch.end_step
    return steps


def images(steps):
    return [image for position, count in steps for image in range(position, position + count)]


def test_without_detours_a_phase_is_one_stretch():
    course = Course(timeline(phases=[{"until": 10, "global_batch": 8, "img_size": 160}]))
    first, second = course.stretch_from(0), course.stretch_from(10)
    assert (first.end_step, first.position, first.phase.img_size) == (10, 0, 160)
    assert (second.end_step, second.position, second.phase.img_size) == (40, 80, None)
    assert course.stretch_from(12).position == 88
    assert images(walked(course)) == list(range(80 + 30 * 4))


def test_a_detour_swaps_two_windows():
    steps = walked(Course(timeline(10), (Detour(2, 3),)))
    assert [position // 4 for position, _ in steps] == [0, 1, 5, 6, 7, 2, 3, 4, 8, 9]


def test_a_later_detour_swaps_what_the_earlier_one_made():
    first = Course(timeline(12), (Detour(2, 3),))
    second = replace(first, detours=(*first.detours, Detour(4, 2)))
    order = [position // 4 for position, _ in walked(first)]
    order[4:6], order[6:8] = order[6:8], order[4:6]
    assert [position // 4 for position, _ in walked(second)] == order


@given(st.data())
def test_no_image_is_lost_or_seen_twice_and_the_way_from_any_step_is_the_same(data):
    batches = st.sampled_from([4, 8])
    ends = sorted(data.draw(st.sets(st.integers(1, 39), max_size=2)))
    phases = [{"until": end, "global_batch": data.draw(batches)} for end in ends]
    course = Course(timeline(phases=phases), shift=data.draw(st.sampled_from([0, 6])))
    restored = 0
    for _ in range(data.draw(st.integers(0, 4))):
        restored = data.draw(st.integers(restored, 39))
        further = course.avoiding(restored, data.draw(st.integers(restored, 39)))
        course = further or course
    steps = walked(course)
    total = course.timeline.images_at(course.timeline.total_steps)
    assert sorted(images(steps)) == list(range(course.shift, course.shift + total))
    start = data.draw(st.integers(0, 39))
    assert (course.stretch_from(start).position, course.timeline.phase_at(start).split.global_batch) == steps[start]


def test_the_data_of_the_failed_steps_comes_after_as_many_others():
    course = Course(timeline())
    further = course.avoiding(restored_step=10, failed_step=13)
    assert further is not None
    before, after = walked(course), walked(further)
    assert after[10:14] == before[14:18]
    assert after[14:18] == before[10:14]
    assert after[:10] == before[:10]
    assert after[18:] == before[18:]


def test_there_is_no_detour_across_the_end_of_a_phase():
    course = Course(timeline(phases=[{"until": 20, "global_batch": 8}]))
    assert course.avoiding(10, 14) is not None
    assert course.avoiding(10, 15) is None
    assert course.avoiding(30, 35) is None


def test_detours_are_read_as_they_were_written(tmp_path):
    assert read_detours(tmp_path) == ()
    write_detours(tmp_path, [Detour(3, 4), Detour(9, 1)])
    assert read_detours(tmp_path) == (Detour(3, 4), Detour(9, 1))


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b"[[1]]", b'[["x", 1]]', b"\xff", b"[" * 100_000])
def test_a_damaged_record_of_detours_is_named(tmp_path, content):
    (tmp_path / "detours.json").write_bytes(content)
    with pytest.raises(
        RunDirectoryError, match=r"detours\.json: is no record of detours: remove it to go on with those"
    ):
        read_detours(tmp_path)


def test_a_record_of_detours_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "detours.json").mkdir()
    with pytest.raises(RunDirectoryError, match=r"detours\.json: cannot be read: Is a directory"):
        read_detours(tmp_path)
