"""Tables for a terminal of 80 columns, Markdown and a plot, of the benchmark of lossless drafts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scout_hf.eval.tables import NONE, Grid, share, short, three

QUIET = 0.1
TITLES = {
    "drafts": "`draft=True`, two tiers",
    "dense+drafts": '`draft=True`, `method="dense"`',
    "sparse": "sparse steps alone, not exact",
    "dense": "`dense`: exact over the link",
    "exact steps": "exact steps of drafting, two tiers",
    "one tier": "exact, no link",
}
COLOURS = {"drafts": "#2ca02c", "dense+drafts": "#17becf", "sparse": "#1f77b4", "dense": "#d62728",
           "exact steps": "#9467bd", "one tier": "#8c8c8c"}  # fmt: skip


def _figures(one: dict[str, Any], ratio: float) -> tuple[str, ...]:
    accepted = NONE if one["acceptance"] is None else f"{share(one['acceptance'])} of {one['drafted']}"
    per_pass = NONE if one["tokens_per_exact_pass"] is None else three(one["tokens_per_exact_pass"])
    equal = NONE if one["equal"] is None else f"{'yes' if one['equal'] else 'NO'}, {one['tokens']}"
    return three(one["tokens_per_s"]), three(ratio), accepted, per_pass, equal


def _told(record: dict[str, Any]) -> str:
    return (
        f"{record['settings']['model']}, {short(record['settings']['context'])} tokens in {record['model']['dtype']}, "
        f"drafts with a budget of {record['settings']['budget']}, a link of {three(record['link_gbps'])} GB/s beside "
        f"memory read at {record['read']['gb_per_s']:.1f} GB/s, {record['settings']['threads']} threads"
    )


def tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    """The tables of ``bench drafts``."""
    if (others := record["company"]["cpus_used_by_others"]) > QUIET:
        yield f"NOT QUIET: others used {others:.2f} CPUs\n"
    yield _told(record) + "\n"
    table = Grid("decoding", ("", "tokens/s", "/ dense", "accepted", "tokens/pass", "equal"))
    for name, one in record["arms"].items():
        table.add(name, *_figures(one, record["ratios"][f"{name}/dense"]))
    yield table
    for name, one in record["arms"].items():
        for note in one["notes"]:
            yield f"{name}: {note}\n"
    table = Grid("must hold", ("", "at least", "found", ""))
    for row in record["targets"]:
        table.add(row["name"], three(row["bound"]), three(row["found"]), "yes" if row["held"] else "NO")
    yield table


def parts(record: dict[str, Any]) -> Iterator[Grid | str]:
    """For Markdown."""
    if (others := record["company"]["cpus_used_by_others"]) > QUIET:
        yield f"Measured beside others that used {others:.1f} CPUs."
    yield f"{record['machine']['cpu']}: {_told(record)}."
    table = Grid("", ("", "tokens/s", "of `dense`", "drafts accepted", "tokens per exact pass", "equal tokens"), 1)
    for name, one in record["arms"].items():
        table.add(TITLES[name], *_figures(one, record["ratios"][f"{name}/dense"]))
    yield table


def plot(record: dict[str, Any], figure: Any) -> None:
    """Tokens per second of each arm."""
    axes = figure.subplots()
    names = list(record["arms"])
    speeds = [record["arms"][name]["tokens_per_s"] for name in names]
    drawn = axes.bar(names, speeds, color=[COLOURS[name] for name in names])
    axes.bar_label(drawn, [three(speed) for speed in speeds], fontsize=8)
    axes.set(ylabel="tokens per second", yscale="log")
    axes.set_title(
        f"{short(record['settings']['context'])} tokens behind a link of {three(record['link_gbps'])} GB/s", fontsize=9
    )
    axes.margins(y=0.25)
