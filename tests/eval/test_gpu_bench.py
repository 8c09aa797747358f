"""The GPU benchmarks at toy sizes: on a CPU with the kernels in Triton's interpreter, on a GPU with all of them."""

import io
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache
from typer.testing import CliRunner

import scout_hf
from scout_hf.cli import app
from scout_hf.config import HAND_OVERS
from scout_hf.diagnostics import gpu_time
from scout_hf.errors import PinnedMemoryError
from scout_hf.eval import arms, caches
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import drift, gpu_decode, gpu_kernel, gpu_report, machine, models, report
from scout_hf.eval.bench.options import GpuDecode, GpuKernel
from scout_hf.kernels import find_kernels
from scout_hf.selection import Selector, digest
from tests.eval.figures import check_numbers
from tests.libraries import ISAS

GPU = torch.cuda.is_available()
POSITIVE = (".us", "median_ms", "gb_per_s", "tokens_per_s", ".n", "calls")
DEVICE = "cuda" if GPU else "cpu"
PLACE = torch.device("cuda", 0) if GPU else torch.device("cpu")
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
MODELS = {"llama-3-8b": TINY | {"model_type": "llama"}, "qwen3-14b": TINY | {"model_type": "qwen3"}}
SIZES = {"device": DEVICE, "context": (512,), "steps": 3, "budget": 128, "block_size": 16, "threads": 1}
ONE = {"model": ("llama-3-8b",), "batch": (1,)}
KERNEL_SIZES = {"head_dim": 16, "batch": (1,), "context": (32,), "block_size": (16,), "selected": 32}
KERNEL_SIZES |= {"cache_tokens": 64, "selected_batch": 1, "score_tokens": (64,), "score_batch": 1, "repeat": 1}


