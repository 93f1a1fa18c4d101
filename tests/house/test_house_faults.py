"""Each fault that a run must survive has a test that causes it, and the page about it is true."""

from fault_table import FAULTS, PAGE, named_tests, with_table


def test_every_fault_has_a_test():
    assert named_tests().keys() == FAULTS.keys()


def test_the_page_lists_the_tests():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run python tests/fault_table.py"
