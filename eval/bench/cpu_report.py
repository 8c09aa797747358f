"""Tables for a terminal of 80 columns, and plots, of the benchmarks of the CPU."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from scout_hf.eval.bench.formats import median, new_table, short, three

COLOURS = {
    "read": "#8c8c8c",
    "sequential": "#333333",
    "native": "#1f77b4",
    "scout": "#1f77b4",
    "int8": "#2ca02c",
    "scout int8": "#2ca02c",
    "torch": "#d62728",
    "stock": "#d62728",
    "stock folded": "#ff7f0e",
}


# -- tables ---------------------------------------------------------------------------------------------------------


def kernel_tables(record: dict[str, Any]):
    rows, cache = record["attend"], record["settings"]["cache_tokens"]
    names = ("native", "read", "torch", "int8")
    table = new_table(f"attention over blocks scattered over {cache} tokens: ms, median (quartiles)", "tokens", *names)
    for row in rows:
        table.add_row(str(row["tokens"]), *(median(row[name]) for name in names))
    yield table
    columns = ("native", "read", "in order", "native/read", "torch/native", "bf16/int8")
    table = new_table("GB/s of keys and values, beside bare reads; ratios of times", "tokens", *columns)
    for row in rows:
        rates = [f"{row[name]['gb_per_s']:.1f}" for name in ("native", "read", "sequential")]
        ratios = row["ratios"]
        others = [1 / ratios["read/native"], ratios["torch/native"], ratios["native/int8"]]
        table.add_row(str(row["tokens"]), *rates, *(f"{ratio:.2f}" for ratio in others))
    yield table
    select = record["select"]
    # Older records have min/max alone.
    for kind, one in {"min/max": select, "sign codes": select.get("sign")}.items():
        if one:
            yield _choice_table(kind, one, select)
    if signs := select.get("sign"):
        ratios = [signs["ratios"][name] for name in ("sign_native/native", "sign_native_score/native_score")]
        yield f"sign codes take {ratios[0]:.2f} times as long as min/max, {ratios[1]:.2f} times for scores alone\n"
    if whole := record["dense"]:
        folded, grouped = (three(whole[name]["median_ms"]) for name in ("folded", "enable_gqa"))
        yield f"torch over all {whole['tokens']} tokens: {folded} ms folded, {grouped} ms enable_gqa\n"
    table = new_table("int8 beside bf16: largest difference", "keys", "LSE", "output", "relative")
    for kind, error in record["int8_error"].items():
        one = error["int8_to_bf16"]
        table.add_row(kind, f"{one['lse']:.1e}", f"{one['out']:.1e}", f"{one['relative']:.1e}")
    yield table


def _choice_table(kind: str, times: dict[str, Any], select: dict[str, Any]) -> Table:
    size = f"{times['digest_bytes'] / 2**20:.1f} MiB of {kind}"
    title = f"choosing {select['chosen']} of {select['blocks']} blocks, {size}"
    names = ("native", "native_score", "read", "torch")
    table = new_table(title, "", "native", "scores alone", "read", "torch")
    table.add_row("ms", *(median(times[name]) for name in names))
    table.add_row("GB/s", *(f"{times[name]['gb_per_s']:.1f}" for name in names))
    return table


def decode_tables(record: dict[str, Any]):
    model = record["model"]
    title = f"decode steps, {model['num_hidden_layers']} layers, {model['weight_bytes'] / 1e9:.2f} GB of weights"
    table = new_table(title, "context", "mode", "ms (quartiles)", "n", "vs 0", "KV read", "GB", "GB/s", words=2)
    for row in record["contexts"]:
        for index, (name, one) in enumerate(row["modes"].items()):
            table.add_row(
                "" if index else str(row["context"]),
                name,
                median(one),
                str(one["n"]),
                f"{one['over_zero_context']:.2f}",
                f"{one['kv_share']:.1%}",
                f"{one['bytes'] / 1e9:.2f}",
                f"{one['gb_per_s']:.1f}",
                end_section=index == len(row["modes"]) - 1,
            )
    yield table
    names = [
        name.replace("stock folded", "folded").replace("scout int8", "int8") for name in record["contexts"][0]["ratios"]
    ]
    table = new_table("ratios of times", "context", *names)
    for row in record["contexts"]:
        table.add_row(str(row["context"]), *(f"{ratio:.2f}" for ratio in row["ratios"].values()))
    yield table
    rate = f"{record['read']['gb_per_s']:.1f} GB/s"
    yield f"memory read in order: {rate}; the weights alone take {record['weights_read_ms']:.1f} ms at that rate\n"
    if prefill := record["prefill"]:
        times = f"stock {prefill['stock']['median_ms'] / 1e3:.2f} s, scout {prefill['scout']['median_ms'] / 1e3:.2f} s"
        of = f"prefill of {prefill['tokens']} tokens through {prefill['layers']} layers"
        yield f"{of}: {times}, ratio {prefill['ratios']['scout/stock']:.3f}\n"
    if record["memory"]:
        tokens = record["memory"][0]["tokens"]
        table = new_table(f"growth of a process per byte of bf16 KV, {tokens} tokens", "cache", "held", "at most")
        for one in record["memory"]:
            table.add_row(one["kind"], f"{one['held_share']:.3f}", f"{one['peak_share']:.3f}")
        yield table


# -- plots ----------------------------------------------------------------------------------------------------------


def plot_kernel(record: dict[str, Any], figure) -> None:
    rows, settings = record["attend"], record["settings"]
    labels = {
        "sequential": "memory read in order",
        "read": "the same tiles, only read",
        "native": "scout_hf, bf16",
        "int8": "scout_hf, int8",
        "torch": "gathered by torch",
    }
    rates, times = figure.subplots(1, 2)
    tokens = [row["tokens"] for row in rows]
    for name, label in labels.items():
        style = {"color": COLOURS[name], "label": label, "linestyle": "--" if name in ("sequential", "read") else "-"}
        rates.plot(tokens, [row[name]["gb_per_s"] for row in rows], marker="o", markersize=4, **style)
        if name != "sequential":
            ones = [row[name] for row in rows]
            times.plot(tokens, [one["median_ms"] for one in ones], marker="o", markersize=4, **style)
            low, high = ([one[name] for one in ones] for name in ("q1_ms", "q3_ms"))
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
    names = list(rows[0]["modes"])
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        ones = [row["modes"][name] for row in rows]
        middle = [one["median_ms"] for one in ones]
        spread = [
            [one["median_ms"] - one["q1_ms"] for one in ones],
            [one["q3_ms"] - one["median_ms"] for one in ones],
        ]
        where = [index + (place - (len(names) - 1) / 2) * width for index in range(len(rows))]
        drawn = bars.bar(where, middle, width * 0.95, yerr=spread, capsize=2, color=COLOURS[name], label=name)
        bars.bar_label(drawn, [f"{value:.0f}" for value in middle], fontsize=7, padding=2)
    bound = record["weights_read_ms"]
    bars.axhline(bound, color="#333333", linestyle="--", label="reading the weights once")
    contexts = [short(row["context"]) if row["context"] else "none" for row in rows]
    bars.set_xticks(range(len(rows)), contexts)
    bars.set(yscale="log", ylabel="ms per decode step (median, quartiles)", xlabel="tokens in the cache")
    bars.set_ylim(top=2 * max(one["q3_ms"] for row in rows for one in row["modes"].values()))
    for name, offset in (("stock/scout", 7), ("stock folded/scout", -13)):
        ratios, colour = [row["ratios"][name] for row in rows], COLOURS[name.split("/")[0]]
        gain.plot(range(len(rows)), ratios, marker="o", color=colour, label=name)
        for where, ratio in enumerate(ratios):
            place = {"textcoords": "offset points", "xytext": (0, offset), "ha": "center"}
            gain.annotate(f"{ratio:.1f}", (where, ratio), fontsize=8, color=colour, **place)
    gain.axhline(1, color="#333333", linewidth=0.8)
    gain.set_xticks(range(len(rows)), contexts)
    gain.set(yscale="log", ylabel="times faster", xlabel="tokens in the cache")
    gain.set_yticks([1, 2, 5, 10, 20, 50, 100], minor=False)
    gain.minorticks_off()
    most, least = (f(ratio for row in rows for ratio in row["ratios"].values()) for f in (max, min))
    gain.set_ylim(min(least, 1) * 0.7, most * 2)
    gain.margins(x=0.15)
    for axes in (bars, gain):
        axes.yaxis.set_major_formatter("{x:g}")
    for axes in (bars, gain):
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, loc="upper left")
    heads = f"{model['num_attention_heads']}/{model['num_key_value_heads']} heads of {model['head_dim']}"
    shape = f"{model['num_hidden_layers']} layers, {heads}, {model['weight_bytes'] / 1e9:.2f} GB of {model['dtype']}"
    figure.suptitle(f"Decode step: {shape}, budget {short(record['settings']['budget'])} tokens", fontsize=11)
