"""HGCA against its rules, written down once more with loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from scout_hf import ScoutConfig
from scout_hf.counters import Counters
from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu import make_backend
from scout_hf.kernels.cpu.workers import Workers
from scout_hf.methods.base import Scoring, make_method
from scout_hf.step import Step
from scout_hf.stores.staging import Staging
from scout_hf.stores.streams import Links

HEADS, GROUP, DIM, SIZE, SCALE = 2, 3, 8, 8, 0.4


class Rules:
    """What the paper's prototype does, per row and KV head, as sets of tokens."""

    def __init__(self, rows, alpha, threshold, least, window, most=None):
        self.rows, self.alpha, self.threshold, self.least = rows, alpha, threshold, least
        self.window, self.most, self.host = window, most, 0
        self.keys = torch.zeros(rows, HEADS, 0, DIM, dtype=torch.float64)
        self.values, self.padding_mask = self.keys.clone(), torch.zeros(rows, 0, dtype=torch.bool)
        self.weight = [[{} for _ in range(HEADS)] for _ in range(rows)]
        self.kept = [[{} for _ in range(HEADS)] for _ in range(rows)]

    def score(self, query, row, head, token):
        return float(query @ self.keys[row, head, token]) * SCALE

    def weights(self, query, row, head, tokens):
        """Softmax over these tokens, the largest of the group; query (GROUP, DIM)."""
        best = dict.fromkeys(tokens, 0.0)
        for each in query:
            real = [token for token in tokens if self.padding_mask[row, token]]
            scores = {token: math.exp(self.score(each, row, head, token)) for token in real}
            total = sum(scores.values())
            for token, score in scores.items():
                best[token] = max(best[token], score / total)
        return best

    def mean_weights(self, queries, row, head, tokens, first):
        """Means over queries (GROUP, n, DIM) from token ``first`` on, each seeing no later one; largest of group."""
        sums = torch.zeros(GROUP, self.padding_mask.shape[1], dtype=torch.float64)
        real = [n for n in range(queries.shape[1]) if self.padding_mask[row, first + n]]
        for n in real:
            for g in range(GROUP):
                seen = [token for token in tokens if token <= first + n]
                for token, weight in self.weights(queries[g : g + 1, n], row, head, seen).items():
                    sums[g, token] += weight
        means = (sums / max(1, len(real))).amax(0)
        return {token: float(means[token]) for token in tokens}

    def store(self, keys, values, padding_mask):
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.padding_mask = torch.cat([self.padding_mask, padding_mask], 1)

    def each(self):
        return [(row, head) for row in range(self.rows) for head in range(HEADS)]

    def average(self, row, head, new):
        old = self.weight[row][head]
        for token, weight in new.items():
            old[token] = self.alpha * weight + (1 - self.alpha) * old[token] if token in old else weight

    def keep(self, row, head, tokens, weight, weighed):
        order = sorted(tokens, key=lambda token: (-weight[token], token))
        for rank, token in enumerate(order):
            if self.padding_mask[row, token] and (weight[token] >= self.threshold / weighed or rank < self.least):
                self.kept[row][head][token] = weight[token]
        if self.most is not None:
            ranked = sorted(self.kept[row][head].items(), key=lambda item: (-item[1], item[0]))
            self.kept[row][head] = dict(ranked[: self.most])

    def several(self, queries, keys, values, padding_mask):
        """A prompt or the next turn."""
        first = self.padding_mask.shape[1]
        self.store(keys, values, padding_mask)
        total = self.padding_mask.shape[1]
        for row, head in self.each():
            chosen = queries[row, head * GROUP : (head + 1) * GROUP]
            self.average(row, head, self.mean_weights(chosen, row, head, range(self.host, total), first))
            if self.host:
                again = self.mean_weights(chosen, row, head, range(self.host), first)
                self.weight[row][head] |= again
                self.kept[row][head] = {}
                self.keep(row, head, range(self.host), again, self.host)
        self.settle()

    def one(self, query, keys, values):
        """A decode step; its attention (rows, HEADS * GROUP, DIM)."""
        self.store(keys, values, torch.ones(self.rows, 1, dtype=torch.bool))
        out = torch.zeros(self.rows, HEADS * GROUP, DIM, dtype=torch.float64)
        for row, head in self.each():
            window = range(self.host, self.padding_mask.shape[1])
            seen = [*self.kept[row][head], *(token for token in window if self.padding_mask[row, token])]
            for g in range(GROUP):
                each = query[row, head * GROUP + g, 0]
                scores = torch.tensor([self.score(each, row, head, token) for token in seen], dtype=torch.float64)
                out[row, head * GROUP + g] = scores.softmax(0) @ self.values[row, head, seen]
            self.average(row, head, self.weights(query[row, head * GROUP : (head + 1) * GROUP, 0], row, head, window))
        self.settle()
        return out

    def settle(self):
        total = self.padding_mask.shape[1]
        moved = (total - self.host) // SIZE * SIZE - self.window
        if moved > 0:
            for row, head in self.each():
                weighed = max(1, int(self.padding_mask[row, self.host :].sum()))
                tokens = range(self.host, self.host + moved)
                self.keep(row, head, tokens, self.weight[row][head], weighed)
            self.host += moved


