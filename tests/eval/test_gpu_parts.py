"""The parts of ``bench gpu`` at toy sizes: on a CPU with the kernels in Triton's interpreter, on a GPU all of them."""

import functools
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf import CACHE
from scout_hf.diagnostics import gpu_time, usable_cpus
from scout_hf.errors import PinnedMemoryError
from scout_hf.eval import arms, caches
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import drift, gpu_cache, gpu_decode, gpu_full, gpu_kernel, gpu_smoke, models
from scout_hf.eval.bench.gpu_stages import Given
from scout_hf.kernels import find_kernels
from scout_hf.selection import Selector, digest, digest_for
from tests.eval.figures import check_numbers
from tests.libraries import ISAS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PLACE = torch.device("cuda", 0) if GPU else torch.device("cpu")
SPLIT = {"split": "auto" if GPU else "cpu"}
TINY = gpu_decode.TINY | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SETTINGS = {"device": DEVICE, "layers": 2, "budget": 2048, "digest": "auto", "drift": 0.1, "seed": 0}
KNOWN = {"smoke": {way: {"difference": 0.0} for way in ("join", "flags", "graph")}}


@pytest.fixture(scope="module", autouse=True)
def apart(tmp_path_factory):
    """Models of toy size, tiles kept elsewhere, and no digest left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_decode, "TINY", TINY)
        patch.setattr(gpu_decode, "MODELS", {"llama-3-8b": TINY})
        patch.setattr(gpu_decode, "STEPS", 3)
        if not GPU:
            # Looking through all of this process for garbage after each cell takes longer than the cell.
            patch.setattr(devices, "release", lambda device: None)
        patch.setattr(digest._DIGESTS, "_classes", dict(digest._DIGESTS._classes))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        if find("triton"):
            from scout_hf.kernels.triton import tuning

            tuning.forget()
            yield
            tuning.forget()
        else:
            yield


def find(name):
    try:
        return __import__(name)
    except ImportError:
        return None


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nAnd more lines.")


# -- kernels --------------------------------------------------------------------------------------------------------


DIGESTS = ("minmax", "minmax-int8", "sign", "sign2")


@pytest.fixture(scope="module")
def cells(apart):
    """One of each kind."""
    pytest.importorskip("triton")
    bench = gpu_kernel.Bench(PLACE, find_kernels("triton", PLACE), 16, 1, 0, None)
    made = {"dense": (2, 1, 16, 1, 32), "residents": (2, 1, 16, 1, 32), "scattered": (2, 1, 16, 1, 32, 64)}
    made |= {name: (2, 1, 16, 64, name, 1, 32) for name in DIGESTS}
    kinds = {name: getattr(bench, "score" if name in DIGESTS else name) for name in made}
    return {name: bench.guarded(lambda name=name: kinds[name](*made[name])) for name in made}


def test_kernels_are_timed_and_agree(cells):
    json.dumps(cells, allow_nan=False)
    check_numbers(cells, (".us", "median_ms", "gb_per_s", ".n", "calls"))
    row, far = cells["dense"], cells["scattered"]
    for one in (row, far, cells["residents"]):
        assert one["kv_bytes"] == 2 * 32 * 16 * 2
        assert {"plain", "prefetch lines"} <= set(one["tiles"]) <= set(one["times"])
        assert one["tiles"]["plain"]["prefetch"] == 0 < one["tiles"]["prefetch lines"]["prefetch"]
        for name in one["tiles"]:
            assert one["times"][name]["difference"] < 0.02, name
    assert row["times"]["sdpa"]["difference"] == 0 == far["times"]["gathered by torch"]["difference"]
    for name in ("flashinfer", "flash_attn"):
        assert find(name) or row["times"][name] == {"absent": "not installed"}
    for one in (cells[name] for name in DIGESTS):
        assert set(one["times"]) == {"score", "choose", "score and choose"} and one["difference"] < 0.02
    assert cells["minmax"]["digest_bytes"] == 4 * 2 * 16 * 2 and cells["minmax-int8"]["digest_bytes"] == 4 * 2 * 16


def test_the_stage_asks_for_shapes_of_a_real_model(apart):
    pytest.importorskip("triton")
    known = {"machine": {"copies on the GPU": {"gb_per_s": 4000.0}}}
    names = [job.name for job in gpu_kernel.jobs(Given(SETTINGS, 0.0, "", known, {}))]
    assert names[0] == "residents, 8 x 2k" and "2k of 8 x 64k, scattered" in names and len(names) == 8


@pytest.fixture
def bench(apart):
    pytest.importorskip("triton")
    return gpu_kernel.Bench(PLACE, find_kernels("triton", PLACE), 16, 3, 0, None)


def test_what_does_not_fit_is_a_result(bench, monkeypatch):
    cell = bench.guarded(lambda: ({"tokens": 7}, 0, out_of_memory))
    assert cell == {"tokens": 7, "oom": "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB."}
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1 << 20)
    large = bench.guarded(lambda: bench.dense(32, 8, 32, 128, 32768))
    assert large["skipped"].startswith("needs ") and large["batch"] == 128 and "times" not in large


def test_a_rival_that_fails_takes_nobody_with_it(bench, monkeypatch):
    def refuse(query, sets):
        raise TypeError("head_dim 16\nis not for me")

    monkeypatch.setattr(gpu_kernel, "RIVALS", {"sdpa": out_of_memory, "flashinfer": refuse})
    times = bench.guarded(lambda: bench.dense(2, 1, 16, 1, 32))["times"]
    assert set(times["sdpa"]) == {"oom"} and times["flashinfer"] == {"failed": "TypeError: head_dim 16"}
    assert times["plain"]["us"] > 0 and "difference" not in times["plain"]


@pytest.mark.skipif(GPU, reason="stands for libraries that are not there")
def test_other_libraries_are_called_as_their_documentation_has_it(bench, monkeypatch):
    """By stand-ins that do with torch what the libraries say they do."""
    attend = torch.nn.functional.scaled_dot_product_attention
    info, attn = ModuleType("flashinfer"), ModuleType("flash_attn")

    class Wrapper:
        def __init__(self, workspace, layout, use_tensor_cores):
            assert workspace.dtype == torch.uint8 and layout == "HND" and use_tensor_cores

        def plan(self, indptr, indices, last, heads, kv_heads, dim, page_size, q_data_type, kv_data_type):
            assert indptr.dtype == indices.dtype == last.dtype == torch.int32
            assert (heads, kv_heads, dim) == (2, 1, 16) and q_data_type == kv_data_type == torch.bfloat16
            self.pages = [indices[first:stop] for first, stop in zip(indptr, indptr[1:])]
            self.lengths = [(len(pages) - 1) * page_size + int(left) for pages, left in zip(self.pages, last)]

        def run(self, query, cache):
            rows = []
            for asked, pages, length in zip(query, self.pages, self.lengths):
                keys, values = (part[pages].transpose(0, 1).flatten(1, 2)[None, :, :length] for part in cache)
                rows.append(attend(asked[None, :, None], keys, values, enable_gqa=True)[0, :, 0])
            return torch.stack(rows)

    def with_kvcache(q, k_cache, v_cache, cache_seqlens):
        assert q.shape == (2, 1, 2, 16) and k_cache.shape == (2, 32, 1, 16) and cache_seqlens.tolist() == [32, 32]
        q, k, v = (part.transpose(1, 2) for part in (q, k_cache, v_cache))
        return attend(q, k, v, enable_gqa=True).transpose(1, 2).contiguous()

    info.BatchDecodeWithPagedKVCacheWrapper, attn.flash_attn_with_kvcache = Wrapper, with_kvcache
    monkeypatch.setitem(sys.modules, "flashinfer", info)
    monkeypatch.setitem(sys.modules, "flash_attn", attn)
    monkeypatch.setattr(bench, "_tiles", lambda query, *_, **__: {"plain": ([lambda: query], gpu_tile())})
    times = bench.guarded(lambda: bench.dense(2, 1, 16, 2, 32))["times"]
    assert times["flashinfer"]["difference"] < 0.01 and times["flash_attn"]["difference"] < 0.01


def gpu_tile():
    from scout_hf.kernels.triton.tuning import Tile

    return Tile()


def test_the_best_tile_of_every_kind_is_taken(bench, monkeypatch):
    from scout_hf.kernels.triton import tuning

    every = tuning.PLAIN + tuning.PREFETCHING
    monkeypatch.setattr(tuning, "candidates", lambda device: every)
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda call, **_: call())
    kept = []
    monkeypatch.setattr(tuning, "_save", lambda: kept.append(True))
    query, keys = torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 2, 16, 16)
    asked = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    for keep in (True, False):
        found = gpu_kernel.Bench._tiles(asked, query, keys, ["part"], lambda part, tile: float(tile.stages), keep)
    assert kept == [True] and list(found) == ["plain", "prefetch lines", "prefetch bulk"]
    for name, (calls, tile) in found.items():
        same = [other.stages for other in every if other.prefetch == found[name][1].prefetch]
        assert tile.stages == min(same) == calls[0]()


def test_only_the_call_that_decoding_makes_keeps_its_tile(bench, monkeypatch):
    asked, attend, tiles = [], bench.kernels.attend_blocks, bench._tiles

    def spy(query, keys, values, scale, **given):
        asked.append((keys.is_contiguous(), {name for name, value in given.items() if value is not None}))
        return attend(query, keys, values, scale, **given)

    kept = []
    monkeypatch.setattr(bench, "kernels", SimpleNamespace(attend_blocks=spy, merge=bench.kernels.merge))
    monkeypatch.setattr(bench, "_tiles", lambda *given, keep: kept.append(keep) or tiles(*given, keep=keep))
    for kind, sizes in (("residents", (32,)), ("dense", (32,)), ("scattered", (32, 64))):
        asked.clear()
        bench.guarded(functools.partial(getattr(bench, kind), 2, 1, 16, 1, *sizes))
        # Splits are not given: decoding takes as many as the kernel would.
        assert asked and (all(one == (True, {"ids", "tile"}) for one in asked) == (kind == "residents")), kind
    assert kept == [True, False, False]


def test_copies_take_turns_where_a_cache_would_hold_them(monkeypatch):
    assert devices.copies(1000, torch.device("cpu")) == 1
    monkeypatch.setattr(devices, "_cache_bytes", lambda device: 1200)
    assert [devices.copies(size, PLACE) for size in (1, 1000, 2400, 5000)] == [2400, 3, 1, 1]


@pytest.mark.skipif(GPU, reason="of the fallback")
def test_without_a_gpu_every_call_is_made_once():
    made = []
    bursts = {"a": devices.burst([lambda: made.append("a"), lambda: made.append("b")], PLACE)}
    assert made == ["a", "b"] and bursts["a"].calls == 2 and not bursts["a"].graphed
    timing = devices.time_bursts(bursts, 3)["a"]
    assert made == ["a", "b"] * 5 and len(timing.seconds) == 3
    assert devices.copy_rate(PLACE) is devices.link_rate(PLACE, to_host=True) is None


# -- decode steps ---------------------------------------------------------------------------------------------------


def decoding(rows=4, tokens=512, **given):
    """A toy whose budget is a quarter of its context."""
    made = gpu_decode.Bench(Given(SETTINGS, 0.0, "", **{"known": KNOWN, "tries": {}} | given), rows, tokens)
    made.tokens = tokens
    made.options |= {"budget": tokens // 4, "block_size": 16}
    return made


def toy_keys():
    return torch.zeros((1, 2, 1, 16), dtype=torch.bfloat16, device=PLACE)


def ran(made):
    return {job.name: job.run() for job in made.jobs()}


def test_arms_take_turns_on_one_cache(apart, monkeypatch):
    made, fills = decoding(), []
    fill = gpu_cache.fill_two_tiers
    monkeypatch.setattr(gpu_decode, "fill_two_tiers", lambda *given: fills.append(given) or fill(*given))
    found = ran(made)
    json.dumps(found, allow_nan=False)
    assert len(fills) == 1 and made.base.get_seq_length() == 512
    assert list(found)[:2] == ["model", "cache"] and set(arms.GPU) < set(found)
    assert found["cache"]["facts"] == [f"{digest_for(scout_hf.ScoutConfig(), toy_keys())} digest"]
    assert made.base.scout_layers[0].method.selector.digest.name == drift.drifting(
        found["cache"]["facts"][0].split()[0]
    )
    assert found["cache"]["host_kv_bytes"] >= (512 - 64) * 4 * 2 * 2 * 16 * 2 * 2
    measured = {name: one for name, one in found.items() if "median_ms" in one}
    assert {"join", "stock", "full KV, sdpa"} <= set(measured)
    for name, one in measured.items():
        assert one["n"] == 3 and one["batch"] == 4 and one["context"] == 512, name
        assert one["tokens_per_s"] == pytest.approx(4e3 / one["median_ms"]) and one["device_kv_bytes"] > 0
    assert 0 < measured["join"]["cpu_ratio"] < 1 and measured["join"]["attended_tokens"] < 256
    assert measured["join"]["recalled_bytes_per_step"] > 0 and "warnings" not in measured["join"]
    if not GPU:
        assert found["flags"] == found["full KV, triton"] == {"skipped": "needs a GPU"}
    scout_hf.patch(made.model).remove()  # it was given back


def test_an_arm_whose_hand_over_failed_is_left_out(apart):
    made = decoding(known={"smoke": {"join": {"failed": "it hangs"}}})
    assert made.scout(arms.GPU["join"])["skipped"] == "not run: smoke of join failed (failed: it hangs)"


@pytest.mark.parametrize("error", [PinnedMemoryError, torch.OutOfMemoryError])
def test_a_batch_that_memory_does_not_hold_is_halved(apart, monkeypatch, error):
    fill = gpu_cache.fill_two_tiers

    def short(cache, model, tokens, rows, seed):
        fill(cache, model, tokens, rows, seed)
        if rows > 2:
            raise error("cannot pin 1 GiB")

    monkeypatch.setattr(gpu_decode, "fill_two_tiers", short)
    made = decoding(rows=8, tokens=256)
    made.make_model()
    found = made.make_cache()
    assert found["batch"] == made.rows == 2 and made.base.scout_layers[0].method.batch == 2
    assert found["note"] == f"batch 2 instead of 8: {error.__name__}: cannot pin 1 GiB"
    assert made.stock(arms.STOCK["stock"])["batch"] == 2


def test_a_batch_is_halved_where_the_machine_is_too_small_or_ended_the_process(apart, monkeypatch):
    made = decoding(rows=8, tokens=256, tries={"cache": 1})
    made.make_model()
    need = 256 * caches.kv_bytes_per_token(made.model.config) / 2**30
    monkeypatch.setattr(gpu_decode, "memory_limit_gib", lambda: 3 * need)
    assert "GiB of host memory are needed" in made.make_cache()["note"] and made.rows == 2
    monkeypatch.setattr(gpu_decode, "memory_limit_gib", lambda: need / 4)
    with pytest.raises(MemoryError, match="may be used"):
        made.make_cache()


def test_the_choice_drifts_as_asked_for(apart, monkeypatch):
    """By what the selector itself chooses."""
    chosen = {}
    pick = Selector.pick

    def watched(self, *given, **named):
        found = pick(self, *given, **named)
        chosen.setdefault(id(self), []).append(found.ids)
        return found

    monkeypatch.setattr(Selector, "pick", watched)
    monkeypatch.setattr(gpu_decode, "STEPS", 8)
    made = decoding(rows=2, tokens=2048)
    made.options |= {"gpu_kernels": "torch"}
    made.make_model(), made.make_cache(), made.scout(arms.GPU["join"])
    shares = []
    for steps in chosen.values():
        for old, new in zip(steps, steps[1:]):
            stays = (old[..., :, None] == new[..., None, :]).any(-1).float().mean()
            shares.append(1 - float(stays))
    assert 0.07 < sum(shares) / len(shares) < 0.13


# -- one cache for all arms -----------------------------------------------------------------------------------------

IDS = torch.ones((3, 1), dtype=torch.int64, device=PLACE)


def toy():
    return models.make_model(TINY, None, PLACE, 0)


@torch.no_grad()
def logits(model, cache, steps=4):
    return torch.cat([model(input_ids=IDS, **{CACHE: cache}, use_cache=True).logits for _ in range(steps)], 1)


def test_a_cache_is_filled_as_by_its_own_means(apart, monkeypatch):
    monkeypatch.setattr(gpu_cache, "REPEATED_TOKENS", 96)
    model = toy()
    with scout_hf.patch(model, budget=64, block_size=16, **SPLIT) as handle:
        cache = handle.new_cache()
        gpu_cache.fill_two_tiers(cache, model, 250, 3)
        assert cache.get_seq_length() == 250
        expected = caches.random_kv(model.config, 96)
        for layer in cache.scout_layers:
            assert layer.method.kv.host.length == 250 // 16 * 16 - layer.method.window_blocks * 16
            for part, known in zip(layer.method.read_all(), expected):
                assert torch.equal(part, known.to(PLACE).repeat(1, 1, 3, 1)[:, :, :250].expand(3, -1, -1, -1))
        # All pages of a layer in one slab, with little to spare.
        assert all(len(pool.slabs) == 1 for layer in cache.scout_layers for pool in layer.method.pools())


def filled(model, **options):
    with scout_hf.patch(model, block_size=16, **SPLIT | options) as handle:
        cache = handle.new_cache()
        gpu_cache.fill_two_tiers(cache, model, 250, 3)
    return cache


SWITCHES = [{"cpu_query": "predicted"}, {"cpu_query": "real"}, {"layer_ahead": False, "recall": None}]


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_a_switched_cache_decodes_as_one_with_these_settings(apart, options):
    model = toy()
    base = filled(model, budget=64)
    with scout_hf.patch(model, budget=64, block_size=16, **SPLIT, **options):
        expected = logits(model, filled_here := filled_with(model, options))
        got = logits(model, switched := gpu_cache.switched(base, **options))
        assert torch.equal(got, expected) and switched.get_seq_length() == filled_here.get_seq_length() == 254
        # Every arm begins at the same tokens, and as if no other had run.
        assert base.get_seq_length() == 250 and all(one.method.resident is None for one in base.scout_layers)
        assert torch.equal(logits(model, gpu_cache.switched(base, **options)), expected)


def filled_with(model, options):
    cache = scout_hf.ScoutCache(model.config, budget=64, block_size=16, **SPLIT, **options)
    gpu_cache.fill_two_tiers(cache, model, 250, 3)
    return cache


@pytest.fixture
def like_a_gpu(monkeypatch):
    """What a GPU runs, on the CPU: the kernels' references, and graphs that refuse what a CUDA graph refuses."""
    if not ISAS or len(usable_cpus()) < 2:
        pytest.skip("flags take the native library and two cores")
    if GPU:
        yield []
        return
    pytest.importorskip("triton")
    from tests.integration import fake_graph
    from tests.triton import reference

    reference.install(monkeypatch)
    yield fake_graph.install(monkeypatch).made


