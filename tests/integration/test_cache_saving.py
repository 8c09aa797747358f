"""A ScoutCache cannot be pickled: this is said before anything is written, with the way. Copies go on as before."""

import copy
import io
import json
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import scout_hf
from scout_hf import ScoutCache
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import LOSSY, ONE_TIER, TWO_TIERS, assert_close, assert_equal, llama, prompt, run


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def cache(model):
    with scout_hf.patch(model, **TWO_TIERS):
        return run(model, prompt())[CACHE]


SAVE = {
    "pickle": pickle.dumps,
    "pickle, oldest protocol": lambda held: pickle.dumps(held, protocol=0),
    "torch.save": lambda held: torch.save(held, io.BytesIO()),
    "to another process": ForkingPickler.dumps,
}
HELD = {
    "cache": lambda cache: cache,
    "layer": lambda cache: cache.layers[0],
    "inside an output": lambda cache: {"sequences": [1, 2], CACHE: (cache,)},
}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
def test_saving_says_what_to_do(cache, save, held):
    with pytest.raises(scout_hf.SavingError, match=r"to_dynamic\(\).*fork\(\)"):
        save(held(cache))
    assert cache.get_seq_length() == 59


def test_an_empty_cache_is_refused_too(model):
    """Else a program would find out with the first prompt."""
    with pytest.raises(scout_hf.SavingError):
        pickle.dumps(ScoutCache(model.config))


def test_whoever_expects_pickles_own_error_catches_it(cache):
    with pytest.raises(TypeError):
        pickle.dumps(cache)


def test_nothing_is_written(cache, tmp_path):
    path = tmp_path / "cache.pkl"
    with path.open("wb") as file, pytest.raises(scout_hf.SavingError):
        pickle.dump(cache, file)
    assert path.stat().st_size == 0


def test_the_way_that_the_error_names(model, cache, tmp_path):
    torch.save(cache.to_dynamic(), tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert loaded.get_seq_length() == 59
    stock = run(model, prompt())
    more = torch.cat([stock.sequences, prompt(1, 7, seed=3)], dim=1)
    assert_close(run(model, more, **{CACHE: loaded}), run(model, more, **{CACHE: stock[CACHE]}), 1e-5)


@pytest.mark.parametrize("settings", [ONE_TIER, TWO_TIERS, LOSSY], ids=["one tier", "two tiers", "lossy"])
def test_deepcopy_is_a_fork(model, settings):
    more = prompt(1, 20, seed=4)
    with scout_hf.patch(model, **settings):
        cache = run(model, prompt())[CACHE]
        ids = torch.cat([prompt(1, 59), more], dim=1)
        twins = [copy.deepcopy(cache), cache.fork()]
        assert all(twin.layers[1].device == cache.layers[1].device for twin in twins)
        runs = [run(model, ids, **{CACHE: held}) for held in (*twins, cache)]
    assert_equal(runs[0], runs[2])
    assert_equal(runs[1], runs[2])


def test_copy_shares_layers_as_it_does_for_a_dynamic_cache(model, cache):
    for held in (cache, cache.to_dynamic()):
        twin = copy.copy(held)
        assert type(twin) is type(held) and twin is not held and twin.layers is held.layers
        run(model, torch.cat([prompt(1, 59), prompt(1, 5, seed=2)], dim=1), new=2, **{CACHE: twin})
        assert held.get_seq_length() == twin.get_seq_length() > 59


def test_a_copied_layer_continues_by_itself_as_a_dynamic_one_does(cache):
    more = torch.randn(1, 2, 40, 8)
    for held in (cache.layers[1], cache.to_dynamic().layers[1]):
        twin = copy.copy(held)
        twin.update(more, more)
        assert (held.get_seq_length(), twin.get_seq_length()) == (59, 99)
        assert torch.equal(twin.keys[:, :, :59], held.keys)


@pytest.mark.parametrize("settings", [ONE_TIER, LOSSY | {"monitor": True}], ids=["one tier", "monitored"])
def test_statistics_are_plain_values(model, settings):
    with scout_hf.patch(model, **settings) as handle:
        run(model, prompt())
        stats = handle.stats()
    assert pickle.loads(pickle.dumps(stats)) == stats == copy.deepcopy(stats)
    told = json.loads(json.dumps(stats.to_dict()))
    assert told["steps"] == stats.steps == 9 and told["layers"][2]["layer"] == 2
    assert told["kv_bytes"] == stats.kv_bytes
    assert (told["fidelity"] is None) == (stats.fidelity is None)
