"""Tensor parallel by transformers, on CPU processes: every rank does what one process does, with its own KV heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.ranks_process import EXACT, FAMILIES, MAIN, OTHER, PARTS, PREDICTED

ROOT = Path(__file__).parents[2]
QUICK = ("main ways", "by measured times", "sessions", "refusals")
SEVERAL = pytest.mark.parametrize("world", [2, 4])
ALL = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
CODED = ("coded", "coded, mass")


def processes(folder, worlds):
    """What every rank found, by world."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.integration.ranks_process", str(folder), json.dumps(worlds)]
    done = subprocess.run(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return {
        world: [torch.load(folder / f"found by {rank} of {world}") for rank in range(int(world))] for world in worlds
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By number of processes, what each rank found; the parts that take longest not on four."""
    worlds = {"1": tuple(PARTS), "2": tuple(PARTS), "4": QUICK}
    made = processes(tmp_path_factory.mktemp("ranks"), worlds)
    return {int(world): ranks for world, ranks in made.items()}


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    """The other parts on four."""
    made = processes(tmp_path_factory.mktemp("more"), {"4": tuple(name for name in PARTS if name not in QUICK)})
    return {4: made["4"]}


@pytest.fixture
def more(request, found, world):
    """As ``found``, for what four ranks do with --full alone."""
    return found if world == 2 else found | request.getfixturevalue("rest")


def same(made, wanted):
    assert torch.equal(made["tokens"], wanted["tokens"])
    # generate() gives logits in float32.
    assert (made["logits"] - wanted["logits"]).abs().max() <= 1e-6


def divided(made, wanted, world, *tiers):
    assert {tier: world * made["bytes"][tier] for tier in tiers or wanted["bytes"]} == {
        tier: wanted["bytes"][tier] for tier in tiers or wanted["bytes"]
    }


@SEVERAL
@pytest.mark.parametrize("way", [name for name in MAIN if name not in CODED])
def test_ranks_find_what_one_process_finds_and_hold_their_part(found, world, way):
    (alone,) = found[1]
    for rank in found[world]:
        same(rank[way], alone[way])
        divided(rank[way], alone[way], world)
        assert not rank[way]["notes"]


@SEVERAL
def test_exact_is_stock_and_sparse_is_not(found, world):
    (alone,) = found[1]
    for rank in found[world]:
        same(rank["stock"], alone["stock"])
        for way in ("exact", EXACT):
            same(rank[way], rank["stock"])
        for way in ("sparse", PREDICTED):
            assert (rank[way]["logits"] - rank["stock"]["logits"]).abs().max() > 0.01
        assert (rank["sparse"]["logits"] - rank[PREDICTED]["logits"]).abs().max() > 0.01


@ALL
@pytest.mark.parametrize("way", [*(name for name in OTHER if name not in CODED), "sparse, padded rows", "sampled"])
def test_other_methods_and_calls_do_too(more, world, way):
    (alone,) = more[1]
    for rank in more[world]:
        same(rank[way], alone[way])
        divided(rank[way], alone[way], world, "host")


@ALL
@pytest.mark.parametrize("way", CODED)
def test_with_sign_codes_a_block_in_a_hundred_may_be_another(found, more, world, way):
    (alone,), ranks = more[1], (found if way in MAIN else more)[world]
    for rank in ranks:
        divided(rank[way], alone[way], world)
        assert torch.equal(rank[way]["logits"], ranks[0][way]["logits"])
        away = (rank[way]["logits"] - alone[way]["logits"]).norm()
        assert away <= 0.2 * (alone[way]["logits"] - alone["stock"]["logits"]).norm()


@ALL
@pytest.mark.parametrize("family", FAMILIES)
def test_families(more, world, family):
    (alone,) = more[1]
    for rank in more[world]:
        same(rank[family, "stock"], alone[family, "stock"])
        same(rank[family, EXACT], alone[family, "stock"])
        made, wanted = rank[family, PREDICTED], alone[family, PREDICTED]
        if family == "phi3":
            # transformers gathers its projections: every rank has all heads, and predicts none.
            divided(made, wanted, 1)
            assert "qkv_proj is 'colwise_gather_output'" in made["notes"][0]
        elif family == "deepseek_v2":
            # From transformers 5.17 on all heads share latents: each rank has them, and chooses for its own heads.
            same(made, more[world][0][family, PREDICTED])
            assert made["bytes"]["host"] in (wanted["bytes"]["host"], wanted["bytes"]["host"] // world)
            assert not made["notes"]
        else:
            same(made, wanted)
            divided(made, wanted, world)
            assert not made["notes"]


@SEVERAL
def test_auto_turns_at_the_same_token_on_all_ranks_though_each_measures_other_times(found, world):
    (alone,) = found[1]
    for rank in found[world]:
        assert rank["auto"]["from"] == alone["auto"]["from"] is not None
        same(rank["auto"], alone["auto"])


@ALL
def test_drafts_are_the_same_on_all_ranks_though_each_measures_other_times(more, world):
    (alone,) = more[1]
    for rank in more[world]:
        same(rank["drafts"], alone["drafts"])
        assert rank["drafts"]["counts"] == more[world][0]["drafts"]["counts"]
        assert rank["drafts"]["counts"][2] > 0


@SEVERAL
def test_a_session_is_a_folder_of_parts(found, world):
    (alone,) = found[1]
    for number, rank in enumerate(found[world]):
        same(rank["session"], alone["session"])
        assert rank["folder"] == [f"rank-{one}-of-{world}" for one in range(world)]
        other = (number + 1) % world
        assert f"'rank {other} of {world}' there and 'rank {number} of {world}' here" in rank["of another rank"]
        assert "SessionError" in rank["of one process"] and "a session of one process" in rank["of one process"]
        assert "SavingError" in rank["over one process"]


@SEVERAL
def test_fingerprints_tell_ranks_and_weights_apart(found, world):
    ranks = [*found[1], *found[world]]
    assert all(again for _, again in (rank["fingerprint"] for rank in ranks))
    keys = [rank["fingerprint"][0] for rank in ranks] + [rank["changed"] for rank in ranks]
    assert len(set(keys)) == 2 * (world + 1)


@SEVERAL
def test_what_ranks_would_have_to_decide_together_is_refused(found, world):
    (alone,) = found[1]
    assert not any(alone[name] for name in ("store", "infinigen, refused", "graph", "infinigen in a pass"))
    for rank in found[world]:
        assert "ConfigError: store=" in rank["store"] and "beginnings of different lengths" in rank["store"]
        assert "ConfigError: hand_over='graph'" in rank["graph"]
        assert "on average" in rank["infinigen, refused"] and "on average" in rank["infinigen in a pass"]
        same(rank["after it"], alone["after it"])


def test_kv_heads_that_cannot_be_divided_are_refused_as_stock_fails(found):
    for rank in found[2]:
        assert rank["two heads, stock"] is rank["two heads"] is None
    for rank in found[4]:
        assert "is invalid for input of size" in rank["two heads, stock"]
        assert "UnsupportedModelError: the 2 KV heads of this model cannot be divided among 4" in rank["two heads"]
