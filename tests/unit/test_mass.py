"""``mass``: as few blocks as hold a share of the attention, by the digest's estimate; torch and native code alike."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec

import pytest
import torch

import scout_hf
from scout_hf import ConfigError, ScoutConfig
from scout_hf.kernels.cpu import make_backend
from scout_hf.selection import MinMax, Selector, SignCode, check_digest, digest_for
from scout_hf.selection.digest import _DIGESTS
from scout_hf.selection.group_mass import keep_mass, mean_share, recent_mass
from scout_hf.selection.selector import MASS_FLOOR
from scout_hf.stores import PagedKV
from tests.libraries import ISAS, using_isa, without_library
from tests.unit.selecting import make_step
from tests.unit.worlds import stock_model

SIZE, DIM, TOKENS = 16, 64, 1615
OPEN = TOKENS // SIZE - 2  # candidates: the window of 32 tokens is attended anyway


def world(mass, padded, digest="sign2", loud=2.0, **options):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, TOKENS, DIM, generator=generator) * loud
    config = ScoutConfig(**{"digest": digest, "block_size": SIZE, "budget": 1.0, "mass": mass, "window": 32} | options)
    mask = None
    if padded:
        mask = torch.ones(2, TOKENS, dtype=torch.bool)
        mask[1, :777] = False
    store, selector = PagedKV(2, 2, DIM, SIZE, torch.float32, "cpu"), Selector(config, 0, keys)
    store.append(keys, keys)
    selector.observe(torch.randn(2, 4, 64, DIM, generator=generator), 2, DIM**-0.5, None)
    selector.extend_from(store, TOKENS // SIZE, mask)
    query = 2 * torch.randn(2, 4, 1, DIM, generator=generator)
    return store, selector, mask, query


def chosen(world_, backend):
    """Which candidates each row and KV head attends, (2, 2, OPEN) of bool, and the newest blocks, listed last."""
    store, selector, mask, query = world_
    lists = selector.lists(make_step(TOKENS, mask, make_backend(backend)), query, store, OPEN)
    found = torch.zeros(2, 2, store.blocks, dtype=torch.bool)
    for row in range(2):
        for head in range(2):
            count = None if lists.counts is None else int(lists.counts[row, head])
            used = lists.ids[row, head, :count].tolist()
            assert used[-3:] == [OPEN, OPEN + 1, OPEN + 2] and len(set(used)) == len(used)
            found[row, head, used] = True
    return found[:, :, :OPEN]


def estimated(world_):
    """Each candidate's share of the mass by the codes, newer tokens counted, in float64."""
    store, selector, mask, query = world_
    digest, grouped = selector.digest, query.double().view(2, 2, 2, DIM)
    masses = digest.score(query, selector.table.codes(OPEN)).double().view(2, 2, 2, OPEN) * math.log(2)
    if mask is not None:
        real = mask[:, : OPEN * SIZE].view(2, OPEN, SIZE).any(-1)
        masses = masses.masked_fill(~real[:, None, None], -torch.inf)
    keys = store.read(OPEN * SIZE, TOKENS)[0].double() - digest.mean.double()[:, :, None]
    newer = torch.einsum("bhgd,bhtd->bhgt", grouped, keys) * DIM**-0.5
    return torch.cat([masses, newer], -1).softmax(-1)[..., :OPEN].mean(2)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mass", [0.5, 0.9, 0.97])
def test_what_is_left_out_holds_no_more_than_the_rest_and_nothing_is_taken_in_vain(backend, padded, mass):
    here = world(mass, padded)
    found, shares = chosen(here, backend), estimated(here)
    floor = MASS_FLOOR // SIZE
    left = (shares * ~found).sum(-1)
    # Native masses are known to 10 %.
    assert bool((left <= 1.1 * (1 - mass)).all())
    least = shares.masked_fill(~found, torch.inf)
    least[:, :, 0] = torch.inf  # a sink
    more = found.sum(-1) > floor + 1
    assert bool((left + least.amin(-1) >= 0.9 * (1 - mass))[more].all())
    assert bool((found.sum(-1) >= floor).all())
    assert mass < 0.9 or bool(more.any())


