"""What runs of a thinned grid and of what is marked full, in a suite of its own."""

import itertools

import pytest

pytest_plugins = ["pytester"]

SUITE = """
import pytest

@pytest.fixture(params=[0, 1, 2, 3])
def way(request):
    return request.param

@pytest.mark.parametrize(("name", "number"), [("x", 0), ("x", 1), ("y", 0), ("y", 1)])
@pytest.mark.parametrize("letter", ["a", "b", "c"])
@pytest.mark.thin(2)
def test_grid(way, letter, name, number):
    pass

def test_small():
    pass

@pytest.mark.full
def test_dear():
    pass
"""


@pytest.fixture
def cells(pytester):
    """Runs the suite with some options; what ran, as (function, id of the cell)."""
    pytester.makeconftest("from tests.conftest import pytest_addoption, pytest_collection_modifyitems  # noqa: F401")
    pytester.makepyfile(SUITE)

    def run(*options):
        reports = pytester.inline_run("-p", "no:cacheprovider", "-W", "ignore", *options).getreports()
        ran = [report.nodeid.partition("::")[2] for report in reports if getattr(report, "when", "") == "call"]
        return [(name, cell.rstrip("]")) for name, _, cell in (each.partition("[") for each in ran)]

    return run


def grid(cells):
    return [cell for name, cell in cells if name == "test_grid"]


def test_a_thinned_grid_has_every_pair_of_values_in_the_nth_part_of_its_cells(cells):
    ways, letters, names = "0123", "abc", ["x-0", "x-1", "y-0", "y-1"]
    ran = [tuple(cell.split("-", 2)) for cell in grid(cells())]
    assert len(ran) == len(set(ran)) == 4 * 3 * 4 / 2
    for one, other in ((0, 1), (0, 2), (1, 2)):
        axes = (ways, letters, names)
        assert {(cell[one], cell[other]) for cell in ran} == set(itertools.product(axes[one], axes[other]))


def test_what_is_left_out_runs_with_full_only_and_all_of_it_with_full(cells):
    default, rest, everything = cells(), cells("--full-only"), cells("--full")
    assert ("test_small", "") in default and ("test_dear", "") in rest
    assert sorted(default + rest) == sorted(everything)
    assert len(grid(everything)) == 4 * 3 * 4


def test_a_cell_that_is_named_runs(cells):
    cell = grid(cells("--full-only"))[0]
    assert grid(cells(f"test_a_cell_that_is_named_runs.py::test_grid[{cell}]")) == [cell]
