"""Rules for records of benchmarks: what tables, plots and resumed runs need."""

from __future__ import annotations

from typing import Any

from scout_hf.rules import anything, count, fields, flag, items, maybe, number, one_of, simple, table, text

ABOVE_ZERO = number(1e-12, 1e15)
FROM_ZERO = number(0, 1e18)
WORD = text(400)
MAYBE_WORD = maybe(WORD)
MACHINE = table(simple)
TIME = {name: FROM_ZERO for name in ("median_ms", "q1_ms", "q3_ms")}
TIMED = fields(TIME)
RATED = fields(TIME | {"gb_per_s": FROM_ZERO})
RATE = fields({"gb_per_s": FROM_ZERO})


def _all_of(rule, *names):
    return fields({name: rule for name in names})


_CHOICE = {name: RATED for name in ("native", "native_score", "read", "torch")} | {"digest_bytes": count()}
_SIGNS = {
    name: fields(
        _CHOICE | {"ratios": _all_of(ABOVE_ZERO, f"{name}_native/native", f"{name}_native_score/native_score")}
    )
    for name in ("sign", "sign2")
}
_ERROR = fields({"int8_to_bf16": _all_of(FROM_ZERO, "lse", "out", "relative")})

CPU_KERNEL = fields(
    {
        "benchmark": one_of("cpu_kernel"),
        "settings": _all_of(count(1), "cache_tokens", "query_heads", "kv_heads", "head_dim", "block_size", "threads"),
        "machine": MACHINE,
        "attend": items(
            fields(
                {"tokens": count(1), "ratios": _all_of(ABOVE_ZERO, "read/native", "torch/native", "native/int8")}
                | {name: RATED for name in ("native", "read", "torch", "int8")}
                | {"sequential": RATE}
            ),
            fewest=1,
        ),
        "select": fields(_CHOICE | {"blocks": count(), "chosen": count()}, _SIGNS),
        "dense": maybe(fields({"tokens": count(1), "folded": TIMED, "enable_gqa": TIMED})),
        "int8_error": fields({"normal": _ERROR, "outliers": _ERROR}),
    }
)

