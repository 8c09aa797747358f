"""Which prompts are read together: those that begin alike, so that fewest tokens are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scout_hf.batch.prompts import Prompt

LEFT = 2
"""Tokens of a prompt that are not shared: a pass of one would be a decode step, which may be sparse."""


@dataclass(frozen=True)
class Group:
    """Prompts that begin with the same tokens; one worker takes all of them.

    Attributes
    ----------
    prompts : tuple of Prompt
        Sorted by their tokens.
    shared : int
        Tokens that all begin with, in whole blocks.
    """

    prompts: tuple[Prompt, ...]
    shared: int

    def cost(self, new_tokens: int) -> int:
        """Tokens that are read, and at most written."""
        return self.shared + sum(len(one.ids) - self.shared + new_tokens for one in self.prompts)


@dataclass
class _Node:
    """Neighbours of the sorted prompts that share ``common`` tokens, in groups that may share more."""

    common: int
    groups: list[Group] = field(default_factory=list)

    def best(self) -> list[Group]:
        """The groups, those of them as one that read less together than each by itself."""
        gains = {
            place: gain
            for place, group in enumerate(self.groups)
            if (gain := len(group.prompts) * self.common - (len(group.prompts) - 1) * group.shared) > 0
        }
        # What they share is read once.
        if sum(gains.values()) <= self.common:
            return self.groups
        apart = [group for place, group in enumerate(self.groups) if place not in gains]
        return [Group(tuple(one for place in gains for one in self.groups[place].prompts), self.common), *apart]


def grouped(prompts: Sequence[Prompt], block_size: int) -> list[Group]:
    """Prompts in groups that are read with fewest tokens, if each group is read by itself.

    Parameters
    ----------
    prompts : sequence of Prompt
    block_size : int
        What is shared is a multiple of it.

    Returns
    -------
    list of Group
        Prompts within a group are sorted by their tokens.

    Examples
    --------
    >>> import numpy as np
    >>> from scout_hf.batch.groups import Prompt, grouped
    >>> texts = [[1, 2, 3, 4, 5, 6, 8], [9, 9, 9], [1, 2, 3, 4, 5, 6, 7]]
    >>> made = grouped([Prompt(i, i, "", np.array(text, dtype=np.int32)) for i, text in enumerate(texts)], 2)
    >>> [([one.index for one in group.prompts], group.shared) for group in made]
    [([2, 0], 4), ([1], 0)]
    """
    ordered = sorted(prompts, key=lambda one: one.ids.astype(">u4").tobytes())
    # The intervals of equal beginnings, as in a suffix array: from the longest to the shortest.
    stack = [_Node(0)]
    for prompt, common in zip(ordered, [*_neighbours(ordered, block_size), 0]):
        part = [Group((prompt,), 0)]
        while stack[-1].common > common:
            stack[-1].groups += part
            part = stack.pop().best()
        if stack[-1].common < common:
            stack.append(_Node(common))
        stack[-1].groups += part
    return stack[0].groups


def _neighbours(ordered: Sequence[Prompt], block_size: int) -> Iterator[int]:
    for one, other in zip(ordered, ordered[1:]):
        tokens = min(len(one.ids), len(other.ids))
        unlike = np.flatnonzero(one.ids[:tokens] != other.ids[:tokens])
        yield _whole(min(int(unlike[0]) if len(unlike) else tokens, tokens - LEFT), block_size)


def _whole(tokens: int, block_size: int) -> int:
    return max(0, tokens) // block_size * block_size


def spread(groups: Sequence[Group], workers: int, new_tokens: int) -> list[Group]:
    """Groups for so many workers, the largest first; large ones are halved where there would be none for a worker."""
    made = sorted(groups, key=lambda group: -group.cost(new_tokens))
    while len(made) < workers:
        several = [group for group in made if len(group.prompts) > 1]
        if not several:
            break
        large, middle = several[0], len(several[0].prompts) // 2
        made.remove(large)
        made += [replace(large, prompts=large.prompts[:middle]), replace(large, prompts=large.prompts[middle:])]
        made.sort(key=lambda group: -group.cost(new_tokens))
    return made