def test_hand_overs_are_switched_on_one_cache(apart, like_a_gpu):
    """The same logits, each by its own way."""
    model, found = toy(), {}
    base = filled(model, budget=64)
    for way, kind in (("join", "Join"), ("flags", "Flags"), ("graph", "Flags"), ("join", "Join"), ("graph", "Flags")):
        options = {"hand_over": way, "cpu_query": "real"}
        with scout_hf.patch(model, budget=64, block_size=16, **SPLIT, **options):
            cache = gpu_cache.switched(base, **options)
            found.setdefault(way, []).append(logits(model, cache, 6))
            assert {type(one.method.executor.handoff).__name__ for one in cache.scout_layers} == {kind}
    assert torch.equal(*found["join"]) and torch.equal(*found["graph"])
    assert max((found["join"][0] - found[way][0]).abs().max() for way in ("flags", "graph")) < 1e-2
    assert GPU or [graph.replays for graph in like_a_gpu] == [3, 3]


def test_all_arms_are_measured_where_a_gpu_is(apart, like_a_gpu, monkeypatch):
    if not GPU:  # the reference does not make room for itself
        from scout_hf.kernels import triton as kernels

        monkeypatch.setattr(gpu_full, "find_kernels", lambda *given: kernels)
    made = decoding(rows=1, tokens=256)
    made.on_gpu = True
    found = ran(made)
    assert all(
        one.get("median_ms", 1) > 0 and not {"skipped", "failed", "warnings"} & set(one) for one in found.values()
    )
    ways = {name: "Join" if name == "join" else "Flags" for name in arms.GPU}
    assert {name: found[name]["facts"] for name in ways} == {
        name: [f"Scout (triton, {way})"] for name, way in ways.items()
    }
    assert all(0 < found[name]["cpu_ratio"] < 1 for name in ways)
    assert GPU or len(like_a_gpu) == 3 and all(graph.replays > 6 for graph in like_a_gpu)


