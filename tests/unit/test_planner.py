"""The planner's arithmetic: bytes by hand, the split by brute force, and what more of anything must do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from typer.testing import CliRunner

from scout_hf import CACHE
from scout_hf.cli import app
from scout_hf.errors import ConfigError
from scout_hf.eval.bench.models import make_llama
from scout_hf.eval.caches import caches_of, fill
from scout_hf.eval.language import PACKAGED
from scout_hf.eval.markdown import between_marks
from scout_hf.eval.plan import measure
from scout_hf.kernels.cpu.library import load_library
from scout_hf.planner import (
    GIB,
    MACHINES,
    SHAPES,
    Load,
    Machine,
    ModelShape,
    break_even,
    largest_batch,
    longest_context,
    methods,
    plan,
)
from scout_hf.selection import make_digest
from tests.unit.naive import QUICK

LLAMA, QWEN, MHA = SHAPES["llama-3-8b"], SHAPES["qwen3-14b"], SHAPES["llama-2-7b"]
H100 = MACHINES["h100"]


def test_bytes_are_those_of_the_models():
    assert LLAMA.layers * LLAMA.kv_bytes == 131072
    assert QWEN.layers * QWEN.kv_bytes * 65536 == 10 * GIB
    assert LLAMA.weights == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert QWEN.weights == pytest.approx(2 * 14.77e9, rel=1e-3)
    assert SHAPES["llama-3.2-1b"].weights == pytest.approx(2 * 1.236e9, rel=1e-3)
    assert MHA.weights == pytest.approx(2 * 6.74e9, rel=1e-3)


def test_what_is_held_where():
    load = Load(65536, 8)
    full = 8 * 65536 * 131072
    stock, scout, dense, kvpr = (plan(name, LLAMA, H100, load) for name in ("stock", "scout", "dense", "kvpr"))
    assert stock.device_bytes == LLAMA.weights + full and stock.host_bytes == 0
    # Residents of the budget, and digests: two bits per channel of 128 and a byte, in 32 layers of 8 KV heads.
    digests = 8 * 65536 * (128 / 4 + 1) * 8 * 32
    assert scout.device_bytes == LLAMA.weights + 8 * 2048 * 131072 + digests and scout.host_bytes == full
    assert dense.device_bytes == LLAMA.weights + 2 * full / 32
    assert kvpr.host_bytes == full
    assert "no smaller" in kvpr.note and kvpr.parts["recomputed"] == 0
    kvpr, dense = (plan(name, MHA, H100, load) for name in ("kvpr", "dense"))
    assert kvpr.host_bytes == dense.host_bytes + 8 * 65536 * 4096 * 2 * 32 and kvpr.parts["recomputed"] > 0
    kvpr = plan("kvpr", MHA, replace(H100, link_gbps=1e5), load)
    assert "link is faster" in kvpr.note and kvpr.parts["recomputed"] == 0


@pytest.mark.parametrize("method", methods())
def test_a_machine_without_a_gpu_has_one_memory(method):
    held, there = plan(method, MHA, replace(H100, gpu=False), Load(65536, 8)), plan(method, MHA, H100, Load(65536, 8))
    assert held.host_bytes == 0
    # Scout has no residents beside there.
    assert max(there.device_bytes, there.host_bytes) <= held.device_bytes <= there.device_bytes + there.host_bytes


def test_kvpr_pays_without_gqa_alone():
    for load in (Load(4096, 1), Load(32768, 16)):
        assert plan("kvpr", MHA, H100, load).step_ms < plan("dense", MHA, H100, load).step_ms
        ours = plan("kvpr", LLAMA, H100, load).step_ms
        assert ours == pytest.approx(plan("dense", LLAMA, H100, load).step_ms, rel=0.01)


amount = st.floats(1.0, 1e4)
a_machine = st.builds(Machine, st.just("any"), *([amount] * 12), st.booleans())
a_load = st.builds(Load, st.integers(64, 1 << 20), st.integers(1, 64), st.sampled_from([256, 2048]))
RATES = ["weights_gbps", "attend_gbps", "score_gbps", "stock_gbps", "products_tflops", "link_gbps", "cpu_gbps"]
a_shape = st.sampled_from(list(SHAPES.values()))


@QUICK
@given(a_shape, a_machine, a_load, st.sampled_from(methods()), st.sampled_from(RATES))
def test_more_of_any_rate_is_never_slower(shape, machine, load, method, rate):
    better = replace(machine, **{rate: 2 * getattr(machine, rate)})
    # KVPR splits in whole tokens.
    assert plan(method, shape, better, load).step_ms <= plan(method, shape, machine, load).step_ms * 1.001


@QUICK
@given(a_shape, a_machine, a_load, st.sampled_from(methods()))
def test_more_context_is_never_faster_nor_smaller(shape, machine, load, method):
    more = replace(load, context=2 * load.context)
    before, after = (plan(method, shape, machine, one) for one in (load, more))
    assert after.step_ms >= before.step_ms * 0.999
    assert after.device_bytes >= before.device_bytes and after.host_bytes >= before.host_bytes
    assert all(value >= 0 for value in after.parts.values())


@QUICK
@given(a_shape, a_machine, st.sampled_from(methods()))
def test_the_largest_that_fits_fits_and_one_more_does_not(shape, machine, method):
    load = Load(8192, 1)
    batch = largest_batch(method, shape, machine, load)
    assert batch == 0 or plan(method, shape, machine, replace(load, batch=batch)).fits
    assert batch == 4096 or not plan(method, shape, machine, replace(load, batch=batch + 1)).fits
    context = longest_context(method, shape, machine, load, most=1 << 18)
    assert context == 1 << 18 or not plan(method, shape, machine, replace(load, context=context + 1)).fits


def test_break_even_is_where_it_says():
    load = Load(1, 8)
    start = break_even("scout", LLAMA, H100, load)
    for context, faster in ((start, True), (start // 2, False)):
        at = replace(load, context=context)
        ours, stock = (plan(name, LLAMA, H100, at).step_ms for name in ("scout", "stock"))
        assert (ours < stock) == faster
    assert break_even("dense", LLAMA, H100, load) is None


def test_the_order_of_the_paper():
    """Figure 8: scout over hgca over infinigen, all over what streams everything, at 32k."""
    load = Load(32768, 16)
    times = [plan(name, QWEN, MACHINES["a100-80"], load).step_ms for name in ("scout", "hgca", "infinigen", "dense")]
    assert times == sorted(times)


def test_configs_of_transformers():
    sizes = {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40}
    config = AutoConfig.for_model("qwen3", **sizes, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    assert replace(ModelShape.of(config), name="qwen3-14b") == QWEN
    gemma = AutoConfig.for_model("gemma2", num_hidden_layers=4)
    shape = ModelShape.of(gemma, "gemma")
    assert shape.windowed == 2 and shape.window == 4096 and shape.tied
    short, long = (plan("stock", shape, H100, Load(n)).device_bytes for n in (8192, 16384))
    assert long - short == 2 * 8192 * shape.kv_bytes
    opt = ModelShape.of(AutoConfig.for_model("opt"), "opt")
    assert opt.kv_heads == opt.heads
    with pytest.raises(ConfigError, match="mixture of experts"):
        ModelShape.of(AutoConfig.for_model("mixtral"))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        ModelShape.of({"hidden_size": 8})


def test_wrong_input_names_what_there_is(tmp_path):
    with pytest.raises(ConfigError, match="scout.*dense"):
        plan("scuot", LLAMA, H100, Load(1024))
    with pytest.raises(ConfigError, match="link_gbps=0"):
        replace(H100, link_gbps=0)
    path = tmp_path / "machine.json"
    H100.save(path, facts={"a": 1})
    assert Machine.load(path) == H100
    whole = json.loads(path.read_text())
    wrong = [{}, [], {"machine": []}, {"machine": whole["machine"] | {"colour": 1}}, whole | {"facts": {"a": "fast"}}]
    wrong += [
        {"machine": whole["machine"] | {"link_gbps": value}} for value in ("50", True, None, 0, -1, 1e300, float("nan"))
    ]
    for held in [json.dumps(one) for one in wrong] + ["", "[" * 200_000]:
        path.write_text(held)
        with pytest.raises(ConfigError, match="machine.json cannot be used.*--measure"):
            Machine.load(path)
    with pytest.raises(ConfigError, match="none.json is missing.*--measure"):
        Machine.load(tmp_path / "none.json")


def test_packaged_models_are_known_by_name():
    for name, packaged in PACKAGED.items():
        shape, about = SHAPES[name], packaged.about
        assert f"{shape.layers} layers" in about and f"{shape.heads} query" in about
        assert re.search(rf"{shape.kv_heads} KV heads? of {shape.head_dim}\b", about)
        assert shape.full == shape.layers or f"{shape.full} of them full" in about
        # Bytes of a file for each weight: 4 to 8 bits.
        assert 0.5 < packaged.megabytes * 1e6 / (shape.weights / 2) < 1.1, name


def test_help_names_what_there_is():
    text = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "400"}).output
    assert all(name in text for name in (*SHAPES, *MACHINES))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_key_value_heads": 7}, "32 query heads for 7"),
        ({"hidden_size": "4096"}, "hidden_size='4096'"),
        ({"intermediate_size": None}, "no intermediate_size or ffn_dim"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"num_kv_shared_layers": 10}, "shares KV between layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    ],
    ids=str,
)
def test_configs_that_no_plan_is_made_of(changes, told):
    config = AutoConfig.for_model("llama").to_dict() | changes
    with pytest.raises(ConfigError, match=told):
        ModelShape.of(config)


@pytest.mark.parametrize("head_dim", [64, 512], ids="heads of {}".format)
@pytest.mark.parametrize("isa", ["as built", "base", "no library"])
def test_scoring_is_measured_with_the_digest_that_decoding_uses(isa, head_dim, monkeypatch):
    if isa == "as built" and load_library() is None:
        pytest.skip("the native library was not built")
    if isa != "as built":
        library = SimpleNamespace(isa=isa) if isa == "base" else None
        monkeypatch.setattr("scout_hf.selection.auto.load_library", lambda: library)
    model = make_llama(num_hidden_layers=1, **measure.SMALL | {"head_dim": head_dim})
    with torch.no_grad(), caches_of(model, block_size=measure.BLOCK, budget=64) as caches:
        cache = fill(caches.new(), model.config, 70 * measure.BLOCK)
        model(torch.ones((1, 1), dtype=torch.long), **{CACHE: cache})
        decoding = cache.layers[0].method.selector
    measured, scored = [], []
    monkeypatch.setattr(measure, "make_digest", lambda name: measured.append(make_digest(name)) or measured[-1])
    monkeypatch.setattr(measure, "median_of", lambda call, repeat: scored.append(call()) or 1.0)
    rate = measure._scoring(torch.randn(1, 4, 1, head_dim), cache.layers[0].keys[:, :, :-1])
    assert [digest.name for digest in measured] == [decoding.digest.name] and scored[0] is not None
    assert rate == pytest.approx(decoding.table.codes().nbytes / 1e9)


def test_no_times_for_what_does_not_fit():
    from rich.console import Console

    from scout_hf.eval.plan.show import plan_tables

    console = Console(width=160, record=True)
    for part in plan_tables(LLAMA, H100, Load(131072, 32)):
        console.print(part)
    rows = {line.split()[0]: line.split() for line in console.export_text().splitlines() if line.split()}
    assert rows["stock"][3:7] == ["no", "-", "-", "-"] and float(rows["scout"][4]) > 0


def test_the_command(tmp_path):
    def call(*words):
        return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "160"})

    done = call("--model", "qwen3-14b", "--gpu", "h200", "--link", "55", "--dram", "200", "--context", "131072")
    assert done.exit_code == 0 and "CPU 200 GB/s" in done.output and "infinigen" in done.output
    assert done.output.startswith("An estimate by arithmetic") and "nothing here was measured on a GPU" in done.output
    assert call("--model", "smollm2-135m").exit_code == 0
    (tmp_path / "config.json").write_text(json.dumps(AutoConfig.for_model("llama").to_dict()))
    assert call("--model", str(tmp_path)).exit_code == 0
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "half.json").write_text('{"a": ')
    for words, told in (
        (["--gpu", "h999"], "rtx-4090"),
        (["--model", "no-such"], "llama-3-8b"),
        (["--model", str(tmp_path / "list.json")], "list.json"),
        (["--model", str(tmp_path / "half.json")], "half.json"),
        (["--check", str(tmp_path / "config.json")], "--measure"),
        (["--check", str(tmp_path / "none.json")], "none.json"),
        (["--machine", str(tmp_path / "none.json")], "none.json"),
        (["--link", "0"], "--link"),
        (["--dram", "inf"], "--dram"),
        (["--block-size", "7"], "block_size=7"),
        (["--budget", "1"], "budget=1"),
    ):
        wrong = call(*words)
        assert wrong.exit_code == 2 and told in wrong.output


def test_a_rank_holds_its_part():
    rank = LLAMA.shard(8)
    assert rank.kv_bytes * 8 == LLAMA.kv_bytes and rank.head_dim == LLAMA.head_dim and rank.hidden == LLAMA.hidden
    assert rank.weights * 8 == LLAMA.weights
    load = Load(1 << 20)
    whole, part = plan("scout", LLAMA, H100, load), plan("scout", rank, H100, load)
    assert part.host_bytes * 8 == whole.host_bytes and part.device_bytes * 8 == whole.device_bytes
    for ranks in (0, 3, 16):
        with pytest.raises(ConfigError, match="divisor"):
            LLAMA.shard(ranks)


def test_a_cpu_scores_coarsely_first():
    from scout_hf.planner import cost
    from scout_hf.selection import coarse

    assert (cost.FINE, cost.WORTH) == (coarse.FINE, coarse.WORTH)
    cpu, turn = replace(H100, gpu=False), 12 * 2048
    parts = [plan("scout", LLAMA, cpu, Load(tokens)).parts["selection"] for tokens in (turn - 32, turn, 10 * turn)]
    # Of 33 bytes per token 17, and all of half of the blocks.
    assert parts[1] == pytest.approx(parts[0] * (17 / 33 + 1 / 2), rel=0.01)
    assert parts[2] - parts[1] == pytest.approx(parts[0] * 9 * 17 / 33, rel=0.01)
    wide = replace(LLAMA, head_dim=512)  # one bit per channel
    one = [plan("scout", wide, cpu, Load(tokens)).parts["selection"] for tokens in (turn, 10 * turn)]
    assert one[1] == pytest.approx(10 * one[0])


def test_the_page_of_limits_is_what_the_planner_says(tmp_path):
    from scout_hf.eval.plan import limits

    page = Path(__file__).parents[2] / "docs" / "limits.md"
    for command, text in limits.made().items():
        assert between_marks(page.read_text(encoding="utf-8"), command)[1] == f"\n{text}\n"
    # By hand: 10M tokens of 128 KiB, digests of 33 bytes per KV head and layer, two chunks' worth of the past.
    assert "| one H100, 2 TiB | llama-3-8b | 10M | 1221 | 78.7 |" in page.read_text(encoding="utf-8")
    arithmetic, link = limits.prefill_seconds(LLAMA, limits.GPU, 1, 2 * limits.CHUNK)
    assert link == pytest.approx(2 * limits.CHUNK * 131072 / 50e9)
    assert arithmetic == pytest.approx(
        (2 * 218103808 * 32 * 16384 + 32 * 4 * 4096 * 16384**2 / 2) / (0.6 * 989e12), rel=1e-6
    )
