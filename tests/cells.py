"""Which tests run by default: every n-th diagonal of a grid marked ``thin(n)``, and nothing that is marked ``full``.

On diagonals each value of each axis meets every n-th value of each other one, and all values where a third axis is at
least n long.
"""

from __future__ import annotations

from collections import defaultdict


def run_by_default(items) -> set[str]:
    """The ids of those of the collected tests that run without ``--full``."""
    kept = {item.nodeid for item in items if item.get_closest_marker("full") is None}
    return kept - set(_off_the_diagonals(items))


def _off_the_diagonals(items):
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thin") is not None:
            grids[item.nodeid.partition("[")[0]].append(item)
    for cells in grids.values():
        # pytest's own indices count the cells of a grid, not the values of an axis.
        places = defaultdict(dict)
        for cell in cells:
            place = 0
            for axis, value in _axes(cell):
                seen = places[axis]
                place += seen.setdefault(value, len(seen))
            if place % cell.get_closest_marker("thin").args[0]:
                yield cell.nodeid


def _axes(cell):
    """Names and value of each axis; several names may share one axis."""
    axis_of = {}
    for mark in cell.iter_markers("parametrize"):
        names = mark.args[0]
        names = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
        axis_of |= dict.fromkeys(names, names)
    for axis in dict.fromkeys(axis_of.get(name, (name,)) for name in cell.callspec.params):
        yield axis, tuple(id(cell.callspec.params[name]) for name in axis)