@pytest.fixture(scope="module", autouse=True)
def apart(tmp_path_factory):
    """Models of toy size, tiles kept elsewhere, and no digest left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_decode, "MODELS", MODELS)
        patch.setattr(devices, "COPY_BYTES", 1 << 24)
        patch.setattr(devices, "LINK_BYTES", 1 << 24)
        if not GPU:
            # Looking through all of this process for garbage after each cell takes longer than the cell.
            patch.setattr(devices, "release", lambda device: None)
        patch.setattr(digest._DIGESTS, "_classes", dict(digest._DIGESTS._classes))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        if sys.modules.get("scout_hf.kernels.triton") or find("triton"):
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


@pytest.fixture(scope="module")
def kernel_record(apart):
    pytest.importorskip("triton")
    return gpu_kernel.run(GpuKernel(DEVICE, ("2/1",), **KERNEL_SIZES))


@pytest.fixture(scope="module")
def decode_record(apart):
    return decode(batch=(2,), caps="24", **SIZES)


def decode(**options):
    return gpu_decode.run(GpuDecode(**options))


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nAnd more lines.")


# -- the kernel benchmark -------------------------------------------------------------------------------------------


def test_kernel_record_is_complete(kernel_record):
    json.dumps(kernel_record, allow_nan=False)
    check_numbers(kernel_record, POSITIVE)
    (row,), (far,), scores = kernel_record["dense"], kernel_record["scattered"], kernel_record["score"]
    assert row["kv_bytes"] == 2 * 32 * 16 * 2 and far["kv_bytes"] == 2 * 32 * 16 * 2
    for one in (row, far):
        assert {"plain", "prefetch lines"} <= set(one["tiles"]) <= set(one["times"])
        assert one["tiles"]["plain"]["prefetch"] == 0 < one["tiles"]["prefetch lines"]["prefetch"]
        assert {"prefetch/plain", "prefetch lines/plain"} < set(one["ratios"])
        for name in one["tiles"]:
            assert one["times"][name]["difference"] < 0.02, name
            assert (one["times"][name]["share_of_copy"] is not None) == GPU
    assert row["times"]["sdpa"]["difference"] == 0 == far["times"]["gathered by torch"]["difference"]
    for name in ("flashinfer", "flash_attn"):
        assert find(name) or row["times"][name] == {"absent": "not installed"}
    assert [one["digest"] for one in scores] == ["minmax", "minmax-int8", "sign", "sign2"]
    for one in scores:
        assert set(one["times"]) == {"score", "choose", "score and choose"} and one["difference"] < 0.02
    assert scores[0]["digest_bytes"] == 4 * 2 * 16 * 2 and scores[1]["digest_bytes"] == 4 * 2 * 16
    assert (kernel_record["device"]["copy"] is not None) == GPU


@pytest.fixture
def bench(apart):
    pytest.importorskip("triton")
    return gpu_kernel._Bench(PLACE, find_kernels("triton", PLACE), 16, 3, 0, None)


def test_what_does_not_fit_is_a_result(bench, monkeypatch):
    cell = bench.guarded(lambda size: ({"tokens": size}, 0, out_of_memory), 7)
    assert cell == {"tokens": 7, "oom": "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB."}
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1 << 20)
    large = bench.guarded(bench.dense, 32, 8, 32, 128, 32768)
    assert large["skipped"].startswith("needs ") and large["batch"] == 128 and "times" not in large


def test_a_rival_that_fails_takes_nobody_with_it(bench, monkeypatch):
    def refuse(query, sets):
        raise TypeError("head_dim 16\nis not for me")

    monkeypatch.setattr(gpu_kernel, "RIVALS", {"sdpa": out_of_memory, "flashinfer": refuse})
    times = bench.guarded(bench.dense, 2, 1, 16, 1, 32)["times"]
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
    monkeypatch.setattr(bench, "_tiles", lambda query, keys, sets, attend: {"plain": ([lambda: query], gpu_tile())})
    times = bench.guarded(bench.dense, 2, 1, 16, 2, 32)["times"]
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
    found = gpu_kernel._Bench._tiles(asked, query, keys, ["part"], lambda part, tile: float(tile.stages))
    assert kept == [True] and list(found) == ["plain", "prefetch lines", "prefetch bulk"]
    for name, (calls, tile) in found.items():
        same = [other.stages for other in every if other.prefetch == found[name][1].prefetch]
        assert tile.stages == min(same) == calls[0]()


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
    assert devices.copy_rate(PLACE) is devices.link_rate(PLACE) is None


# -- the decode benchmark -------------------------------------------------------------------------------------------


def test_decode_record_is_complete(decode_record):
    json.dumps(decode_record, allow_nan=False)
    check_numbers(decode_record, POSITIVE)
    names = [arm for arm in arms.GPU_DECODE if arm != arms.COMPILED]
    assert {f"scout {way}" for way in HAND_OVERS if way != "auto"} < set(names)
    keys = [(one["model"], one["context"], one["batch"], one["arm"]) for one in decode_record["arms"]]
    assert keys == [(model, 512, 2, arm) for model in MODELS for arm in names]
    assert not [one for one in decode_record["arms"] if "failed" in one or "oom" in one]
    measured = {key: one for key, one in zip(keys, decode_record["arms"]) if "median_ms" in one}
    for (_, context, batch, arm), one in measured.items():
        assert one["n"] == len(one["ms"]) == 3 and one["tokens_per_s"] == pytest.approx(1e3 * batch / one["median_ms"])
        if not GPU:
            assert one["gpu_idle_share"] is one["gpu_wait_share"] is one["limit_ms"] is one["device_peak_bytes"] is None
        if arm.startswith("scout"):
            held = one["device_kv_bytes"] + one["host_kv_bytes"]
            assert one["host_kv_bytes"] >= (context - 64) * batch * 256 and held > context * batch * 256
            assert 0 <= one["cpu_ratio"] <= 1 and one["join_wait_ms"] >= 0 and one["attended_tokens"] < 256
            assert 0 < one["drift_measured"] < 0.5 and "Scout" in one["as"]
            assert (one["recalled_bytes_per_step"] == 0) == (arm == arms.IN_LAYER) or GPU
        elif arm == "stock":
            assert one["device_kv_bytes"] > context * batch * 256
    named = {arm for _, _, _, arm in measured}
    assert {"stock", "scout join", arms.IN_LAYER} <= named
    if not GPU:
        reasons = {one["arm"]: one["skipped"] for one in decode_record["arms"] if "skipped" in one}
        assert "CUDA" in reasons["stock offloaded"] and "Triton" in reasons["scout flags"]
        assert all("--device cuda" in one["skipped"] for one in decode_record["largest"])
    assert decode_record["models"]["qwen3-14b"]["whole"] and "synthetic: 10% of" in decode_record["selection"]
    assert all(one["times_faster_than"]["stock"] > 0 for one in decode_record["ratios"])


def test_a_cut_model_says_so(apart):
    shown = decode(**ONE, **SIZES, layers=1, arm=["stock"])
    assert shown["models"]["llama-3-8b"]["num_hidden_layers"] == 1 and not shown["models"]["llama-3-8b"]["whole"]
    assert "CUT to 1 layers" in printed(shown)


def test_a_run_continues_where_it_was(apart, tmp_path, monkeypatch):
    path, asked = tmp_path / "gpu_decode.json", []
    arms = ["stock", "scout join"]

    def measure(self, arm, context, batch):
        asked.append((arm, batch))
        return {"failed": "X: y"} if arm == "stock" and len(asked) == 1 else {"oom": "z"}

    monkeypatch.setattr(gpu_decode._Bench, "measure", measure)
    both = ONE | {"arm": arms, "out": tmp_path}
    decode(**both, **SIZES)
    assert asked == [("stock", 1), ("scout join", 1)] and len(json.loads(path.read_text())["arms"]) == 2
    # What failed is tried again, what ran out of memory is not, nor with more rows.
    again = decode(**(both | {"batch": (1, 2)}), **SIZES)
    assert asked[2:] == [("stock", 1)] and not list(tmp_path.glob("*.part"))
    found = {(one["arm"], one["batch"]): one for one in again["arms"]}
    assert found["stock", 1]["oom"] == "z" and found["scout join", 2]["skipped"] == "batch 1 ran out of memory"
    with pytest.raises(ValueError, match="budget=128.*--fresh"):
        decode(**both, **(SIZES | {"budget": 64}))
    fresh = decode(**both, **(SIZES | {"budget": 64}), fresh=True)
    assert len(asked) == 5 and len(fresh["arms"]) == 2


def test_figures_of_two_runs_are_not_compared():
    arms = [
        {"model": "m", "context": 1, "batch": 1, "arm": arm, "run": run, "median_ms": ms}
        for arm, run, ms in (("stock", "a", 4.0), ("stock offloaded", "b", 9.0), ("scout join", "b", 3.0))
    ]
    (row,) = gpu_decode._ratios(arms)
    assert row["times_faster_than"] == {"stock offloaded": 3.0}


ERRORS = (torch.OutOfMemoryError, PinnedMemoryError, RuntimeError)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_of_memory_is_told_apart(error):
    def fail():
        raise error("CUDA error: out of memory\nmore")

    assert devices.outcome(fail, PLACE) == {"oom": f"{error.__name__}: CUDA error: out of memory"}


@pytest.mark.parametrize("error", [ERRORS[0], *(pytest.param(one, marks=pytest.mark.full) for one in ERRORS[1:])])
def test_memory_that_runs_out_is_a_result(apart, monkeypatch, error):
    fill = gpu_decode.fill

    def short(cache, config, tokens, batch, *rest):
        fill(cache, config, tokens, batch, *rest)
        if batch > 1 and isinstance(cache, scout_hf.ScoutCache):
            raise error("CUDA error: out of memory\nmore")

    monkeypatch.setattr(gpu_decode, "fill", short)
    models = []
    make = gpu_decode.make_model
    monkeypatch.setattr(gpu_decode, "make_model", lambda *given: models.append(make(*given)) or models[-1])
    found = decode(**(ONE | {"batch": (1, 2, 4)}), **SIZES, arm=["scout join"])["arms"]
    assert "median_ms" in found[0] and found[2]["skipped"] == "batch 2 ran out of memory"
    assert found[1]["oom"] == f"{error.__name__}: CUDA error: out of memory"
    scout_hf.patch(models[0]).remove()  # it was given back


def test_a_model_without_room_is_a_result(apart, monkeypatch):
    monkeypatch.setattr(gpu_decode, "make_model", out_of_memory)
    record = decode(**ONE, **SIZES, arm=["stock"])
    assert "oom" in record["arms"][0] and "OutOfMemoryError" in printed(record)


def test_the_largest_batch_is_found_by_halving():
    tried = []

    def measure(batch):
        tried.append(batch)
        return {"median_ms": batch * 1.0} if batch <= 32 else {"oom": "no"}

    found = gpu_decode.largest_power(measure, 256)
    assert found == {"largest_batch": 32, "at_largest": {"median_ms": 32.0}, "stopped_by": {"oom": "no"}}
    assert len(tried) <= 4
    assert gpu_decode.largest_power(lambda batch: {"median_ms": 1.0}, 256)["largest_batch"] == 256
    assert gpu_decode.largest_power(lambda batch: {"oom": "no"}, 256)["largest_batch"] == 0


@pytest.mark.parametrize("share", [0.1, *(pytest.param(share, marks=pytest.mark.full) for share in (0.05, 0.15))])
def test_the_choice_drifts_as_asked_for(apart, share, monkeypatch):
    """By what the selector itself chooses, beside what the benchmark tells of it."""
    chosen = {}
    pick = Selector.pick

    def watched(self, *given, **named):
        found = pick(self, *given, **named)
        chosen.setdefault(id(self), []).append(found.ids)
        return found

    monkeypatch.setattr(Selector, "pick", watched)
    sizes = SIZES | {"context": (2048,), "budget": 512, "steps": 8}
    record = decode(**ONE, **sizes, arm=["scout join"], drift=share, gpu_kernels="torch")
    shares = []
    for steps in chosen.values():
        for old, new in zip(steps, steps[1:]):
            stays = (old[..., :, None] == new[..., None, :]).any(-1).float().mean()
            shares.append(1 - float(stays))
    assert 0.7 * share < sum(shares) / len(shares) < 1.3 * share
    assert 0.5 * share < record["arms"][0]["drift_measured"] < 1.5 * share  # three steps only


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


def test_caches_are_filled_in_parts(apart, monkeypatch):
    model = models.make_model(MODELS["llama-3-8b"], None, PLACE, 0)
    filled = []
    with scout_hf.patch(model, budget=64, block_size=16, split="auto" if GPU else "cpu") as handle, torch.no_grad():
        for cache in (handle.new_cache(), DynamicCache(config=model.config)):
            caches.fill(cache, model.config, 250, 3, device=PLACE, chunk=96)
            assert cache.get_seq_length() == 250
            filled.append(cache)
        for layer in range(2):
            keys, values = filled[0].layers[layer].method.read_all()
            assert torch.equal(keys, filled[1].layers[layer].keys) and torch.equal(
                values, filled[1].layers[layer].values
            )
    held = caches.held_bytes(filled[1], PLACE)
    assert held["device"] == 3 * 250 * 256 and held["host"] == 0


@pytest.mark.full
def test_a_hand_over_runs_through_the_kernels(apart, monkeypatch):
    """With the drifting digest coded and scored by Triton; the arm says which way it really went."""
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_decode, "WARM_UPS", 2)
    monkeypatch.setattr(gpu_decode, "WATCHED", 1)
    narrow = MODELS["llama-3-8b"] | {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(gpu_decode, "MODELS", {"llama-3-8b": narrow})
    cpus = min(2, len(machine.usable_cpus()))
    sizes = ONE | SIZES | {"context": (128,), "budget": 80, "threads": cpus, "gpu_kernels": "triton"}
    (one,) = decode(**sizes, arm=["scout flags" if cpus > 1 else "scout join"])["arms"]
    assert "failed" not in one and one["as"] in (
        "Scout (triton, Flags)" if ISAS and cpus > 1 else "Scout (triton, Join)"
    )
    assert one["median_ms"] > 0 and 0 <= one["cpu_ratio"] <= 1


def test_one_core_is_too_few_for_flags(apart):
    pytest.importorskip("triton")
    (one,) = decode(**(ONE | SIZES | {"gpu_kernels": "triton"}), arm=["scout flags"])["arms"]
    assert "--threads 2" in one["skipped"]


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


# -- commands, tables, plots ----------------------------------------------------------------------------------------


def printed(record):
    sink = io.StringIO()
    report.show(record, Console(file=sink, width=80))
    return sink.getvalue()


@pytest.mark.parametrize("name", ["kernel_record", "decode_record"])
def test_tables_fit_a_terminal_and_files_are_written(name, request, tmp_path):
    pytest.importorskip("matplotlib")
    record = request.getfixturevalue(name)
    text = printed(record)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text and torch.__version__ in text
    assert ("no GPU" in text) != GPU
    lines = report.save(record, tmp_path)
    assert json.loads((tmp_path / f"{record['benchmark']}.json").read_text()) == json.loads(json.dumps(record))
    assert (tmp_path / f"{record['benchmark']}.png").read_bytes().startswith(b"\x89PNG") and len(lines) == 2


def test_tables_and_plots_of_a_gpu(decode_record, request, tmp_path):
    """Figures that only a GPU gives, planted."""
    rate = {"gb_per_s": 4300.0}
    place = {"name": "NVIDIA H200", "copy": rate, "link": {"gb_per_s": 50.0}, "cuda": "13.0"}
    busy = {"gpu_idle_share": 0.4, "gpu_wait_share": 0.1, "limit_ms": 5.0}
    best = {"largest_batch": 16, "at_largest": {"median_ms": 30.0, "tokens_per_s": 533.3}, "stopped_by": {"oom": "x"}}
    record = decode_record | {
        "device": place,
        "arms": [one | busy if "median_ms" in one else one for one in decode_record["arms"]],
        "largest": [{"model": "llama-3-8b", "context": 65536, "cap_gib": 24.0, "arm": "scout join"} | best],
    }
    text = printed(record)
    for expected in ("NVIDIA H200", "4300 GB/s", "40%", "5.00", "largest batch", "533", "synthetic"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80
    if find("triton"):
        kernels = request.getfixturevalue("kernel_record")
        row = kernels["dense"][0]
        times = {name: one | {"share_of_copy": 0.87} for name, one in row["times"].items() if "us" in one}
        record = kernels | {"device": place, "dense": [row | {"times": times}, row | {"skipped": "needs 90 GiB"}]}
        assert "87%" in printed(record)
        report.save(record, tmp_path)
    assert gpu_report.best_of({"a": {"us": 2}, "b": {"us": 1}, "c": {"oom": ""}}, "a", "b", "c", "d") == {"us": 1}


def test_kernel_command(apart, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(gpu_kernel, "DIGESTS", ())
    monkeypatch.setattr(gpu_kernel._Bench, "scattered", lambda self, *cell: ({}, 0, dict))
    sizes = f"--device {DEVICE} --heads 2/1 --head-dim 16 --context 32 --batch 1 --block-size 16 --quick".split()
    monkeypatch.setattr(report, "show", lambda record: None)
    monkeypatch.setitem(report.PLOTS, "gpu_kernel", lambda record, figure: None)
    result = CliRunner().invoke(app, ["bench", "gpu-kernel", *sizes, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    used = json.loads((tmp_path / "gpu_kernel.json").read_text())["settings"]
    assert used["heads"] == [[2, 1]] and used["repeat"] == 5 and used["score_tokens"] == [65536]
    assert used["batches"] == [1] and used["block_sizes"] == [16]


def test_decode_command(apart, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    sizes = f"--device {DEVICE} --model llama-3-8b --context 512 --batch 1 --steps 3 --budget 128 --block-size 16"
    call = ["bench", "gpu-decode", *sizes.split(), "--threads", "1", "--arm", "scout join", "--out", str(tmp_path)]
    for times in (1, 2):
        result = CliRunner().invoke(app, call)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("making llama-3-8b") == (times == 1)
    saved = json.loads((tmp_path / "gpu_decode.json").read_text())
    assert saved["settings"]["drift"] == 0.1 and saved["arms"][0]["arm"] == "scout join"


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("kernel", "--heads 32", "try 32/8"),
        ("kernel", "--heads 5/2", "multiple"),
        ("kernel", "--context 100", "blocks of 32"),
        ("kernel", "--selected 131072", "65536"),
        ("kernel", "--head-dim 12", "--head-dim 12"),
        ("decode", "--model gpt-2", "llama-3-8b"),
        ("decode", "--arm best", "scout join"),
        ("decode", "--context 64", "4 blocks"),
        ("decode", "--caps 24,many", "24,40,80"),
        ("decode", "--digest none", "minmax"),
        ("decode", "--digest auto", "try minmax"),
        ("decode", "--drift 1.5", "--drift 1.5"),
        ("decode", "--cpu-query no", "predicted"),
        ("decode", "--device tpu", "try cuda"),
        ("decode", "--device cuda:99", "try"),
    ],
)
def test_wrong_settings_are_refused(apart, command, options, message):
    place = [] if "--device" in options else ["--device", DEVICE]
    result = CliRunner().invoke(app, ["bench", f"gpu-{command}", *place, *options.split()])
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_a_file_of_another_device_is_refused(apart, tmp_path):
    path = tmp_path / "gpu_decode.json"
    settings = {"drift": 0.1}
    file = gpu_decode._begin(path, False, settings, PLACE)
    file.add({"model": "m", "context": 1, "batch": 1, "arm": "stock"}, {}, "arms")
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"device": held["device"] | {"name": "another"}}))
    with pytest.raises(ValueError, match="figures with GPU='another'"):
        gpu_decode._begin(path, False, settings, PLACE)
    for broken in ("", "[" * 200_000, json.dumps(held | {"arms": [{"model": "m"}]}), json.dumps(held | {"models": 7})):
        path.write_text(broken)
        with pytest.raises(ValueError, match="gpu_decode.json cannot be used.*--fresh"):
            gpu_decode._begin(path, False, settings, PLACE)
        gpu_decode._begin(path, True, settings, PLACE)
