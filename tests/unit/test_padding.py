"""Padding remembered on the host: masks on a GPU are read once, and what is taken for granted is looked at later."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from scout_hf.errors import UnsupportedInputError
from scout_hf.padding import SPARE_TOKENS, Padding


@pytest.fixture
def far(monkeypatch):
    """Masks count as if they were on a GPU; each read is written down."""
    reads, real = [], torch.Tensor.cpu
    monkeypatch.setattr("scout_hf.padding._is_far", lambda mask: True)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda mask: reads.append(tuple(mask.shape)) or real(mask))
    return reads


def left(*padding, tokens):
    return (torch.arange(tokens) >= torch.tensor(padding)[:, None]).long()


def test_no_mask_and_masks_of_ones_are_no_padding():
    padding = Padding()
    assert padding.of(None, 2, 5) == (None, None) and padding.of(torch.ones(2, 5), 2, 5) == (None, None)


def test_a_mask_on_the_cpu_is_taken_as_it_comes():
    padding = Padding()
    for tokens in (7, 8, 8, 3):
        mask = left(0, 2, tokens=tokens)
        found, here = padding.of(mask, 2, tokens)
        assert found.dtype == torch.bool and torch.equal(found, mask.bool()) and here is found


def test_a_mask_on_a_gpu_is_read_once(far):
    padding = Padding()
    for tokens in range(20, 20 + 2 * SPARE_TOKENS):
        mask = left(0, 7, tokens=tokens)
        found, here = padding.of(mask, 2, tokens)
        assert torch.equal(found, mask.bool()) and torch.equal(here, mask.bool())
    assert far == [(2, 20)]


def test_rows_without_padding_stay_without(far):
    padding = Padding()
    assert all(padding.of(torch.ones(2, tokens), 2, tokens) == (None, None) for tokens in range(5, 30))
    assert far == [(2, 5)]


@pytest.mark.parametrize("change", ["an old token", "the new token"])
@pytest.mark.parametrize("before", [(0, 0), (0, 3)], ids=["no padding", "padding"])
def test_what_was_taken_for_granted_and_was_not_so_is_said(far, change, before):
    padding = Padding()
    for tokens in (10, 11):
        padding.of(left(*before, tokens=tokens), 2, tokens)
    mask = left(*before, tokens=12)
    mask[0, 5 if change == "an old token" else 11] = 0
    padding.of(mask, 2, 12)
    with pytest.raises(
        UnsupportedInputError, match="attention_mask of the last decode step .* Pass such a mask on the CPU"
    ):
        padding.of(left(*before, tokens=13), 2, 13)
    found, _ = padding.of(left(1, 2, tokens=13), 2, 13)  # begins again
    assert torch.equal(found, left(1, 2, tokens=13).bool())


@pytest.mark.parametrize("tokens", [10, 9, 12, 15])
def test_anything_but_one_more_token_is_read_again(far, tokens):
    padding = Padding()
    padding.of(left(0, 3, tokens=10), 2, 10)
    found, here = padding.of(left(2, 1, tokens=tokens), 2, tokens)
    assert torch.equal(found, left(2, 1, tokens=tokens).bool()) and torch.equal(here, found) and len(far) == 2


def test_other_rows_are_read_again(far):
    padding = Padding()
    padding.of(left(0, 3, tokens=10), 2, 10)
    padding.of(left(3, 0, 1, tokens=11), 3, 11)
    padding.forget()
    found, _ = padding.of(left(3, 0, 5, tokens=12), 3, 12)
    assert torch.equal(found, left(3, 0, 5, tokens=12).bool()) and len(far) == 3


def test_copies_begin_again(far):
    padding = Padding()
    padding.of(left(0, 3, tokens=10), 2, 10)
    for twin in (copy.deepcopy(padding), pickle.loads(pickle.dumps(padding))):
        found, _ = twin.of(left(3, 0, tokens=11), 2, 11)
        assert torch.equal(found, left(3, 0, tokens=11).bool())
