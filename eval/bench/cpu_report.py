"""Tables for a terminal of 80 columns, and plots, of the benchmarks of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scout_hf.eval.tables import Grid, median, short, three

COLOURS = {
    "read": "#8c8c8c", "sequential": "#333333", "native": "#1f77b4", "scout": "#1f77b4", "scout exact": "#9467bd",
    "int8": "#2ca02c", "scout int8": "#2ca02c", "torch": "#d62728", "stock": "#d62728", "stock folded": "#ff7f0e",
}  # fmt: skip
LABELS = {
    "sequential": "memory read in order",
    "read": "the same tiles, only read",
    "native": "scout_hf, bf16",
    "int8": "scout_hf, int8",
    "torch": "gathered by torch",
}
FASTER = {"stock/scout": 7, "stock folded/scout": -13}
"""Ratios that are drawn, and how far from the line their figures stand."""


# -- tables ---------------------------------------------------------------------------------------------------------


def kernel_tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    rows, cache = record["attend"], record["settings"]["cache_tokens"]
    names = ("native", "read", "torch", "int8")
    table = Grid(f"attention over blocks scattered over {cache} tokens: ms, median (quartiles)", ("tokens", *names))
    table.rows = [(str(row["tokens"]), *(median(row[name]) for name in names)) for row in rows]
    yield table
    columns = ("tokens", "native", "read", "in order", "native/read", "torch/native", "bf16/int8")
    table = Grid("GB/s of keys and values, beside bare reads; ratios of times", columns)
    for row in rows:
        rates = (f"{row[name]['gb_per_s']:.1f}" for name in ("native", "read", "sequential"))
        ratios = row["ratios"]
        others = 1 / ratios["read/native"], ratios["torch/native"], ratios["native/int8"]
        table.add(str(row["tokens"]), *rates, *(f"{ratio:.2f}" for ratio in others))
    yield table
    select = record["select"]
    # Older records lack some, or all but min/max.
    signs = {name: select[name] for name in ("sign", "sign2") if name in select}
    for kind, times in {"min/max": select, **{f"{name} codes": times for name, times in signs.items()}}.items():
        size = f"{times['digest_bytes'] / 2**20:.1f} MiB of {kind}"
        names = ("native", "native_score", "read", "torch")
        table = Grid(f"choosing {select['chosen']} of {select['blocks']} blocks, {size}",
                     ("", "native", "scores alone", "read", "torch"))  # fmt: skip
        table.add("ms", *(median(times[name]) for name in names))
        table.add("GB/s", *(f"{times[name]['gb_per_s']:.1f}" for name in names))
        yield table
    for name, times in signs.items():
        ratios = [times["ratios"][f"{name}_{call}/{call}"] for call in ("native", "native_score")]
        yield f"{name} codes take {ratios[0]:.2f} times as long as min/max, {ratios[1]:.2f} times for scores alone\n"
        if "coarse" in times:  # older records lack it
            ratio = times["ratios"][f"{name}_coarse/{name}_read"]
            yield f"{name} codes, coarsely first: {median(times['coarse'])} ms, {ratio:.2f} times the read\n"
    if whole := record["dense"]:
        folded, grouped = (three(whole[name]["median_ms"]) for name in ("folded", "enable_gqa"))
        yield f"torch over all {whole['tokens']} tokens: {folded} ms folded, {grouped} ms enable_gqa\n"
    table = Grid("int8 beside bf16: largest difference", ("keys", "LSE", "output", "relative"))
    for kind, error in record["int8_error"].items():
        table.add(kind, *(f"{error['int8_to_bf16'][name]:.1e}" for name in ("lse", "out", "relative")))
    yield table


def decode_tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    model = record["model"]
    title = f"decode steps, {model['num_hidden_layers']} layers, {model['weight_bytes'] / 1e9:.2f} GB of weights"
    table = Grid(title, ("context", "mode", "ms (quartiles)", "n", "vs 0", "KV read", "GB", "GB/s"), 2)
    for row in record["contexts"]:
        for index, (name, one) in enumerate(row["modes"].items()):
            figures = f"{one['over_zero_context']:.2f}", f"{one['kv_share']:.1%}", f"{one['bytes'] / 1e9:.2f}"
            place, last = "" if index else str(row["context"]), index == len(row["modes"]) - 1
            table.add(place, name, median(one), str(one["n"]), *figures, f"{one['gb_per_s']:.1f}", end=last)
    yield table
    ours = dict.fromkeys(name.split("/")[1] for name in record["contexts"][0]["ratios"])
    table = Grid("ratios of times", ("context", "", *(f"/ {name}" for name in ours)), 2)
    for row in record["contexts"]:
        theirs = list(dict.fromkeys(name.split("/")[0] for name in row["ratios"]))
        for name in theirs:
            ratios = (f"{row['ratios'][f'{name}/{mine}']:.2f}" for mine in ours)
            place = "" if name != theirs[0] else str(row["context"])
            table.add(place, name, *ratios, end=name == theirs[-1])
    yield table
    rate = f"{record['read']['gb_per_s']:.1f} GB/s"
    yield f"memory read in order: {rate}; the weights alone take {record['weights_read_ms']:.1f} ms at that rate\n"
    if prefill := record["prefill"]:
        times = f"stock {prefill['stock']['median_ms'] / 1e3:.2f} s, scout {prefill['scout']['median_ms'] / 1e3:.2f} s"
        of = f"prefill of {prefill['tokens']} tokens through {prefill['layers']} layers"
        yield f"{of}: {times}, ratio {prefill['ratios']['scout/stock']:.3f}\n"
        if "limit_ms" in prefill:  # older records have none
            yield f"torch multiplies {prefill['product_gflop_per_s']:.0f} GFLOP/s; at that rate {_limit(prefill)}\n"
    if held := record["memory"]:
        title = f"growth of a process per byte of bf16 KV, {held[0]['tokens']} tokens"
        table = Grid(title, ("cache", "held", "at most"))
        table.rows = [(one["kind"], f"{one['held_share']:.3f}", f"{one['peak_share']:.3f}") for one in held]
        yield table


def _limit(prefill: dict[str, Any]) -> str:
    limit, of = prefill["limit_ms"], prefill["gflop"]
    shares = (f"{name} is at {limit / prefill[name]['median_ms']:.0%}" for name in ("stock", "scout"))
    attention = of["attention"] / sum(of.values())
    return f"it would take {limit / 1e3:.2f} s, {attention:.0%} for attention; {', '.join(shares)}"


# -- plots ----------------------------------------------------------------------------------------------------------


def plot_kernel(record: dict[str, Any], figure) -> None:
    rows, settings = record["attend"], record["settings"]
    rates, times = figure.subplots(1, 2)
    tokens = [row["tokens"] for row in rows]

    def of(kind: str, name: str) -> list[float]:
        return [row[kind][name] for row in rows]

    for kind, label in LABELS.items():
        style = {"color": COLOURS[kind], "label": label, "linestyle": "--" if kind in ("sequential", "read") else "-"}
        rates.plot(tokens, of(kind, "gb_per_s"), marker="o", markersize=4, **style)
        if kind != "sequential":
            times.plot(tokens, of(kind, "median_ms"), marker="o", markersize=4, **style)
            low, high = of(kind, "q1_ms"), of(kind, "q3_ms")
            times.fill_between(tokens, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if whole := record["dense"]:
        label = f"torch, all {short(whole['tokens'])} tokens"
        times.axhline(whole["folded"]["median_ms"], color="#9467bd", linestyle=":", label=label)
    rates.set(ylabel="GB/s of keys and values as stored", ylim=(0, None), title="Rate")
    times.set(ylabel="ms per call (median, quartiles)", yscale="log", title="Time")
    for axes in (rates, times):
        axes.set(xscale="log", xlabel="tokens selected per KV head")
        axes.set_xticks(tokens, [short(count) for count in tokens], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    times.yaxis.set_major_formatter("{x:g}")
    named = {label: line for axes in (rates, times) for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside right center")
    shape = f"{settings['query_heads']}/{settings['kv_heads']} heads of {settings['head_dim']}"
    blocks = f"blocks of {settings['block_size']} scattered over {short(settings['cache_tokens'])} tokens"
    figure.suptitle(f"Decode attention on the CPU: {shape}, {blocks}", fontsize=11)


def plot_decode(record: dict[str, Any], figure) -> None:
    rows, model = record["contexts"], record["model"]
    bars, gain = figure.subplots(1, 2, width_ratios=(2, 1))
    names, places = list(rows[0]["modes"]), range(len(rows))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        low, middle, high = ([row["modes"][name][one] for row in rows] for one in ("q1_ms", "median_ms", "q3_ms"))
        spread = [[b - a for a, b in zip(*pair)] for pair in ((low, middle), (middle, high))]
        where = [index + (place - (len(names) - 1) / 2) * width for index in places]
        drawn = bars.bar(where, middle, width * 0.95, yerr=spread, capsize=2, color=COLOURS[name], label=name)
        bars.bar_label(drawn, [f"{value:.0f}" for value in middle], fontsize=7, padding=2)
    bars.axhline(record["weights_read_ms"], color="#333333", linestyle="--", label="reading the weights once")
    bars.set(yscale="log", ylabel="ms per decode step (median, quartiles)")
    bars.set_ylim(top=2 * max(one["q3_ms"] for row in rows for one in row["modes"].values()))
    for name, offset in FASTER.items():
        ratios, colour = [row["ratios"][name] for row in rows], COLOURS[name.split("/")[0]]
        gain.plot(places, ratios, marker="o", color=colour, label=name)
        for where, ratio in enumerate(ratios):
            place = {"textcoords": "offset points", "xytext": (0, offset), "ha": "center"}
            gain.annotate(f"{ratio:.1f}", (where, ratio), fontsize=8, color=colour, **place)
    gain.axhline(1, color="#333333", linewidth=0.8)
    gain.set(yscale="log", ylabel="times faster")
    gain.set_yticks([1, 2, 5, 10, 20, 50, 100], minor=False)
    gain.minorticks_off()
    most, least = (f(ratio for row in rows for ratio in row["ratios"].values()) for f in (max, min))
    gain.set_ylim(min(least, 1) * 0.7, most * 2)
    gain.margins(x=0.15)
    for axes in (bars, gain):
        axes.set_xticks(places, [short(row["context"]) if row["context"] else "none" for row in rows])
        axes.set(xlabel="tokens in the cache")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, loc="upper left")
    heads = f"{model['num_attention_heads']}/{model['num_key_value_heads']} heads of {model['head_dim']}"
    shape = f"{model['num_hidden_layers']} layers, {heads}, {model['weight_bytes'] / 1e9:.2f} GB of {model['dtype']}"
    figure.suptitle(f"Decode step: {shape}, budget {short(record['settings']['budget'])} tokens", fontsize=11)
