"""Tables for a terminal of 80 columns, and plots, of the benchmarks of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from scout_hf.eval.tables import Grid, by, median, share, short, three

NOTHING = "-"
WHY = ("skipped", "oom", "failed", "absent")
COLOURS = {
    "plain": "#1f77b4", "prefetch lines": "#2ca02c", "prefetch bulk": "#17becf", "sdpa": "#d62728",
    "sdpa flash": "#ff7f0e", "flashinfer": "#9467bd", "flash_attn": "#8c564b", "gathered by torch": "#8c8c8c",
    "stock": "#d62728", "stock compiled": "#ff7f0e", "stock offloaded": "#8c564b", "stock offloaded_static": "#e377c2",
    "scout join": "#1f77b4", "scout flags": "#2ca02c", "scout graph": "#17becf", "scout in-layer": "#9467bd",
}  # fmt: skip
_heads, _arms = itemgetter("query_heads", "kv_heads", "block_size"), itemgetter("model", "context")


# -- tables ---------------------------------------------------------------------------------------------------------


def kernel_tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    """The tables of ``bench gpu-kernel``."""
    yield _device_line(record)
    yield "GB/s and share of copying are those of the best tile; ratio: prefetch/plain, below 1 is a gain\n"
    dense, scattered, scores = record["dense"], record["scattered"], record["score"]
    for key, rows in by(dense, _heads).items():
        title = "{}/{} heads, blocks of {}, all tokens attended: us".format(*key)
        names = ("batch", "tokens", "plain", "prefetch", "sdpa", "f.infer", "f.attn", "GB/s", "copy", "ratio")
        table = Grid(title, names, 0)
        others = ("sdpa", "flashinfer", "flash_attn")
        table.rows = [(str(row["batch"]), str(row["tokens"]), *_kernel_cells(row, *others)) for row in rows]
        yield table
    if scattered:
        one = scattered[0]
        title = f"{one['tokens']} of {one['cache_tokens']} tokens in scattered blocks, batch {one['batch']}: us"
        table = Grid(title, ("heads", "block", "plain", "prefetch", "gathered", "GB/s", "copy", "ratio"), 0)
        for row in scattered:
            cells = _kernel_cells(row, "gathered by torch")
            table.add(f"{row['query_heads']}/{row['kv_heads']}", str(row["block_size"]), *cells)
        yield table
    if scores:
        one = scores[0]
        heads = f"{one['query_heads']}/{one['kv_heads']} heads, batch {one['batch']}"
        names = ("digest", "tokens", "MiB", "score", "GB/s", "copy", "choose", "both")
        table = Grid(f"scores of digests and the choice, {heads}: us", names)
        table.rows = [(row["digest"], str(row["tokens"]), *_score_cells(row)) for row in scores]
        yield table
    yield from _reasons([*dense, *scattered, *scores], _cell_name)
    absent = {f"{name}: {one['absent']}" for row in dense for name, one in row.get("times", {}).items()
              if "absent" in one}  # fmt: skip
    if absent:
        yield "; ".join(sorted(absent)) + "\n"


def _kernel_cells(row: dict[str, Any], *others: str) -> list[str]:
    if "times" not in row:
        return [_why(row), *[NOTHING] * (len(others) + 4)]
    times = row["times"]
    best = best_of(times, "plain", "prefetch lines", "prefetch bulk")
    ahead = best_of(times, "prefetch lines", "prefetch bulk")
    cells = [_us(times.get("plain")), _us(ahead), *(_us(times.get(name)) for name in others)]
    return [*cells, f"{best['gb_per_s']:.0f}", share(best["share_of_copy"]), three(row["ratios"].get("prefetch/plain"))]


def _score_cells(row: dict[str, Any]) -> list[str]:
    if "times" not in row:
        return [NOTHING, _why(row), *[NOTHING] * 4]
    times, score = row["times"], row["times"]["score"]
    rate = f"{score['gb_per_s']:.0f}", share(score["share_of_copy"])
    both = (_us(times[name]) for name in ("choose", "score and choose"))
    return [f"{row['digest_bytes'] / 2**20:.0f}", _us(score), *rate, *both]


def best_of(times: dict[str, Any], *names: str) -> dict[str, Any] | None:
    """The fastest of the named kernels; None if none of them was timed."""
    there = [times[name] for name in names if "us" in times.get(name, {})]
    return min(there, key=lambda one: one["us"], default=None)


def decode_tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    """The tables of ``bench gpu-decode``."""
    yield _device_line(record)
    yield f"{record['selection']}; limit: what a step must move, at the rates of copying and of the link\n"
    for (name, context), rows in by(record["arms"], _arms).items():
        model, budget = record["models"].get(name, {"whole": True}), record["settings"]["budget"]
        cut = "" if model["whole"] else f", CUT to {model['num_hidden_layers']} layers"
        title = f"{name}{cut}, {context} tokens, budget {budget}: steps"
        speed = Grid(title, ("batch", "arm", "ms (quartiles)", "limit", "tokens/s", "vs stock"), 2)
        names = ("batch", "arm", "on GPU", "on host", "CPU", "wait", "idle", "polls", "recalled")
        parts = Grid("GB of KV; CPU share; ms of wait; GPU share; MB", names, 2)
        stock = {(one["batch"], one["run"]): one for one in rows if one["arm"] == "stock"}
        for one in rows:
            where = str(one["batch"]), one["arm"]
            if "median_ms" not in one:
                speed.add(*where, _why(one), *[NOTHING] * 3)
                continue
            beside = stock.get((one["batch"], one["run"]), {}).get("median_ms")
            gain = three(beside and beside / one["median_ms"])
            speed.add(*where, median(one), three(one["limit_ms"]), f"{one['tokens_per_s']:.0f}", gain)
            parts.add(*where, *_part_cells(one))
        yield speed
        if parts.rows:
            yield parts
    if found := [one["drift_measured"] for one in record["arms"] if one.get("drift_measured") is not None]:
        cost = max(one["drift_ms"] for one in record["arms"] if one.get("drift_ms") is not None)
        yield (
            f"chosen blocks that did change per step: {min(found):.1%} to {max(found):.1%}\n"
            f"the walk by itself takes at most {cost:.2f} ms of a step\n"
        )
    for (name, context), rows in by(record["largest"], _arms).items():
        table = Grid(f"{name}, {context} tokens: largest batch", ("GiB", "arm", "batch", "ms", "tokens/s"), 2)
        for one in rows:
            best = one.get("at_largest") or {}
            size = str(one["largest_batch"]) if "largest_batch" in one else _why(one)
            cells = three(best.get("median_ms")), three(best.get("tokens_per_s"))
            table.add(f"{one['cap_gib']:g}", one["arm"], size, *cells)
        yield table
    yield from _reasons([*record["arms"], *record["largest"]], lambda one: one["arm"])


def _part_cells(one: dict[str, Any]) -> list[str]:
    sizes = (f"{one[name] / 1e9:.2f}" for name in ("device_kv_bytes", "host_kv_bytes"))
    moved = one.get("recalled_bytes_per_step")
    shares = share(one["gpu_idle_share"]), share(one["gpu_wait_share"])
    wait = three(one.get("join_wait_ms"))
    return [*sizes, share(one.get("cpu_ratio")), wait, *shares, three(None if moved is None else moved / 1e6)]


def _device_line(record: dict[str, Any]) -> str:
    one = record["device"]
    if one["name"] is None:
        return "no GPU: these times prove that the benchmark runs, and nothing else\n"
    versions = f"CUDA {one['cuda']}, triton {one.get('triton', 'none')}"
    rates = f"copies {one['copy']['gb_per_s']:.0f} GB/s (read + written), link {one['link']['gb_per_s']:.1f} GB/s"
    return f"{one['name']}, {versions}\n{rates}\n"


def _reasons(rows: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """Each reason for missing figures, with the cells that it concerns."""
    found = [(row[kind], name(row)) for row in rows for kind in WHY[:3] if kind in row]
    found += [(warning, name(row)) for row in rows for warning in row.get("warnings", ())]
    for reason, pairs in by(found, itemgetter(0)).items():
        yield f"{', '.join(dict.fromkeys(who for _, who in pairs))}: {reason}\n"


def _cell_name(row: dict[str, Any]) -> str:
    return f"{row.get('digest', '')} {row['query_heads']}/{row['kv_heads']}, {row['tokens']} x {row['batch']}".strip()


def _why(one: dict[str, Any]) -> str:
    return next((word for word in WHY if word in one), NOTHING)


def _us(one: dict[str, Any] | None) -> str:
    return NOTHING if one is None else three(one["us"]) if "us" in one else _why(one)


# -- plots ----------------------------------------------------------------------------------------------------------


def plot_kernel(record: dict[str, Any], figure) -> None:
    """Draw rates and the gain of prefetching of ``bench gpu-kernel``."""
    rates, gains = figure.subplots(1, 2)
    rows = [row for row in record["dense"] if "times" in row]
    for name, colour in COLOURS.items():
        seen = [(row["kv_bytes"] / 1e6, row["times"][name]["gb_per_s"]) for row in rows
                if "gb_per_s" in row["times"].get(name, {})]  # fmt: skip
        if seen:
            rates.plot(*zip(*sorted(seen)), "o", markersize=4, color=colour, alpha=0.7, label=name)
    if copy := record["device"]["copy"]:
        rates.axhline(copy["gb_per_s"], color="#333333", linestyle="--", label="copy, read + written")
    for key, group in by((row for row in rows if "prefetch/plain" in row["ratios"]), _heads).items():
        seen = sorted((row["kv_bytes"] / 1e6, row["ratios"]["prefetch/plain"]) for row in group)
        gains.plot(*zip(*seen), marker="o", markersize=4, label="{}/{} heads, blocks of {}".format(*key))
    gains.axhline(1, color="#333333", linewidth=0.8)
    rates.set(ylabel="GB/s of keys and values", ylim=(0, None), title="Rate")
    gains.set(ylabel="time with prefetch / without", title="Prefetch into L2")
    for axes in (rates, gains):
        axes.set(xlabel="MB of keys and values read", **({"xscale": "log"} if rows else {}))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(f"Decode attention on {record['device']['name'] or 'a CPU, interpreted'}", fontsize=11)


def plot_decode(record: dict[str, Any], figure) -> None:
    """Draw latency and throughput of ``bench gpu-decode``."""
    latency, rate = figure.subplots(1, 2)
    measured = [one for one in record["arms"] if "median_ms" in one]
    contexts = sorted({one["context"] for one in measured})
    few = min((one["batch"] for one in measured), default=1)
    styles = dict(zip(record["models"], ("-", "--", ":", "-.")))
    for (model, arm), rows in by(measured, itemgetter("model", "arm")).items():
        style = {"marker": "o", "markersize": 4, "color": COLOURS.get(arm), "linestyle": styles.get(model, "-")}
        if single := sorted((one["context"], one["median_ms"]) for one in rows if one["batch"] == few):
            latency.plot(*zip(*single), **style, label=f"{model}, {arm}")
        groups = sorted(by(rows, itemgetter("context")).items())
        best = [(context, max(one["tokens_per_s"] for one in group)) for context, group in groups]
        rate.plot(*zip(*best), **style)
    latency.set(ylabel="ms per step (median)", title=f"Batch {few}")
    rate.set(ylabel="tokens/s", title="Best of the batches that fit")
    for axes in (latency, rate):
        axes.set(xlabel="tokens in the cache")
        axes.grid(alpha=0.3)
        if measured:
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(contexts, [short(context) for context in contexts], minor=False)
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if measured:
        figure.legend(*latency.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    cut = "" if all(model["whole"] for model in record["models"].values()) else ", models CUT"
    place, drift = record["device"]["name"] or "a CPU", record["settings"]["drift"]
    figure.suptitle(f"Decode steps on {place}, {drift:.0%} of the choice changes per step{cut}", fontsize=11)
