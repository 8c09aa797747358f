"""What a record of a benchmark must hold, so that its tables and plots can be made: of the CPU's, and of the GPU's."""

from __future__ import annotations

from scout_hf.rules import count, fields, flag, items, maybe, number, one_of, simple, table, text

ABOVE_ZERO = number(1e-12, 1e15)
FROM_ZERO = number(0, 1e18)
WORD = text(400)
MACHINE = table(simple)
TIME = {name: FROM_ZERO for name in ("median_ms", "q1_ms", "q3_ms")}
TIMED = fields(TIME)
RATED = fields(TIME | {"gb_per_s": FROM_ZERO})
RATE = fields({"gb_per_s": FROM_ZERO})


def _all_of(rule, *names):
    return fields({name: rule for name in names})


_CHOICE = {name: RATED for name in ("native", "native_score", "read", "torch")} | {"digest_bytes": count()}
_SIGN = {"ratios": _all_of(ABOVE_ZERO, "sign_native/native", "sign_native_score/native_score")}
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
        "select": fields(_CHOICE | {"blocks": count(), "chosen": count()}, {"sign": fields(_CHOICE | _SIGN)}),
        "dense": maybe(fields({"tokens": count(1), "folded": TIMED, "enable_gqa": TIMED})),
        "int8_error": fields({"normal": _ERROR, "outliers": _ERROR}),
    }
)

_STEP = TIME | {"n": count(), "over_zero_context": FROM_ZERO, "kv_share": FROM_ZERO}
_STEP |= {"bytes": FROM_ZERO, "gb_per_s": FROM_ZERO}
_HEADS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_PREFILL = {"tokens": count(1), "layers": count(1), "stock": TIMED, "scout": TIMED}

CPU_DECODE = fields(
    {
        "benchmark": one_of("cpu_decode"),
        "settings": _all_of(count(), "budget", "block_size", "threads", "prefill_tokens"),
        "machine": MACHINE,
        "model": fields({name: count(1) for name in _HEADS} | {"weight_bytes": count(), "dtype": WORD}),
        "contexts": items(
            fields({"context": count(), "modes": table(fields(_STEP)), "ratios": table(ABOVE_ZERO)}), fewest=1
        ),
        "read": RATE,
        "weights_read_ms": FROM_ZERO,
        "prefill": maybe(fields(_PREFILL | {"ratios": _all_of(ABOVE_ZERO, "scout/stock")})),
        "memory": items(fields({"kind": WORD, "tokens": count(1), "held_share": number(), "peak_share": number()})),
    }
)

_TOLD = {name: text() for name in ("skipped", "oom", "failed", "absent")} | {"warnings": items(text())}
_ARM = {"model": WORD, "context": count(), "arm": WORD, "run": WORD}
_RATES = ("limit_ms", "tokens_per_s", "device_kv_bytes", "host_kv_bytes")
_FIGURES = {name: maybe(FROM_ZERO) for name in (*TIME, *_RATES)}

GPU_DECODE = fields(
    {
        "benchmark": one_of("gpu_decode"),
        "settings": fields({"drift": FROM_ZERO}, {"budget": maybe(FROM_ZERO)}),
        "machine": MACHINE,
        "device": fields({"name": maybe(WORD)}),
        "models": table(fields({"whole": flag}, {"num_hidden_layers": count(1)})),
        "arms": items(fields(_ARM | {"batch": count()}, _TOLD | _FIGURES)),
        "largest": items(fields(_ARM | {"cap_gib": FROM_ZERO}, _TOLD | {"largest_batch": maybe(count())})),
    },
    {"selection": text()},
)

_KERNEL = {"tokens": count(), "batch": count(), "query_heads": count(1), "kv_heads": count(1)}

GPU_KERNEL = fields(
    {
        "benchmark": one_of("gpu_kernel"),
        "settings": fields({}),
        "machine": MACHINE,
        "device": fields({"name": maybe(WORD)}),
    }
    | {name: items(fields(_KERNEL, _TOLD | {"times": table(fields({}))})) for name in ("dense", "scattered", "score")}
)
