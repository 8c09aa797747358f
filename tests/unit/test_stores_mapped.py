"""Slots whose maps the device keeps: what the host knows of how many are in use, without asking."""

from __future__ import annotations

import random

import pytest
import torch

from scout_hf.stores.mapped_slots import MappedSlots
from scout_hf.stores.resident_slots import EMPTY

BATCH, HEADS, SLOTS, SIZE, DIM = 2, 2, 6, 4, 8


class World:
    """Slots, and what a device would do to them."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.slots = MappedSlots(BATCH, HEADS, SLOTS, SIZE, DIM, torch.float32, torch.device("cpu"))
        self.blocks = self.dice.randrange(1, 12)
        self.load()

    def put(self, row, head, slot, block):
        self.slots.ids[row, head, slot], self.slots.slot_of[row, head, block] = block, slot

    def lists(self):
        for row in range(BATCH):
            for head in range(HEADS):
                held = self.slots.ids[row, head].tolist()
                yield row, head, held, [slot for slot, block in enumerate(held) if block == EMPTY]

    def load(self):
        count = min(self.dice.randrange(SLOTS + 1), self.blocks, SLOTS)
        self.slots.clear(self.blocks)
        alike = self.dice.random() < 0.7
        for row, head, _, _ in self.lists():
            for slot in range(count if alike else self.dice.randrange(count + 1)):
                self.put(row, head, slot, slot)
        self.slots.loaded(count if alike else None)

    def adopt(self):
        self.slots.reserve(self.blocks + 1)
        self.slots.adopted(self.blocks)
        for row, head, _, empty in self.lists():
            if empty:
                self.put(row, head, empty[0], self.blocks)
        self.blocks += 1

    def recall(self):
        self.slots.recalled(self.blocks)
        for row, head, held, empty in self.lists():
            missing = [block for block in range(self.blocks) if block not in held]
            for slot, block in zip(empty, missing[: self.dice.randrange(3)]):
                self.put(row, head, slot, block)

    def crop(self):
        self.blocks = max(1, self.blocks - self.dice.randrange(3))
        self.slots.crop(self.blocks)

    def grow(self):
        if self.slots.filled == self.slots.slots < 9:
            self.slots.grow(self.slots.slots + 2)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_known_is_so(seed):
    world = World(seed)
    for _ in range(40):
        getattr(world, world.dice.choice(["adopt", "adopt", "recall", "crop", "grow", "load"]))()
        used = (world.slots.ids != EMPTY).sum(2)
        assert 0 <= world.slots.least <= int(used.min())
        if world.slots.filled is not None:
            assert (used == world.slots.filled).all()


def test_slots_that_have_become_full_are_known_to_be():
    """Of 64 slots 63 are chosen: the first check for a recall leaves open which lists have filled the last one."""
    slots = MappedSlots(1, 2, 4, SIZE, DIM, torch.float32, torch.device("cpu"))
    slots.clear(9)
    slots.loaded(3)
    for _ in range(3):
        slots.recalled(9)
        assert slots.filled is None and slots.least == 3
    slots.adopted(9)
    assert slots.filled == 4
    slots.recalled(10)
    assert slots.filled == 4
