"""Tables for a terminal of 80 columns, Markdown and a plot, of the comparison with other runtimes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scout_hf.eval.tables import NONE, Grid, share, short, three

QUIET = 0.1
OURS = "scout"
COLOURS = {"stock": "#d62728", "stock folded": "#ff7f0e", "scout exact": "#9467bd", "scout auto": "#17becf",
           "scout sparse": "#1f77b4"}  # fmt: skip


def measured(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The arms of a model that have figures, in order."""
    seen = {name for row in entry["contexts"] for name in row["arms"]}
    return [one for one in entry["arms"] if one["name"] in seen]


def first_at(entry: dict[str, Any]) -> dict[int, str]:
    """The fastest arm at each context."""
    return {
        row["context"]: min(row["arms"], key=lambda name, arms=row["arms"]: arms[name]["median_ms"])
        for row in entry["contexts"]
        if row["arms"]
    }


def since(entry: dict[str, Any], one: str, other: str) -> int | None:
    """The context from which an arm is faster than another at all that were measured; None where at no last one."""
    found = None
    for row in entry["contexts"]:
        ratio = row["ratios"].get(f"{one}/{other}")
        if ratio is None:
            continue
        found = (row["context"] if found is None else found) if ratio < 1 else None
    return found


def wins(entry: dict[str, Any]) -> Iterator[str]:
    """Sentences: which arm is the fastest, from where on, and where each of scout_hf passes the others."""
    found, spans = first_at(entry), []
    for context, name in found.items():
        if not spans or spans[-1][0] != name:
            spans.append((name, context, context))
        else:
            spans[-1] = (name, spans[-1][1], context)
    last = max(found, default=0)
    told = []
    for name, low, high in spans:
        place = f"from {_place(low)} on" if high == last else f"at {_place(low)}"
        told.append(f"{name} {place if high in (low, last) else f'from {_place(low)} to {_place(high)}'}")
    if told:
        yield f"The fastest step: {'; '.join(told)}."
    names = [one["name"] for one in measured(entry)]
    for ours in (name for name in names if name.startswith(OURS)):
        others = [name for name in names if not name.startswith(OURS)]
        passed = [(other, since(entry, ours, other)) for other in others]
        always = [other for other, context in passed if context == entry["contexts"][0]["context"]]
        later = [f"{other} from {_place(context)} on" for other, context in passed
                 if context is not None and other not in always]  # fmt: skip
        never = [other for other, context in passed if context is None]
        parts = [f"at all contexts than {_and(always)}"] if always else []
        parts += [f"than {', '.join(later)}"] if later else []
        if parts:
            yield f"{ours} is faster {'; '.join(parts)}{f'; not than {_and(never)}' if never else ''}."
        elif never:
            yield f"{ours} is not faster than {_and(never)}."


def tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    """For a terminal."""
    for entry in record["models"]:
        yield from _warnings(entry)
        yield f"{entry['name']}\n"
        table = Grid("arms", ("", "weights", "KV", "GB held", "at most"), 3)
        for one in measured(entry):
            row = next(row for row in reversed(entry["contexts"]) if one["name"] in row["arms"])
            found = row["arms"][one["name"]]
            sizes = (f"{found[name] / 1e9:.2f}" for name in ("held_bytes", "peak_bytes"))
            table.add(one["name"], _plain(one["weights"]), one["kv"], *sizes)
        yield table
        for row in entry["contexts"]:
            columns = ("", "ms", "+-", "tok/s", "/ limit", "KV read", "prompt tok/s")
            table = Grid(f"context {_place(row['context'])}: a decode step", columns)
            for one in measured(entry):
                if found := row["arms"].get(one["name"]):
                    over, kv = f"{found['median_ms'] / found['limit_ms']:.1f}", share(found["kv_share"])
                    rates = three(found["tokens_per_s"]), over, kv, _prefill(row, one["name"])
                    spread = (found["q3_ms"] - found["q1_ms"]) / 2 / found["median_ms"]
                    table.add(one["name"], three(found["median_ms"]), share(spread), *rates)
            yield table
        yield from (f"{line}\n" for line in wins(entry))
        yield from (f"{one['name']}: {one['told']}\n" for one in entry["arms"] if "told" in one)


def parts(record: dict[str, Any]) -> Iterator[Grid | str]:
    """For Markdown."""
    for entry in record["models"]:
        facts, settings = entry["machine"], entry["settings"]
        yield f"**{entry['name']}**"
        yield from _warnings(entry)
        yield (
            f"{facts['cpu']}, {settings['threads']} threads, memory read in order at {entry['read']['gb_per_s']:.1f} "
            f"GB/s. Tokens per second of decoding, medians of {settings['rounds']} rounds with all arms in turn, by "
            "tokens in the cache."
        )
        contexts = entry["contexts"]
        names = [_place(row["context"]) for row in contexts]
        longest = short(contexts[-1]["context"]) if contexts else ""
        table = Grid("", ("arm", "weights", "KV", *names, f"times the limit, {longest}", f"GB, {longest}"), 3)
        for one in measured(entry):
            found = [row["arms"].get(one["name"]) for row in contexts]
            rates = (three(step["tokens_per_s"]) if step else NONE for step in found)
            last = found[-1]
            ends = (NONE, NONE)
            if last:
                ends = f"{last['median_ms'] / last['limit_ms']:.1f}", f"{last['peak_bytes'] / 1e9:.2f}"
            table.add(one["name"], one["weights"], one["kv"], *rates, *ends)
        yield table
        read = [row for row in contexts if row["prefill"]]
        if read:
            yield "Tokens per second of reading a prompt, from its beginning:"
            table = Grid("", ("arm", *(_place(row["context"]) for row in read)))
            for one in measured(entry):
                if any(one["name"] in row["prefill"] for row in read):
                    table.add(one["name"], *(_prefill(row, one["name"]) for row in read))
            yield table
        yield " ".join(wins(entry))
        for one in entry["arms"]:
            if "told" in one:
                yield f"{one['name']}: {one['told']}."


def plot(record: dict[str, Any], figure: Any) -> None:
    """Decoding by context, a picture per model."""
    for axes, entry in zip(figure.subplots(1, len(record["models"]), squeeze=False)[0], record["models"]):
        places = [_place(row["context"]) for row in entry["contexts"]]
        for one in measured(entry):
            rates = [row["arms"].get(one["name"], {}).get("tokens_per_s") for row in entry["contexts"]]
            style = {"color": COLOURS.get(one["name"]), "linestyle": "-" if one["kind"] == "transformers" else "--"}
            drawn = [float("nan") if rate is None else rate for rate in rates]
            axes.plot(places, drawn, marker="o", label=one["name"], **style)
        axes.set(yscale="log", xlabel="tokens in the cache", ylabel="tokens per second", title=entry["name"])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


def _warnings(entry: dict[str, Any]) -> Iterator[str]:
    company = entry["company"]
    if company and company["cpus_used_by_others"] > QUIET:
        yield f"NOT QUIET: others used {company['cpus_used_by_others']:.2f} CPUs meanwhile."


def _prefill(row: dict[str, Any], name: str) -> str:
    seconds = row["prefill"].get(name)
    return three(row["context"] / seconds) if seconds else NONE


def _plain(weights: str) -> str:
    return weights.partition(" (")[0]


def _place(context: int) -> str:
    return short(context) if context else "none"


def _and(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