@pytest.mark.parametrize("way", gpu_smoke.WAYS)
def test_the_smoke_test_passes_what_is_right(apart, like_a_gpu, way):
    found = gpu_smoke.decode(way, PLACE, 0, 512)
    assert found["difference"] < gpu_smoke.TOLERATED and found["facts"] == [
        f"Scout (triton, {'Join' if way == 'join' else 'Flags'})"
    ]
    assert GPU or len(like_a_gpu) == 2 * (way == "graph")


@pytest.mark.parametrize("planted", ["another way", "a wrong share", "not a number"])
def test_the_smoke_test_sees_what_is_wrong(apart, like_a_gpu, monkeypatch, planted):
    from scout_hf.methods.scout import executor_triton as module

    make, result = module.make_handoff, module.Flags.result
    values = {"a wrong share": lambda out: out * 2, "not a number": lambda out: out * float("nan")}
    if planted == "another way":
        monkeypatch.setattr(module, "make_handoff", lambda wanted, *given: make("join", *given))
    else:
        wrong = values[planted]
        monkeypatch.setattr(module.Flags, "result", lambda self, step: (wrong((got := result(self, step))[0]), got[1]))
    with pytest.raises((RuntimeError, ArithmeticError), match="it ran as .*Join|off; at most|are not finite"):
        gpu_smoke.decode("flags", PLACE, 0, 512)


