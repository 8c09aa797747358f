"""The kernels' interfaces with torch's operations on the CPU: fast enough for whole models on ``TritonExecutor``.

``tests/triton`` proves that the kernels do the same.
"""

from __future__ import annotations

import ctypes
import time
from types import SimpleNamespace

import torch

from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import attend
from scout_hf.kernels.triton.choose import Choice
from scout_hf.kernels.triton.recall import Moves, run_of_blocks
from scout_hf.methods.scout.handoff import Mailbox
from scout_hf.selection import pick
from scout_hf.stores.mapped_slots import MappedSlots
from tests.unit.naive import poison


def kv_splits_for(device, lists, listed, block_size):
    return 2 if listed > 1 else 1


def attend_blocks(
    query, keys, values, scale, softcap=None, *, ids=None, first=0, lengths=None, padding_mask=None, into
):
    batch, heads, listed, size, _ = keys.shape
    first = int(first)
    if ids is None:
        ids = torch.arange(first, first + listed).expand(batch, heads, listed)
    place = (ids[..., None] * size + torch.arange(size)).flatten(2)
    real = (ids >= 0).repeat_interleave(size, 2)
    if lengths is not None:
        real = real & (place < lengths[:, None, None])
    if padding_mask is not None:
        rows = torch.arange(batch)[:, None, None]
        real = real & padding_mask[rows, place.clamp(0, padding_mask.shape[1] - 1)]
    # What is not attended may be anything, also NaN.
    keys, values = (part.flatten(2, 3).masked_fill(~real[..., None], 0) for part in (keys, values))
    out, lse = into
    cuts = [round(part * listed / lse.shape[2]) * size for part in range(lse.shape[2] + 1)]
    for part, (low, high) in enumerate(zip(cuts, cuts[1:])):
        span = slice(low, high)
        found = attend(query, keys[:, :, span], values[:, :, span], scale, softcap, real[:, :, None, span])
        out[:, :, part], lse[:, :, part] = found.out[:, :, 0], found.lse[:, :, 0]
    return into


def merge(parts, logs, more=None, more_logs=None, sinks=None, dtype=torch.float32):
    empty = logs == -torch.inf
    parts = parts.masked_fill(empty[..., None], 0)
    given = [Partial(parts[:, :, [part]], logs[:, :, [part]]) for part in range(logs.shape[2])]
    if more is not None:
        given.append(Partial(more.masked_fill((more_logs == -torch.inf)[..., None], 0), more_logs.clone()))
    out, lse = fuse(given)
    return out.to(dtype), lse


def choose(scores, count, sinks, padding_mask, slots, most, open_count=None, out=None):
    blocks = scores.shape[2] if open_count is None else int(open_count)
    scores, padding_mask = scores[:, :, :blocks], padding_mask if padding_mask is None else padding_mask[:, :blocks]
    out.is_chosen.zero_()
    best = pick.choose(scores.clone(), count, sinks, padding_mask, fewer=True)
    valid = best.valid_or_all()
    wanted = torch.zeros(*scores.shape[:2], blocks + 1, dtype=torch.uint8)
    wanted.scatter_(2, torch.where(valid, best.ids, blocks), 1)
    out.is_chosen[:, :, :blocks] = wanted[:, :, :blocks]
    out.chosen_counts.copy_(valid.sum(2))
    for row in range(len(scores)):
        for head in range(scores.shape[1]):
            absent = [b for b in out.is_chosen[row, head, :blocks].nonzero().flatten() if slots[row, head, b] < 0]
            out.missing[row, head] = -7  # whoever reads on finds no block
            out.missing[row, head, : len(absent)] = torch.tensor(absent, dtype=torch.int32)
            out.missing_counts[row, head] = len(absent)
    return out


def plan_recall(ids, slot_of, choice, share=0.0, tally=None):
    moves = Moves(
        *torch.full((2, *choice.missing.shape), -7, dtype=torch.int32), torch.zeros_like(choice.missing_counts)
    )
    absent, chosen = int(choice.missing_counts.sum()), int(choice.chosen_counts.sum())
    if not absent or absent < float(share) * chosen:
        return moves
    for row in range(len(ids)):
        for head in range(ids.shape[1]):
            held = ids[row, head].tolist()
            empty = [slot for slot, block in enumerate(held) if block < 0]
            leaving = [slot for slot, block in enumerate(held) if block >= 0 and not choice.is_chosen[row, head, block]]
            missing = choice.missing[row, head, : int(choice.missing_counts[row, head])].tolist()
            for index, (slot, block) in enumerate(zip(empty + leaving, missing)):
                if held[slot] >= 0:
                    slot_of[row, head, held[slot]] = -1
                ids[row, head, slot], slot_of[row, head, block] = block, slot
                moves.slots[row, head, index], moves.blocks[row, head, index] = slot, block
                moves.counts[row, head] += 1
    if tally is not None:
        tally += moves.counts.sum()
    return moves