@pytest.mark.skipif(not ISAS, reason="no native library")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("padded", [False, True])
def test_native_code_chooses_as_torch_does(isa, padded):
    for mass in (0.8, 0.95, 0.99):
        here = world(mass, padded)
        with using_isa(isa):
            native = chosen(here, "native")
        torch_ = chosen(here, "torch")
        assert bool(((native.sum(-1) - torch_.sum(-1)).abs() <= 3).all())
        assert (native ^ torch_).sum() <= 0.06 * torch_.sum()


def test_the_dial_is_monotone_and_the_budget_is_its_ceiling():
    counts = [chosen(world(mass, False), "native").sum(-1) for mass in (0.5, 0.8, 0.9, 0.95, 0.99)]
    assert all(bool((few <= many).all()) for few, many in zip(counts, counts[1:]))
    capped = chosen(world(0.99, False, budget=512), "native").sum(-1)
    assert bool((capped == 512 // SIZE - 2).all()) and bool((counts[-1] > 512 // SIZE).all())


def test_heads_that_look_at_few_blocks_take_the_floor():
    here = world(0.9, False, loud=20.0)
    assert bool((chosen(here, "native").sum(-1) == MASS_FLOOR // SIZE).all())


def test_newer_tokens_take_their_share():
    """A head that looks at the window needs little of the rest."""
    store, selector, mask, query = world(0.9, False, loud=1.0)
    aimed = store.read(TOKENS - 2, TOKENS - 1)[0].repeat_interleave(2, dim=1) * 4
    few, many = (chosen((store, selector, mask, each), "native").sum(-1) for each in (aimed, query))
    assert bool((few == MASS_FLOOR // SIZE).all()) and bool((many > 2 * few).all())


# -- sinks count in the floor and in the mass, everywhere alike -------------------------------------------------------

BIG, ALL = 64, 40  # tokens in a block, of which the floor is 4, and whole blocks
FLOOR = MASS_FLOOR // BIG


def one_head(padded, config):
    """One row and KV head, whose blocks have very different shares."""
    generator = torch.Generator().manual_seed(3)
    keys = 2.5 * torch.randn(1, 1, BIG * ALL + 15, DIM, generator=generator)
    mask = torch.arange(keys.shape[2])[None] >= BIG * 5 + 7 if padded else None
    store, selector = PagedKV(1, 1, DIM, BIG, torch.float32, "cpu"), Selector(config, 0, keys)
    store.append(keys, keys)
    selector.extend_from(store, ALL, mask)
    return store, selector, mask, 2 * torch.randn(1, 2, 1, DIM, generator=generator)


def shares_of(here, blocks):
    """Each candidate's share of the mass by the codes, newer tokens counted."""
    store, selector, mask, query = here
    masses = selector.digest.score(query, selector.table.codes(blocks)).double()[0] * math.log(2)
    if mask is not None:
        masses[:, :5] = -torch.inf
    newer = store.read(blocks * BIG, store.length)[0][0, 0].double() - selector.digest.mean.double()[0]
    newer = query[0, :, 0].double() @ newer.T * DIM**-0.5
    return torch.cat([masses, newer], -1).softmax(-1)[:, :blocks].mean(0).tolist()


def candidates_of(here, blocks, way):
    """Those of the first blocks that are attended: by torch, by native code, or by Triton's executor."""
    store, selector, mask, query = here
    step = make_step(store.length, mask, make_backend("native" if way == "native" else "torch"))
    if way == "triton":
        from tests.triton import reference

        ranked = selector.rank(step, query, blocks, lambda: store.read(blocks * BIG, store.length)[0])
        lists = torch.zeros(1, 1, blocks, dtype=torch.int32), *torch.zeros(2, 1, 1, dtype=torch.int32)
        out = reference.Choice(torch.zeros(1, 1, blocks, dtype=torch.uint8), *lists)
        absent = torch.full((1, 1, blocks), -1, dtype=torch.int32)
        sinks = selector.config.blocks(selector.config.sinks)
        reference.choose(*ranked[:2], sinks, ranked[2], absent, blocks, out=out)
        return set(out.is_chosen[0, 0].nonzero().flatten().tolist())
    ids, counts = selector.lists(step, query, store, blocks)
    return set(ids[0, 0, : None if counts is None else int(counts[0, 0])].tolist()) - set(range(blocks, ALL + 1))


@pytest.mark.parametrize("way", ["torch", "native", "triton"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sinks", [0, 4, 3 * BIG, 6 * BIG, 99 * BIG])
@pytest.mark.parametrize(("window", "budget"), [(0, 1.0), (32, 1.0), (300, 1.0), (32, 512), (300, 1024), (0, 128)])
def test_sinks_count_in_the_floor_and_in_the_mass_everywhere_alike(way, padded, sinks, window, budget):
    if (way == "native" and not ISAS) or (way == "triton" and not find_spec("triton")):
        pytest.skip("not installed")
    config = ScoutConfig(digest="sign2", block_size=BIG, budget=budget, mass=0.5, sinks=sinks, window=window)
    here, recent = one_head(padded, config), config.blocks(window)
    blocks, tokens = ALL - recent, int(here[2].sum()) if padded else here[0].length
    ceiling = max(1, config.blocks(tokens if budget == 1.0 else budget) - recent)
    real = range(5 * padded, blocks)
    leading, others = list(real[: config.blocks(sinks)]), list(real[config.blocks(sinks) :])
    shares = shares_of(here, blocks)
    others.sort(key=shares.__getitem__)
    left_out = torch.tensor([shares[block] for block in others]).cumsum(0).tolist()
    if not others:
        assert candidates_of(here, blocks, way) == set(leading[:ceiling])
    for gone in range(1, len(others)):
        if left_out[gone] < 1.3 * left_out[gone - 1]:
            continue  # native masses are known to 10 %
        # Between what the share of one block more or less would leave.
        here[1].config = dataclasses.replace(config, mass=1 - math.sqrt(left_out[gone] * left_out[gone - 1]))
        found = candidates_of(here, blocks, way)
        assert len(found) == min(ceiling, len(real), max(FLOOR, len(leading) + len(others) - gone))
        assert found <= set(real) and set(leading[:ceiling]) <= found
        rest = len(found) - len(leading[:ceiling])
        assert way == "native" or found == {*leading[:ceiling], *others[len(others) - rest :]}


@pytest.mark.parametrize("least", [0, 2])
def test_keep_mass(least):
    shares = torch.tensor([[[0.1, 0.4, 0.02, 0.3, 0.15, 0.03]]])
    kept = keep_mass(shares.log2(), 0.8, least, None)
    assert kept.isfinite()[0, 0].tolist() == [False, True, False, True, True, False]
    everything = keep_mass(shares.log2(), 0.1, least, None).isfinite()[0, 0].tolist()
    assert everything == [False, True, False, bool(least), False, False]
    padding_mask = torch.tensor([[True, False, True, True, True, True]])
    assert keep_mass(shares.log2(), 0.8, least, padding_mask)[0, 0, 1] == -torch.inf
    broken = shares.log2()
    broken[0, 0, 2] = torch.nan
    assert keep_mass(broken, 0.8, least, None)[0, 0, 2].isnan()


def test_shares_with_newer_tokens_are_those_of_one_softmax():
    masses, recent = torch.randn(2, 4, 9) * 30, torch.randn(2, 4) * 30
    got = mean_share(masses, 2, None, recent)
    both = torch.cat([masses, recent[..., None]], -1).double() * math.log(2)
    expected = both.softmax(-1)[..., :9].view(2, 2, 2, 9).mean(2)
    assert (got.double().exp2() - expected).abs().max() < 1e-6


def test_the_mass_of_newer_tokens_is_that_of_exact_attention():
    query, keys = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[True] * 5, [False] * 5])
    got = recent_mass(query, keys, mask, 0.3)
    exact = torch.einsum("bhgd,bhtd->bhgt", query.double().view(2, 2, 2, 8), keys.double()) * 0.3
    assert (got[0].double() * math.log(2) - exact[0].logsumexp(-1).flatten()).abs().max() < 1e-5
    assert bool((got[1] == -torch.inf).all())


@pytest.mark.parametrize("split", ["off", "cpu"])
def test_a_whole_generation_by_mass(split):
    model = stock_model()
    ids = torch.randint(0, 61, (1, 700), generator=torch.Generator().manual_seed(0))
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    found = {}
    for mass in (0.3, 0.999):
        options = {"budget": 1.0, "mass": mass, "block_size": 8, "window": 8, "split": split, "digest": "sign2"}
        if split == "cpu":
            options |= {"resident": 64, "cpu_query": "real"}
        with scout_hf.patch(model, **options) as handle:
            out = model.generate(ids, max_new_tokens=4, do_sample=False)
            found[mass] = handle.stats().attended_tokens
        assert out.shape == plain.shape
    assert MASS_FLOOR <= found[0.3] < found[0.999] <= 704


@pytest.mark.parametrize("digest", ["minmax", "minmax-int8", "minmax-sub", "keys-only"])
@pytest.mark.parametrize("split", ["off", "cpu"])
def test_a_digest_that_estimates_no_mass_is_refused_before_anything_is_patched(digest, split, monkeypatch):
    monkeypatch.setitem(_DIGESTS._classes, "keys-only", type("KeysOnly", (MinMax,), {"name": "keys-only"}))
    model, options = stock_model(), {"digest": digest, "mass": 0.9, "split": split}
    what = f"mass=0.9 is not possible with digest='{digest}', .*'sign', 'sign2'; try digest='auto'"
    with pytest.raises(ConfigError, match=what):
        scout_hf.patch(model, **options)
    with pytest.raises(ConfigError, match=what):
        scout_hf.ScoutCache(model.config, ScoutConfig(**options))
    with scout_hf.patch(model, digest=digest, split=split) as handle, pytest.raises(ConfigError, match=what):
        handle.new_cache(mass=0.9)


def test_a_digest_of_one_s_own_that_estimates_mass_is_taken(monkeypatch):
    monkeypatch.setitem(_DIGESTS._classes, "own", type("Own", (SignCode,), {"name": "own"}))
    scout_hf.patch(stock_model(), digest="own", mass=0.9).remove()


def test_auto_estimates_mass_also_where_no_code_is_fast():
    keys = torch.empty(1, 2, 0, 64)
    with without_library():
        assert digest_for(ScoutConfig(), keys) == "minmax" and digest_for(ScoutConfig(mass=0.9), keys) == "sign2"
    assert digest_for(ScoutConfig(mass=0.9), torch.empty(1, 2, 0, 296)) == "sign"


def test_head_sizes_that_no_digest_of_mass_encodes_are_refused():
    what = "mass=0.9 is not possible with this model's head_dim=60.*leave mass out"
    with pytest.raises(ConfigError, match=what):
        digest_for(ScoutConfig(mass=0.9), torch.empty(1, 2, 0, 60))
    with pytest.raises(ConfigError, match="digest='minmax', which estimates no"):
        digest_for(ScoutConfig(mass=0.9, digest="minmax"), torch.empty(1, 2, 0, 64))
    with pytest.raises(ConfigError, match=what):
        check_digest("auto", 60, 0.9)
    check_digest("auto", 60)
    check_digest("auto", None, 0.9)


def test_methods_that_take_no_mass_only_warn():
    with pytest.warns(UserWarning, match="mass=0.9 has no effect"):
        scout_hf.patch(stock_model(), method="dense", mass=0.9).remove()


def test_wrong_values_are_refused():
    for wrong in (0, 1, 1.0, 0.0, -0.5, "0.9", True):
        with pytest.raises(ConfigError, match="mass takes None, or a share of the attention mass"):
            ScoutConfig(mass=wrong)
    with pytest.raises(ConfigError, match="budget=1.0 for no limit"):
        ScoutConfig(mass=0.9, budget=None)
    assert ScoutConfig(budget=1.0).attends_all and not ScoutConfig(budget=1.0, mass=0.9).attends_all
