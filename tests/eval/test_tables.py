"""Tables as rows of text: what a terminal and Markdown show of them, and how figures are written."""

import io

import pytest
from rich.console import Console

from scout_hf.eval.markdown import to_markdown
from scout_hf.eval.tables import Grid, by, median, mib, short, three, tiers


def table():
    made = Grid("speed of `a|b`", ("way", "ms"), words=1)
    made.add("a|b", "1.00", end=True)
    made.add("of\n two lines", "20.0")
    return made


def test_markdown_keeps_a_cell_in_its_cell():
    lines = to_markdown(["A paragraph.", table(), "Another."]).split("\n")
    assert lines[:3] == ["A paragraph.", "", "| way | ms |"]
    assert lines[3:6] == ["|---|---|", r"| a\|b | 1.00 |", "| of two lines | 20.0 |"]
    assert lines[6:] == ["", "Another."]


@pytest.mark.parametrize("tight", [False, True])
def test_a_terminal_shows_the_title_and_a_line_where_it_is_asked_for(tight):
    sink, made = io.StringIO(), table()
    made.tight = tight
    Console(file=sink, width=60, markup=False).print(made)
    lines = [line.rstrip() for line in sink.getvalue().splitlines()]
    assert lines[0] == "speed of `a|b`" and sum("──" in line for line in lines) == 1
    first = next(index for index, line in enumerate(lines) if "a|b" in line and "1.00" in line)
    assert not lines[first + 1] and "of" in lines[first + 2] and "20.0" in lines[first + 2]


def test_figures():
    assert [three(value) for value in (None, 0.123, 12.34, 123.4)] == ["-", "0.12", "12.3", "123"]
    assert median({"median_ms": 12.34, "q1_ms": 9.876, "q3_ms": 123.4}) == "12.3 (9.88-123)"
    assert [short(count) for count in (0, 1000, 1024, 131072)] == ["0", "1000", "1k", "128k"]
    assert [mib(count) for count in (1 << 19, 10 << 20)] == ["0.5", "10"]
    assert tiers({"host": 3 << 20, "digests": 0, "device": 1 << 19}) == "host 3.0 + device 0.5"


def test_groups_are_in_the_order_of_their_first_row():
    assert by([3, 1, 4, 1, 5], lambda value: value % 2) == {1: [3, 1, 1, 5], 0: [4]}
