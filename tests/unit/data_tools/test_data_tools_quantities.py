"""Numbers as people read them."""

import pytest

from data_tools.quantities import byte_size, counted, short_number


def test_counts_are_set_apart():
    assert [counted(number) for number in (0, 999, 14_197_122, 3.0)] == ["0", "999", "14,197,122", "3"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (976, "976"), (999.6, "1 k"), (1314, "1.31 k"), (14_197_122, "14.2 M"), (5e20, "5e+05 P")],
)
def test_short_numbers_have_three_digits_and_a_factor(number, text):
    assert short_number(number) == text


def test_bytes_have_their_unit():
    assert [byte_size(size) for size in (512, 97_600, 1.31e12)] == ["512 B", "97.6 kB", "1.31 TB"]