@pytest.mark.parametrize("way", gpu_full.ATTENTIONS)
def test_full_attention_with_a_fast_kernel_is_that_of_stock(apart, way):
    if way == gpu_full.KERNEL:
        pytest.importorskip("triton")
    model = toy()
    stock = caches.fill(DynamicCache(config=model.config), model.config, 127, 3, device=PLACE)
    expected = logits(model, stock, 1)
    with gpu_full.attending(model, way):
        cache = gpu_full.full_cache(model, 128, 3, 0)
        for layer, other in zip(cache.layers, stock.layers):
            layer.keys[:, :, :127], layer.values[:, :, :127] = other.keys[:, :, :127], other.values[:, :, :127]
        step, why = gpu_full.full_step(model, cache, 3)
        assert why is None
        for _ in range(2):  # a step writes over the token of the one before
            assert (step()[:, -1:] - expected).abs().max() < 0.02 * expected.abs().max()
    assert model.config._attn_implementation == "sdpa"


# -- rates, errors and drift ----------------------------------------------------------------------------------------


ERRORS = (torch.OutOfMemoryError, PinnedMemoryError, RuntimeError)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_of_memory_is_told_apart(error):
    def fail():
        raise error("CUDA error: out of memory\nmore")

    assert devices.outcome(fail, PLACE) == {"oom": f"{error.__name__}: CUDA error: out of memory"}


