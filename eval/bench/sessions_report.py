"""Tables for a terminal of 80 columns, and a plot, of the benchmark of sessions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scout_hf.eval.tables import Grid, median, mib, share, short, three

NAMES = {
    "load_s": "opening, s",
    "first_over_step": "first step / warm step in memory",
    "save_over_bare": "saving, of the rate of a bare write",
    "limit_speed": "tokens/s within the limit, of those in memory",
    "limit_memory": "memory without digests / limit",
}
QUIET = 0.1
OPENED = ("warm", "bare warm", "cold", "bare cold")
READ = ("warm in order", "cold in order", "warm scattered", "cold one by one", "cold announced", "memcpy")
COLOURS = {"memory": "#8c8c8c", "warm": "#2ca02c", "cold": "#1f77b4", "limit": "#2ca02c", "session, limit": "#9467bd",
           "session, limit, cold": "#1f77b4"}  # fmt: skip


def tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    """The tables of ``bench sessions``."""
    company, context = record["company"], short(record["settings"]["context"])
    if company["cpus_used_by_others"] > QUIET:
        yield f"NOT QUIET: others, the system's own writing included, used {company['cpus_used_by_others']:.2f} CPUs\n"
    saved, load, read, limited = (record[name] for name in ("save", "load", "read", "limited"))
    table = Grid(f"a session of {context} tokens, {mib(saved['bytes'])} MiB", ("", "ms (quartiles)", "GB/s", "n"))
    rows = {"save": saved["save"], "bare write": saved["bare"]}
    rows |= {f"{'read of the same' if 'bare' in name else 'open'}, {name.split()[-1]}": load[name] for name in OPENED}
    rows |= {name if name == "memcpy" else f"bare, {name}": read[name] for name in READ}
    for name, one in rows.items():
        table.add(
            name, median(one), f"{one['gb_per_s']:.2f}", str(one["n"]), end=one in (saved["bare"], load[OPENED[-1]])
        )
    yield table
    yield f"scattered: {read['pieces']} pieces of {read['piece_bytes']} bytes, as many as a step attends\n"
    table = Grid(f"steps after opening {context} tokens", ("", "first, ms", "later, ms", "MiB read, first", "later"))
    for name, parts in record["steps"].items():
        disks = (mib(parts[part]["disk_bytes"]) for part in ("first", "later"))
        table.add(name, median(parts["first"]), median(parts["later"]), *disks)
    yield table
    if question := record["question"]:
        times = f"{three(question['warm']['median_ms'])} ms, {three(question['memory']['median_ms'])} ms in memory"
        yield f"a question of {question['tokens']} tokens, which reads all pages: {times}\n"
    if limited:
        title = (
            f"{short(limited['tokens'])} tokens with {mib(limited['limit_bytes'])} of {mib(limited['kv_bytes'])} MiB"
        )
        table = Grid(title, ("", "ms (quartiles)", "of tokens/s", "MiB away", "MiB read"))
        for name, one in limited["steps"].items():
            speed = share(limited["ratios"][f"memory/{name}"])
            table.add(name, median(one), speed, mib(one["away_bytes"]), mib(one["disk_bytes"]))
        yield table
        table = Grid("MiB that the process grew by", ("", "grown", "at most", "digests", "pages", "/ limit"))
        for name, one in limited["memory"].items():
            sizes = (mib(one[f"{part}_bytes"]) for part in ("grown", "peak", "digest", "page"))
            table.add(name, *sizes, f"{one['over_limit']:.2f}")
        yield table
    table = Grid("must hold", ("", "allowed", "found", ""))
    for row in record["targets"]:
        bound = f"{'<=' if row['at_most'] else '>='} {three(row['bound'])}"
        table.add(NAMES[row["name"]], bound, three(row["found"]), "yes" if row["held"] else "NO")
    yield table


def parts(record: dict[str, Any]) -> Iterator[Grid | str]:
    """For Markdown: each figure beside what it cannot beat."""
    saved, load, read, limited = (record[name] for name in ("save", "load", "read", "limited"))
    steps, settings, facts = record["steps"], record["settings"], record["machine"]
    if (others := record["company"]["cpus_used_by_others"]) > QUIET:
        yield f"Measured beside others, the system's own writing included, that used {others:.1f} CPUs."
    disk = record["disk"].get("filesystem", "a disk")
    yield (
        f"{facts['cpu']}, {settings['threads']} threads, {record['model']['num_hidden_layers']} layers in the shape of "
        f"Llama 3.2 1B, budget {settings['budget']}; {disk}, read in order at "
        f"{read['cold in order']['gb_per_s']:.1f} GB/s. Medians."
    )

    def ms(one: dict[str, Any]) -> str:
        return three(one["median_ms"])

    context, memory = short(settings["context"]), f"{ms(steps['memory']['later'])}, all in memory"
    scattered = f"{ms(read['cold announced'])}, bare reads of as many pieces of {read['piece_bytes'] >> 10} KiB"
    table = Grid("", ("", "ms", "beside"), 1)
    table.add(
        f"save {context} tokens, {mib(saved['bytes'])} MiB", ms(saved["save"]), f"{ms(saved['bare'])}, bare write"
    )
    table.add("open them", ms(load["warm"]), f"{ms(load['bare warm'])}, bare read of what opening reads")
    table.add("open them, cold", ms(load["cold"]), f"{ms(load['bare cold'])}, the same")
    table.add("first step then", ms(steps["warm"]["first"]), memory)
    table.add("first step then, cold", ms(steps["cold"]["first"]), scattered)
    table.add("later steps", ms(steps["warm"]["later"]), memory)
    table.add("later steps, cold", ms(steps["cold"]["later"]), memory)
    if question := record["question"]:
        table.add(
            f"a question of {question['tokens']} tokens", ms(question["warm"]), f"{ms(question['memory'])}, in memory"
        )
    if limited:
        size = f"{mib(limited['limit_bytes'])} of {mib(limited['kv_bytes'])} MiB"
        within, all_of = limited["steps"], f"{ms(limited['steps']['memory'])}, all in memory"
        table.add(f"step, {short(limited['tokens'])} tokens, {size} in memory", ms(within["limit"]), all_of)
        table.add("the same from a session", ms(within["session, limit"]), all_of)
        table.add("the same, cold", ms(within["session, limit, cold"]), all_of)
    yield table
    if limited:
        one, away = limited["memory"]["limit"], limited["steps"]["limit"]["away_bytes"]
        yield (
            f"Every step of these chooses other blocks: {mib(away)} MiB of them were not in memory. The process grew "
            f"by {mib(one['grown_bytes'])} MiB, {mib(one['digest_bytes'])} of digests and at most "
            f"{mib(one['page_bytes'])} of pages."
        )


def plot(record: dict[str, Any], figure: Any) -> None:
    """Steps after opening, and within a limit."""
    limited = record["limited"]
    opened, *others = figure.subplots(1, 2 if limited else 1, squeeze=False)[0]
    for place, (name, parts) in enumerate(record["steps"].items()):
        where, times = [place * 3, place * 3 + 1], [parts[part]["median_ms"] for part in ("first", "later")]
        drawn = opened.bar(where, times, color=COLOURS[name], label=name)
        opened.bar_label(drawn, [f"{part}\n{value:.0f}" for part, value in zip(("first", "later"), times)], fontsize=7)
    opened.set(
        ylabel="ms per decode step (median)", title=f"After opening {short(record['settings']['context'])} tokens"
    )
    opened.set_xticks([])
    opened.legend(fontsize=8)
    for axes in others:
        for place, (name, one) in enumerate(limited["steps"].items()):
            drawn = axes.bar([place], [one["median_ms"]], color=COLOURS[name], label=name)
            axes.bar_label(drawn, [f"{one['median_ms']:.0f}"], fontsize=7)
        within = f"{mib(limited['limit_bytes'])} of {mib(limited['kv_bytes'])} MiB in memory"
        axes.set(ylabel="ms per decode step (median)", title=f"{short(limited['tokens'])} tokens, {within}")
        axes.set_xticks([])
        axes.legend(fontsize=8)
    for axes in (opened, *others):
        axes.margins(y=0.25)