_STEP = TIME | {"n": count(), "over_zero_context": FROM_ZERO, "kv_share": FROM_ZERO}
_STEP |= {"bytes": FROM_ZERO, "gb_per_s": FROM_ZERO}
_HEADS = {name: count(1) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")}
_PREFILL = {"tokens": count(1), "layers": count(1), "stock": TIMED, "scout": TIMED}

CPU_DECODE = fields(
    {
        "benchmark": one_of("cpu_decode"),
        "settings": _all_of(count(), "budget", "block_size", "threads", "prefill_tokens"),
        "machine": MACHINE,
        "model": fields(_HEADS | {"weight_bytes": count(), "dtype": WORD}),
        "contexts": items(
            fields({"context": count(), "modes": table(fields(_STEP)), "ratios": table(ABOVE_ZERO)}), fewest=1
        ),
        "read": RATE,
        "weights_read_ms": FROM_ZERO,
        "prefill": maybe(fields(_PREFILL | {"ratios": _all_of(ABOVE_ZERO, "scout/stock")})),
        "memory": items(fields({"kind": WORD, "tokens": count(1), "held_share": number(), "peak_share": number()})),
    }
)

GPU_FORMAT = "scout_hf.gpu/1"
_TOLD = {name: text() for name in ("skipped", "oom", "failed", "absent", "note")} | {"warnings": items(text())}
_RATES = ("gb_per_s", "tflop_per_s", "share_of_copy", "tokens_per_s", "us", "difference", "cpu_ratio", "join_wait_ms")
_BYTES_HELD = ("device_kv_bytes", "host_kv_bytes", "device_peak_bytes", "recalled_bytes_per_step")
_FIGURES = {name: maybe(FROM_ZERO) for name in (*TIME, *_RATES, *_BYTES_HELD, "seconds", "slab_gib", "pinned_gib")}
_COUNTS = {name: count() for name in ("batch", "context", "passed", "tests", "not_for_here")}
_TIMES = {"times": table(fields({}, _TOLD | {"us": FROM_ZERO, "share_of_copy": maybe(FROM_ZERO)}))}
_LISTS = {name: items(text()) for name in ("failures", "facts")}

GPU = fields(
    {
        "benchmark": one_of("gpu"),
        "format": one_of(GPU_FORMAT),
        "settings": fields(
            {"device": WORD, "layers": maybe(count(1)), "budget": count(1), "digest": WORD, "drift": FROM_ZERO}
        ),
        "machine": MACHINE,
        "stages": items(
            fields(
                {"stage": WORD, "state": one_of("done", "in part", "failed", "not run"), "why": maybe(text())}
                | {"left": items(text()), "seconds": FROM_ZERO}
            )
        ),
        "cells": items(
            fields(
                {"stage": WORD, "cell": WORD, "run": WORD, "code": WORD},
                _TOLD | _FIGURES | _COUNTS | _TIMES | _LISTS | {"unfinished": flag},
            )
        ),
    }
)

_WHY = {name: text() for name in ("missing", "failed", "oom")}
_NEEDED = {
    "speed": {"shape": WORD, "context": count(1), "batch": count(1)},
    "equal": {"context": count(1)},
    "score": {"task": WORD, "context": count(1), "budget": count()},
}
_MEASURED = {
    "speed": {name: ABOVE_ZERO for name in ("step_ms", "q1_ms", "q3_ms", "tokens_per_s")}
    | {"device_bytes": FROM_ZERO, "host_bytes": FROM_ZERO, "exact": flag},
    "equal": {"batch": count(), "tokens_per_s": ABOVE_ZERO, "step_ms": ABOVE_ZERO},
    "score": {"right": count(), "questions": count(1), "exact": flag}
    | {"row_step_ms": ABOVE_ZERO, "prefill_s": FROM_ZERO},
}
_OTHERS = {"gib": maybe(ABOVE_ZERO), "link_bytes": FROM_ZERO, "join_ms": FROM_ZERO, "cpu_ms": FROM_ZERO}
_OTHERS |= {"shares": table(number(-1e3, 1e3)), "cpu_ratio": maybe(number(0, 1e6)), "commit": MAYBE_WORD}
_OTHERS |= {"shape": WORD, "batch": count(), "model": WORD} | _WHY


def _cell(value: Any) -> None:
    fields({"part": one_of(*_NEEDED), "way": WORD}, _OTHERS)(value)
    part = value["part"]
    fields(_NEEDED[part])(value)
    if "step_ms" in value or "row_step_ms" in value:
        fields(_MEASURED[part])(value)
    elif not any(name in value for name in _WHY):
        raise ValueError(f": there is neither a figure nor a reason for none ({', '.join(_WHY)})")


METHODS = fields(
    {
        "benchmark": one_of("methods"),
        "settings": fields(
            {name: count() for name in ("budget", "layers", "threads")}
            | {"drift": FROM_ZERO, "emulated_as": text()}
            | {"emulation": fields({name: maybe(ABOVE_ZERO) for name in ("link_gbps", "cpu_gbps")}, closed=True)},
            {"shape": WORD, "block_size": count(1)},
        ),
        "machine": MACHINE,
        "cells": items(_cell),
    },
    {"commands": items(text()), "models": table(fields(_HEADS))},
)

_WALK = fields({"first": TIMED, "later": TIMED})
_COUNTED = fields(
    {name: FROM_ZERO for name in ("grown_bytes", "peak_bytes", "digest_bytes", "page_bytes", "over_limit")}
)
_READS = ("warm in order", "cold in order", "warm scattered", "cold one by one", "cold announced", "memcpy")

SESSIONS = fields(
    {
        "benchmark": one_of("sessions"),
        "settings": _all_of(count(1), "context", "budget", "block_size", "threads"),
        "machine": MACHINE,
        "company": fields({"cpus_used_by_others": FROM_ZERO}),
        "disk": table(anything),
        "model": fields(_HEADS | {"weight_bytes": count(), "dtype": WORD}),
        "save": fields({"bytes": count(1), "save": RATED, "bare": RATED}),
        "load": fields({"bytes": count(1)} | {name: RATED for name in ("warm", "cold", "bare warm", "bare cold")}),
        "steps": fields({"memory": _WALK, "warm": _WALK, "cold": _WALK}),
        "question": maybe(fields({"tokens": count(1), "memory": TIMED, "warm": TIMED})),
        "read": fields({"pieces": count(1), "piece_bytes": count(1)} | dict.fromkeys(_READS, RATED)),
        "limited": maybe(
            fields(
                {"tokens": count(1), "kv_bytes": count(1), "limit_bytes": count(1)}
                | {"ratios": table(ABOVE_ZERO), "memory": table(_COUNTED)}
                | {"steps": table(fields(TIME | {"away_bytes": FROM_ZERO, "disk_bytes": FROM_ZERO}))}
            )
        ),
        "targets": items(fields({"name": WORD, "bound": FROM_ZERO, "found": FROM_ZERO, "at_most": flag, "held": flag})),
    }
)

_BYTES = {f"{name}_bytes": FROM_ZERO for name in ("held", "peak", "kv", "read")}
_RUN = TIME | _BYTES | {"tokens_per_s": ABOVE_ZERO, "limit_ms": ABOVE_ZERO, "kv_share": FROM_ZERO}
_RUN |= {"rounds_ms": items(ABOVE_ZERO, fewest=1), "held_tokens": count(1), "attended_tokens": ABOVE_ZERO}
_NAMED = fields(
    {name: WORD for name in ("name", "kind", "weights", "kv")},
    {"told": text(), "attention": WORD, "agrees": maybe(number(0, 1)), "versions": table(WORD)},
)

RIVALS = fields(
    {
        "benchmark": one_of("rivals"),
        "settings": _all_of(count(1), "budget", "block_size", "threads", "rounds", "steps"),
        "machine": MACHINE,
        "models": items(
            fields(
                {
                    "name": WORD,
                    "settings": _all_of(count(1), "budget", "threads", "rounds", "prefill"),
                    "machine": MACHINE,
                    "company": maybe(fields({"cpus_used_by_others": FROM_ZERO})),
                    "read": RATE,
                    "arms": items(_NAMED),
                    "contexts": items(
                        fields(
                            {"context": count(), "prefill": table(ABOVE_ZERO), "arms": table(fields(_RUN))}
                            | {"ratios": table(ABOVE_ZERO)}
                        )
                    ),
                },
                {"idle_cpus": table(FROM_ZERO), "model": table(simple)},
            ),
            fewest=1,
        ),
    }
)

_DRAFTING = {"attended": FROM_ZERO, "drafted": count(), "checks": count(), "tokens": count(1), "equal": maybe(flag)}
_DRAFTING |= {"acceptance": maybe(number(0, 1)), "tokens_per_exact_pass": maybe(ABOVE_ZERO), "notes": items(text())}

DRAFTS = fields(
    {
        "benchmark": one_of("drafts"),
        "settings": fields({"model": WORD} | {name: count(1) for name in ("context", "budget", "new", "threads")}),
        "machine": MACHINE,
        "company": fields({"cpus_used_by_others": FROM_ZERO}),
        "model": fields({"dtype": WORD, "kv_bytes_per_token": count(1)}),
        "read": RATE,
        "link_gbps": ABOVE_ZERO,
        "arms": table(fields(_DRAFTING | {"tokens_per_s": ABOVE_ZERO})),
        "ratios": table(ABOVE_ZERO),
        "targets": items(fields({"name": WORD, "bound": FROM_ZERO, "found": FROM_ZERO, "held": flag})),
    }
)

BENCHMARKS = {
    "cpu_kernel": CPU_KERNEL,
    "cpu_decode": CPU_DECODE,
    "gpu": GPU,
    "methods": METHODS,
    "sessions": SESSIONS,
    "rivals": RIVALS,
    "drafts": DRAFTS,
}