@pytest.mark.parametrize("name", ["minmax", "minmax-int8", "sign", "sign2"])
def test_a_drifting_digest_costs_what_the_real_one_costs(apart, name, monkeypatch):
    made = digest.make_digest(drift.drifting(name))
    real = digest.make_digest(name)
    assert drift.drifting(name) == made.name and made.native is None and made.needs_fit == real.needs_fit
    keys, query = torch.randn(2, 2, 8, 16, 32), torch.randn(2, 4, 1, 32)
    for one in (made, real):
        one.fit(keys, None, None, 0.2)
    drift.settings_for(0.9, "torch")
    codes = made.encode(keys, None)
    assert torch.equal(codes, real.encode(keys, None))
    asked = []
    score = type(real).score
    monkeypatch.setattr(type(real), "score", lambda self, *given: asked.append(given) or score(self, *given))
    first = made.score(query, codes)
    assert len(asked) == 1 and first.std() > 1e5
    walk = made._walk[:, :, :8].clone()
    for _ in range(200):
        last = made.score(query, codes)
    assert 0.5 < float(last.std() / drift.SIZE) < 1.5 and not torch.equal(walk, made._walk[:, :, :8])
    # As contexts grow, the walk does not move in memory at once: a captured step holds it.
    place = made._walk.data_ptr()
    made.score(query, codes.repeat(1, 1, 4, 1))
    assert made._walk.data_ptr() == place
    drift.settings_for(1.0, "torch")
    still = made.score(query, codes)
    assert torch.allclose(still, made.score(query, codes))