class Driver:
    """The method, driven as the attention function drives it."""

    def __init__(self, backend, **options):
        self.config = ScoutConfig(method="hgca", block_size=SIZE, **options)
        self.backend, self.movers, self.links, self.counters = make_backend(backend), Workers(), Links(), Counters()
        self.staging, self.method, self.mask = Staging(), None, None

    def step(self, padding_mask):
        self.mask = padding_mask if self.mask is None else torch.cat([self.mask, padding_mask], 1)
        shared = (self.backend, self.movers, self.links, self.counters)
        padded = None if bool(self.mask.all()) else self.mask
        return Step(self, padding_mask.shape[1], self.mask.shape[1], padded, *shared, None, [])

    def several(self, queries, keys, values, padding_mask):
        step = self.step(padding_mask)
        if self.method is None:
            self.method = make_method(self.config, 0, keys)
            self.method.scoring = Scoring(SCALE, None)
        self.method.append(keys, values, step)
        self.method.observe(step, queries)
        self.method.settle(step)
        self.method.prefilled(step, queries[:, :, -1:])

    def one(self, query, keys, values):
        step = self.step(torch.ones(len(query), 1, dtype=torch.bool))
        self.method.append(keys, values, step)
        out = self.method.attend(step, query).out[:, :, 0]
        self.method.settle(step)
        return out


@pytest.fixture(params=["auto", "torch"])
def backend(request):
    return request.param


def tokens(count, rows, generator):
    sizes = ((rows, HEADS * GROUP, count, DIM), (rows, HEADS, count, DIM), (rows, HEADS, count, DIM))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def worst_difference(backend, padding, settings, budget=None):
    generator = torch.Generator().manual_seed(3)
    rows = len(padding)
    most = None if budget is None else budget - 16
    rules = Rules(rows, *settings.values(), window=16, most=most)
    driver = Driver(backend, resident=16, budget=budget, method_options=settings)
    worst, kept = 0.0, []
    for turn, (count, steps) in enumerate([(37, 20), (11, 13)]):
        padding_mask = torch.ones(rows, count, dtype=torch.bool)
        for row, pad in enumerate(padding if turn == 0 else [0] * rows):
            padding_mask[row, :pad] = False
        new = tokens(count, rows, generator)
        rules.several(*new, padding_mask)
        driver.several(*new, padding_mask)
        for _ in range(steps):
            new = tokens(1, rows, generator)
            worst = max(worst, (rules.one(*new) - driver.one(*new)).abs().max().item())
            kept.append(sum(len(rules.kept[row][head]) for row, head in rules.each()) / (rows * HEADS * rules.host))
    return worst, kept


@pytest.mark.parametrize("padding", [(0,), (0, 5, 20)], ids=["one row", "padded"])
@pytest.mark.parametrize("settings", [{"alpha": 0.5, "threshold": 1.2, "least": 2}, {"alpha": 0.9, "threshold": 0.9,
                         "least": 0}, {"alpha": 0.0, "threshold": 3.0, "least": 1}], ids=str)  # fmt: skip
def test_equals_its_rules(backend, padding, settings):
    worst, kept = worst_difference(backend, padding, settings)
    assert worst <= 1e-12
    assert min(kept) < 0.9 and max(kept) > 0.05  # or nothing was decided


def test_equals_its_rules_within_a_budget(backend):
    worst, kept = worst_difference(backend, (0, 5), {"alpha": 0.5, "threshold": 0.5, "least": 3}, budget=24)
    assert worst <= 1e-12 and max(kept) <= 8 / 16


def test_the_comparison_sees_one_token(monkeypatch):
    """A threshold that is off by a tenth changes which tokens are kept."""
    settings = {"alpha": 0.5, "threshold": 1.2, "least": 2}
    init = Rules.__init__

    def off(self, rows, alpha, threshold, *others, **named):
        init(self, rows, alpha, threshold * 1.1, *others, **named)

    monkeypatch.setattr(Rules, "__init__", off)
    assert worst_difference("auto", (0,), settings)[0] > 1e-3


@pytest.mark.parametrize(
    "wrong", [{"alpha": 2.0}, {"threshold": -1}, {"least": 1.5}, {"least": True}, {"alhpa": 0.5}], ids=str
)
def test_wrong_options_name_the_right_ones(wrong):
    from scout_hf import ScoutCache
    from tests.unit.worlds import stock_model

    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ScoutCache(stock_model().config, method="hgca", method_options=wrong)