def copy_blocks(pages, moves, keys, values):
    batch, heads, _, size, dim = keys.shape
    half = size * dim * keys.element_size()
    for row in range(batch):
        for head in range(heads):
            for index in range(int(moves.counts[row, head])):
                source = int(pages[row, moves.blocks[row, head, index]]) + head * 2 * half
                slot = int(moves.slots[row, head, index])
                ctypes.memmove(keys[row, head, slot].data_ptr(), source, half)
                ctypes.memmove(values[row, head, slot].data_ptr(), source + half, half)


def adopt_block(first, new_keys, new_values, ids, slot_of, keys, values):
    for row in range(len(ids)):
        for head in range(ids.shape[1]):
            free = (ids[row, head] < 0).nonzero().flatten().tolist()
            if free:
                slot = free[0]
                ids[row, head, slot], slot_of[row, head, first] = first, slot
                keys[row, head, slot], values[row, head, slot] = new_keys[row, head], new_values[row, head]


def move_block(keys, values, blocks, pages, ids, slot_of, slot_keys, slot_values):
    size, block = slot_keys.shape[3], int(blocks)
    old = keys[:, :, :size].clone(), values[:, :, :size].clone()
    half = old[0][0, 0].nbytes
    for row in range(len(keys)):
        for head in range(keys.shape[1]):
            page = int(pages[row, block]) + head * 2 * half
            ctypes.memmove(page, old[0][row, head].data_ptr(), half)
            ctypes.memmove(page + half, old[1][row, head].data_ptr(), half)
    adopt_block(block, *old, ids, slot_of, slot_keys, slot_values)
    for part in (keys, values):
        part[:, :, :-size] = part[:, :, size:].clone()
        part[:, :, -size:] = torch.nan


def encode(digest, keys, padding_mask):
    known = digest.name in ("minmax", "minmax-int8", "minmax-sub", "sign", "sign2")
    return digest.encode(keys, padding_mask) if known else None


def append_token(new_keys, new_values, keys, values, length, blocks, block_size):
    place = int(length) - 1 - int(blocks) * block_size
    keys[:, :, place : place + 1], values[:, :, place : place + 1] = new_keys, new_values


def post(query, into, flag, number):
    into.copy_(query)
    number += 1
    flag.copy_(number)


def wait(word, number, late, turns=1 << 25):
    begin = time.perf_counter()
    while int(word) < int(number):
        if time.perf_counter() - begin > 300:
            late.copy_(number)
            return
        time.sleep(0)


def rms_norm(x, weight, eps, shifted=False):
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * (1.0 + weight.float())).to(x.dtype) if shifted else weight * scaled.to(x.dtype)


def rotate(query, keys, cos, sin):
    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    return turned(query), turned(keys)


def silu_product(gate, up):
    return torch.nn.functional.silu(gate) * up


KERNELS = SimpleNamespace(
    attend_blocks=attend_blocks, kv_splits_for=kv_splits_for, merge=merge, choose=choose, Choice=Choice,
    adopt_block=adopt_block, append_token=append_token, move_block=move_block,
    score=lambda *args, **options: None, encode=encode, plan_recall=plan_recall, copy_blocks=copy_blocks,
    run_of_blocks=run_of_blocks, post=post, wait=wait, INTERPRETED=True,
    rms_norm=rms_norm, rotate=rotate, silu_product=silu_product,
)  # fmt: skip


def install(monkeypatch):
    """Send everything on two tiers through ``TritonExecutor`` with these; what is used again begins as NaN."""
    monkeypatch.setattr("scout_hf.kernels.device._by_default", lambda device: True)
    monkeypatch.setattr("scout_hf.kernels.device._load", lambda: KERNELS)
    poison(monkeypatch)
    begin_as_nan(monkeypatch)


def begin_as_nan(monkeypatch):
    """Slots and mailboxes that nobody has written to hold NaN."""
    for kind, names in ((MappedSlots, ("keys", "values")), (Mailbox, ("query", "out", "lse"))):
        monkeypatch.setattr(kind, "__init__", _then_fill(kind.__init__, names))


def _then_fill(real, names):
    def init(self, *args, **options):
        real(self, *args, **options)
        for name in names:
            getattr(self, name).fill_(torch.nan)

    return init