def test_the_correlation_is_that_of_the_share():
    for share, chosen in ((0.05, 0.03), (0.15, 0.25)):
        correlation = drift.correlation_for(share, chosen)
        random = torch.Generator().manual_seed(0)
        one, noise = torch.randn((2, 200, 4000), generator=random)
        other = correlation * one + math.sqrt(1 - correlation**2) * noise
        count = int(4000 * chosen)
        old, new = (torch.zeros(200, 4000).scatter_(1, part.topk(count).indices, 1.0) for part in (one, other))
        assert 1 - float((old * new).sum() / old.sum()) == pytest.approx(share, rel=0.1)
    with pytest.raises(ValueError, match="--drift 0.9"):
        drift.correlation_for(0.9, 0.2)


def test_a_step_is_as_busy_as_its_kernels(tmp_path, monkeypatch):
    assert gpu_time.union([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4 and gpu_time.union([]) == 0
    assert gpu_time.busy_ms(lambda: None, 1, torch.device("cpu")) is None
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 1000, "dur": 2000},
        {"cat": "kernel", "name": "_wait", "ts": 2000, "dur": 4000},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 9000, "dur": 1000},
        {"ph": "M", "name": "process_name"},
    ]

    class Tracer:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def export_chrome_trace(self, path):
            with open(path, "w") as file:
                json.dump({"traceEvents": events}, file)

    monkeypatch.setattr(gpu_time, "profile", Tracer)
    steps = []
    busy = gpu_time.busy_ms(lambda: steps.append(1), 2, SimpleNamespace(type="cuda"))
    assert busy == {"busy": 1.0, "waiting": 1.5} and len(steps) == 2
