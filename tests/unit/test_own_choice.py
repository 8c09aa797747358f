"""The blocks and tokens that a model chose, as lists of pages and a mask of the tokens in them."""

import pytest
import torch

from scout_hf.selection.own_choice import ChoiceByMask, OwnChoice
from scout_hf.stores import PagedKV

TOKENS, HEADS = 22, 2


def store(page):
    made = PagedKV(2, HEADS, 8, page, torch.float32, "cpu")
    made.append(*torch.randn(2, 2, HEADS, TOKENS, 8))
    return made


def attended(kv, lists, mask):
    """The tokens of each row and KV head that a backend would attend to, in the order of the lists."""
    found = []
    for row, head in ((row, head) for row in range(kv.batch) for head in range(kv.heads)):
        used = lists.ids.shape[2] if lists.counts is None else int(lists.counts[row, head])
        blocks = lists.ids[row, head, :used].tolist()
        assert blocks == sorted(set(blocks))  # the block that is being filled comes last
        tokens = [block * kv.block_size + at for block in blocks for at in range(kv.block_size)]
        found.append([at for at in tokens if at < kv.length and (mask is None or bool(mask[row, at]))])
    return found


PADDING = torch.arange(TOKENS) >= torch.tensor([[0], [5]])


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_blocks(heads, padding):
    ids = torch.tensor([[[[3, 0, -1]], [[5, 4, 1]]], [[[-1, -1, -1]], [[2, -1, -1]]]])[:, :heads]
    kv = store(4)
    got = attended(kv, *OwnChoice(ids, 4).lists(kv, padding))
    for number, tokens in enumerate(got):
        row, head = divmod(number, HEADS)
        blocks = [block for block in ids[row, head if heads > 1 else 0, 0].tolist() if block >= 0]
        expected = [at for block in sorted(blocks) for at in range(4 * block, min(4 * block + 4, TOKENS))]
        assert tokens == [at for at in expected if padding is None or padding[row, at]]


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["indices", "mask"])
def test_tokens(kind, padding):
    """Several queries: the newest one's choice counts; neighbours in a page are left out."""
    ids = torch.tensor([[[[1, 2, 3, 4, 5], [21, 0, 9, 8, -1]]], [[[0, 0, 0, 0, 0], [4, 5, 17, 2, 3]]]])
    choice = OwnChoice(ids, 1)
    if kind == "mask":
        choice = ChoiceByMask(choice.tokens(0, 2, TOKENS))
    kv = store(4)
    lists, mask = choice.lists(kv, padding)
    for number, tokens in enumerate(attended(kv, lists, mask)):
        row = number // HEADS
        expected = sorted(at for at in ids[row, 0, 1].tolist() if at >= 0)
        assert tokens == [at for at in expected if padding is None or padding[row, at]]


def test_what_each_query_chose():
    choice = OwnChoice(torch.tensor([[[[0, -1], [2, 1], [1, -1]]]]), 3)
    seen = choice.tokens(1, 3, tokens=8)[0, 0].int().tolist()
    assert seen == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]]
