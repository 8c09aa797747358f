"""The tail's oldest block on its way to the host and into a slot, against the reference that whole models run with."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from scout_hf.kernels.triton.move_block import move_block  # noqa: E402
from scout_hf.stores import PagedKV  # noqa: E402
from tests.triton.grid import DEVICE, ON_GPU, draw, lists_of_blocks, slots_of  # noqa: E402

BATCH, HEADS, BLOCKS = 2, 3, 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size, dim, window, step", [(16, 24, 2, 4096), (8, 64, 0, 128), (32, 16, 1, 64)])
def test_a_block_moves_to_its_page_and_into_an_empty_slot(monkeypatch, size, dim, window, step, dtype):
    monkeypatch.setattr(sys.modules[move_block.__module__], "COPY_ELEMENTS", step)
    store = PagedKV(BATCH, HEADS, dim, size, dtype, "cpu", pinned=ON_GPU)
    old = draw(0, BATCH, HEADS, BLOCKS * size, dim, dtype=dtype).cpu()
    store.append(old, old)
    store.reserve(2)
    assert store.reserved == 2 and store.blocks == BLOCKS
    tail = draw(1, 2, BATCH, HEADS, (window + 2) * size, dim, dtype=dtype)
    ids = lists_of_blocks(2, BATCH, HEADS, BLOCKS, 4)
    ids[0, 0] = torch.tensor([0, 1, 2, 3])  # none is empty
    slot_of, slots = slots_of(ids, BLOCKS + 3), draw(3, 2, BATCH, HEADS, 4, size, dim, dtype=dtype)
    was, ids_were, slots_were = tail.clone(), ids.clone(), slots.clone()

    pages = store.table.addresses.to(DEVICE)
    move_block(*tail, torch.tensor([BLOCKS], dtype=torch.int32), pages, ids, slot_of, *slots)
    if ON_GPU:
        torch.cuda.synchronize()
    store.filled((BLOCKS + 1) * size)
    written = torch.stack(store.read(BLOCKS * size, (BLOCKS + 1) * size)).to(DEVICE)
    assert torch.equal(written, was[:, :, :, :size])
    assert torch.equal(store.read(0, BLOCKS * size)[0], old)
    assert torch.equal(tail[:, :, :, :-size], was[:, :, :, size:])
    assert torch.equal(slot_of, slots_of(ids, BLOCKS + 3))
    for row in range(BATCH):
        for head in range(HEADS):
            held, before = ids[row, head].tolist(), ids_were[row, head].tolist()
            empty = before.index(-1) if -1 in before else None
            for slot in range(4):
                new = slot == empty
                assert held[slot] == (BLOCKS if new else before[slot])
                expected = was[:, row, head, :size] if new else slots_were[:, row, head, slot]
                assert torch.equal(slots[:, row, head, slot], expected)
