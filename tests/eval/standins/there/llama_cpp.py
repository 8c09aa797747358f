"""Stands in for llama-cpp-python: a file of JSON says what it predicts, and what goes wrong with it."""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

print("a library that prints as it likes")

LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
llama_token = ctypes.c_int32
llama_log_callback = ctypes.CFUNCTYPE(None)


def llama_log_set(callback, data):
    assert not callback


def llama_backend_init():
    pass


def llama_model_default_params():
    return SimpleNamespace(n_gpu_layers=99)


def llama_context_default_params():
    return SimpleNamespace(n_seq_max=1)


def llama_model_load_from_file(path, params):
    assert params.n_gpu_layers == 0
    plan = json.loads(Path(path.decode()).read_text())
    return None if plan.get("broken") else SimpleNamespace(plan=plan)


def llama_init_from_model(model, given):
    assert given.flash_attn_type == 1 and given.kv_unified
    print(f"llama_context: flash_attn    = {model.plan.get('flash', 'enabled')}", file=sys.stderr)
    given.type_k = model.plan.get("kv_type", given.type_k)
    return SimpleNamespace(plan=model.plan, rows=[{} for _ in range(given.n_seq_max)], most=given.n_ctx)


def llama_model_get_vocab(model):
    return model


def llama_vocab_n_tokens(model):
    return model.plan["vocabulary"]


def llama_get_memory(context):
    return context


def llama_batch_get_one(tokens, count):
    return list(tokens)[:count]


def llama_decode(context, ids):
    plan, row = context.plan, context.rows[0]
    for token in ids:
        row[max(row, default=-1) + 1 + plan.get("more", 0)] = token
    if len(row) >= plan.get("dies_at", 1 << 30):
        print("out of patience", file=sys.stderr, flush=True)
        os._exit(9)
    if len(row) >= plan.get("hangs_at", 1 << 30):
        time.sleep(600)
    return int(sum(map(len, context.rows)) > context.most)


def llama_get_logits_ith(context, place):
    wanted = context.plan["next"].get(" ".join(map(str, context.rows[0].values())), context.plan["else"])
    return [float(token == wanted) for token in range(context.plan["vocabulary"])]


def llama_memory_seq_pos_max(context, row):
    return max(context.rows[row], default=-1)


def llama_memory_seq_rm(context, row, first, last):
    assert last == -1
    context.rows[row] = {place: token for place, token in context.rows[row].items() if place < first}
    return True


def llama_memory_seq_add(context, row, first, last, more):
    assert (first, last) == (0, -1)
    context.rows[row] = {place + more: token for place, token in context.rows[row].items()}


def llama_memory_seq_cp(context, one, other, first, last):
    assert not context.rows[one].keys() & context.rows[other].keys(), "two tokens at one place"
    context.rows[other] |= context.rows[one]


def llama_state_seq_get_size(context, row):
    return 4 * len(context.rows[row])


def llama_state_seq_get_data(context, data, size, row):
    held = list(context.rows[row].values())
    ctypes.memmove(data, (ctypes.c_int32 * len(held))(*held), size)
    return size


def llama_state_seq_set_data(context, data, size, row):
    if context.plan.get("takes_nothing"):
        return 0
    context.rows[row] = dict(enumerate((ctypes.c_int32 * (size // 4)).from_buffer_copy(data)))
    return size
