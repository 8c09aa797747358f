"""Which prompts of a batch are read together, and how groups are spread over workers."""

import random

import numpy as np
import pytest

from scout_hf.batch.groups import grouped, spread
from scout_hf.batch.prompts import Prompt

BLOCK = 4


def prompts(*texts):
    return [Prompt(index, index, "", np.array(text, dtype=np.int32)) for index, text in enumerate(texts)]


def shapes(groups):
    return sorted((sorted(one.index for one in group.prompts), group.shared) for group in groups)


def text(tokens, seed):
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(tokens)]


def read(groups):
    """Tokens that are read if each group is read by itself."""
    return sum(group.cost(0) for group in groups)


def test_documents_are_groups_whatever_the_order_and_what_all_begin_with():
    system, documents = text(10, 1), [text(40, 10 + each) for each in range(3)]
    rows = [system + documents[place % 3] + text(5, 100 + place) for place in range(9)]
    assert shapes(grouped(prompts(*rows), BLOCK)) == [([0, 3, 6], 48), ([1, 4, 7], 48), ([2, 5, 8], 48)]


def test_questions_that_begin_alike_do_not_tear_a_document_apart():
    """Two of them share a block more: that is not worth a document read twice."""
    document, more = text(40, 1), text(BLOCK, 2)
    rows = [document + more + [1, 2, 3], document + more + [4, 5, 6], *(document + [900 + i, 1, 2] for i in range(4))]
    assert shapes(grouped(prompts(*rows), BLOCK)) == [([0, 1, 2, 3, 4, 5], 40)]


def test_a_document_in_a_document_is_one_of_its_own_if_that_reads_less():
    short, longer = text(8, 1), text(80, 2)
    rows = [*(short + longer + [i, 1, 2] for i in range(4)), *(short + [900 + i, 1, 2] for i in range(2))]
    assert shapes(grouped(prompts(*rows), BLOCK)) == [([0, 1, 2, 3], 88), ([4, 5], 8)]


@pytest.mark.parametrize("tokens, shared", [(3, 0), (5, 0), (6, 4), (9, 4), (10, 8)])
def test_two_tokens_of_equal_prompts_are_left(tokens, shared):
    assert [group.shared for group in grouped(prompts(*[text(tokens, 1)] * 3), BLOCK)] == [shared] * (
        1 if shared else 3
    )


def test_what_is_alone_shares_nothing():
    assert shapes(grouped(prompts(text(11, 1), text(11, 2)), BLOCK)) == [([0], 0), ([1], 0)]
    assert grouped([], BLOCK) == []


@pytest.mark.parametrize("seed", range(60))
def test_no_other_cut_of_the_sorted_prompts_reads_less(seed):
    """All cuts are tried."""
    draw = random.Random(seed)
    rows = [[draw.randrange(2) for _ in range(draw.randrange(3, 12))] for _ in range(8)]
    made = grouped(prompts(*rows), 1)
    assert sorted(one.index for group in made for one in group.prompts) == list(range(8))
    ordered = sorted(rows)

    def cost(part):
        if len(part) == 1:
            return len(part[0])
        common = next((i for i in range(12) if len({tuple(row[: i + 1]) for row in part}) > 1), 12)
        common = max(0, min(common, min(map(len, part)) - 2))
        return common + sum(len(row) - common for row in part)

    best = [0]
    for end in range(1, 9):
        best.append(min(best[start] + cost(ordered[start:end]) for start in range(end)))
    assert read(made) <= best[-1]


def test_the_sort_is_by_numbers_not_by_their_bytes():
    rows = [[256, 1, 1, 1, 5, 5, 5], [1, 1, 1, 1, 5, 5, 5], [256, 1, 1, 1, 6, 6, 6]]
    assert shapes(grouped(prompts(*rows), BLOCK)) == [([0, 2], 4), ([1], 0)]


def test_large_groups_go_first_and_are_halved_where_workers_would_have_none():
    rows = [*(text(40, 1) + [i, 1, 2, 3] for i in range(6)), *(text(8, 2) + [i, 1, 2, 3] for i in range(2))]
    groups = grouped(prompts(*rows), BLOCK)
    assert [len(group.prompts) for group in spread(groups, 2, 10)] == [6, 2]
    assert sorted(len(group.prompts) for group in spread(groups, 4, 10)) == [1, 2, 2, 3]
    assert {group.shared for group in spread(groups, 4, 10)} == {40, 8}
    many = spread(groups, 100, 10)
    assert [len(group.prompts) for group in many] == [1] * 8 and len({group.prompts[0].index for group in many}) == 8
