"""The benchmarks at tiny sizes: every number is there and makes sense, tables, plots and files are made."""

import io
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from scout_hf import ScoutConfig
from scout_hf.cli import app
from scout_hf.errors import ConfigError
from scout_hf.eval.bench import bandwidth, cpu_decode, cpu_kernel, machine, memory, models, readme, report, timing
from scout_hf.eval.bench.options import CpuDecode, CpuKernel
from scout_hf.eval.caches import fill
from scout_hf.eval.markdown import begin_mark, between_marks, end_mark
from scout_hf.eval.records import read_record
from scout_hf.kernels.cpu.library import load_library
from scout_hf.selection import digest_for
from tests.eval.figures import check_numbers

ROOT = Path(__file__).parents[2]
TINY = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
PAGES = {
    "methods": "docs/results/methods.md",
    "sessions": "docs/guides/sessions.md",
    "rivals": "docs/guides/rivals.md",
    "rivals_int8": "docs/guides/rivals.md",
    "drafts": "docs/guides/lossless.md",
}
RESULTS = ROOT / "eval" / "results"
MEASURED = [name for name in readme.COMMANDS if (RESULTS / f"{name}.json").is_file()]
POSITIVE = ("_ms", "gb_per_s", "bytes_per_token", ".n")
needs_library = pytest.mark.skipif(load_library() is None, reason="the native library was not built")


@pytest.fixture(scope="module")
def kernel_record():
    if load_library() is None:
        pytest.skip("the native library was not built")
    return cpu_kernel.run(CpuKernel([64, 256], 1024, (4, 2), 32, 16, repeat=3, dense=1))


@pytest.fixture(scope="module")
def decode_record():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "SPAN_BYTES", 1 << 24)
        # Here, and not in processes of their own, which take seconds to start.
        patch.setattr(memory, "in_fresh_process", memory.measure)
        return cpu_decode.run(CpuDecode([0, 256], 64, 16, 1, 3, 2, 2, prefill_tokens=64, memory_tokens=256), shape=TINY)


def printed(record):
    sink = io.StringIO()
    report.show(record, Console(file=sink, width=80))
    return sink.getvalue()


def test_kernel_record_is_complete(kernel_record):
    json.dumps(kernel_record, allow_nan=False)
    check_numbers(kernel_record, POSITIVE)
    assert [row["tokens"] for row in kernel_record["attend"]] == [64, 256]
    for row in kernel_record["attend"]:
        assert row["kv_bytes"] == row["tokens"] * 2 * 2 * 32 * 2
        assert row["kv_bytes"] / 2 < row["int8_bytes"] < row["kv_bytes"]
        for name in ("native", "read", "torch", "int8", "int8_read", "sequential"):
            assert row[name]["n"] == len(row[name]["ms"]) == 3
            assert row[name]["best_ms"] <= row[name]["q1_ms"] <= row[name]["median_ms"] <= row[name]["q3_ms"]
        assert {"read/native", "torch/native", "native/int8", "dense_folded/native"} < set(row["ratios"])
    assert kernel_record["select"]["blocks"] == 64 and kernel_record["select"]["chosen"] == 16
    assert {"native/read", "native_score/read", "torch/native"} == set(kernel_record["select"]["ratios"])
    assert kernel_record["select"]["digest_bytes"] == 64 * 2 * 2 * 32 * 2
    for name, planes in (("sign", 1), ("sign2", 2)):
        signs = kernel_record["select"][name]
        assert signs["digest_bytes"] == 64 * 2 * 16 * (4 * planes + 1)
        for call in ("native", "native_score", "read", "torch", "torch_score"):
            assert signs[call]["n"] == 3 and signs[call]["gb_per_s"] == pytest.approx(
                signs["digest_bytes"] / signs[call]["median_ms"] / 1e6
            )
        for call in ("native", "native_score"):
            times = signs[call]["median_ms"], kernel_record["select"][call]["median_ms"]
            assert signs["ratios"][f"{name}_{call}/{call}"] == pytest.approx(times[0] / times[1])
        assert {f"{name}_native/{name}_read", f"{name}_torch/{name}_native"} < set(signs["ratios"])
    # What is chosen by default is among what is timed.
    assert digest_for(ScoutConfig(), torch.zeros(1, 2, 4, 32)) in kernel_record["select"] | {"minmax": {}}
    assert kernel_record["machine"]["isa"] == load_library().isa
    for error in kernel_record["int8_error"].values():
        assert error["int8_to_bf16"]["relative"] > error["bf16_to_exact"]["relative"]
        assert error["int8_to_bf16"]["relative"] < 0.2


def test_decode_record_is_complete(decode_record):
    json.dumps(decode_record, allow_nan=False)
    check_numbers(decode_record, POSITIVE)
    assert [row["context"] for row in decode_record["contexts"]] == [0, 256]
    for row in decode_record["contexts"]:
        assert set(row["modes"]) == {"stock", "stock folded", "scout", "scout exact", "scout int8"}
        assert len(row["ratios"]) == 6 and row["interleaved"]
    long = decode_record["contexts"][1]["modes"]
    assert long["stock"]["kv_share"] == long["scout exact"]["kv_share"] == 1 and 0.2 < long["scout"]["kv_share"] < 0.4
    assert long["scout int8"]["kv_read_bytes"] < long["scout"]["kv_read_bytes"] < long["stock"]["kv_read_bytes"]
    assert long["scout"]["digest_bytes"] > 0 and long["stock"]["copied_bytes"] > 2 * long["stock"]["kv_read_bytes"] - 1
    assert decode_record["prefill"]["ratios"]["scout/stock"] > 0
    assert [one["kind"] for one in decode_record["memory"]] == list(memory.KINDS)


@pytest.mark.full
def test_memory_is_measured_in_a_process_of_its_own():
    sizes = ("scout", 256, 64, 16, TINY | {"num_hidden_layers": 2})
    alone, here = memory.in_fresh_process(*sizes), memory.measure(*sizes)
    assert set(alone) == set(here) and alone["kv_bytes"] == here["kv_bytes"] and alone["held_bytes"] > 0


@pytest.mark.parametrize("name", ["kernel_record", "decode_record"])
def test_tables_fit_a_terminal(name, request):
    text = printed(request.getfixturevalue(name))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for expected in ("ms", "GB/s", "int8", "256", torch.__version__):
        assert expected in text


@pytest.mark.parametrize(
    "absent", [(), ("sign2",), ("sign", "sign2")], ids=["all digests", "before sign2", "min/max alone"]
)
def test_a_table_for_each_digest_of_a_record(kernel_record, absent, tmp_path):
    select = {name: part for name, part in kernel_record["select"].items() if name not in absent}
    (tmp_path / "old.json").write_text(json.dumps(kernel_record | {"select": select}))
    text = printed(read_record(tmp_path / "old.json", "cpu_kernel"))
    shown = {"sign": "MiB of sign codes", "sign2": "MiB of sign2 codes"}
    for name, title in shown.items():
        assert (title in text) == (name not in absent)
        assert (f"{name} codes take" in text) == (name not in absent)


@needs_library
def test_a_digest_that_native_code_does_not_score_is_not_timed():
    """Two bits per channel of 512 are more than it takes; the call would come back at once, and pass for fast."""
    sizes = CpuKernel([64], 256, (2, 1), 512, 16, repeat=1, dense=0)
    assert set(cpu_kernel.run(sizes)["select"]) & {"sign", "sign2"} == {"sign"}


@pytest.mark.parametrize("part", ["sign", "sign2"])
def test_a_record_with_half_a_digest_is_refused(kernel_record, part, tmp_path):
    half = {name: one for name, one in kernel_record["select"][part].items() if name != "native_score"}
    (tmp_path / "half.json").write_text(json.dumps(kernel_record | {"select": kernel_record["select"] | {part: half}}))
    with pytest.raises(ConfigError, match=rf"half.json cannot be used.*select.{part}.*native_score"):
        read_record(tmp_path / "half.json", "cpu_kernel")


@pytest.mark.parametrize("name", ["kernel_record", "decode_record"])
def test_files_are_written(name, request, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    record = request.getfixturevalue(name)
    lines = report.save(record, tmp_path)
    assert json.loads((tmp_path / f"{record['benchmark']}.json").read_text()) == json.loads(json.dumps(record))
    assert (tmp_path / f"{record['benchmark']}.png").read_bytes().startswith(b"\x89PNG") and len(lines) == 2


@pytest.mark.parametrize("name", readme.COMMANDS)
def test_the_page_says_what_was_measured(name):
    page = PAGES.get(name, "docs/results/speed.md")
    text = (ROOT / page).read_text(encoding="utf-8")
    if name not in MEASURED:
        assert not between_marks(text, readme.COMMANDS[name])[1].strip(), "nobody measured this"
        return
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert between_marks(text, readme.COMMANDS[name])[1].strip() == readme.markdown(record), (
        f"make it again with: python -m scout_hf.eval.bench.readme {page} eval/results"
    )
    if name not in PAGES:  # as long as there are ways and contexts
        assert len(readme.markdown(record).splitlines()) == (7 if name == "cpu_decode" else 8)


def test_a_page_is_brought_up_to_date(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("".join(f"{begin_mark(one)}\nstale\n{end_mark(one)}\n" for one in readme.COMMANDS.values()))
    for word in ("changed", "is up to date"):
        readme.main(str(page), str(RESULTS))
        assert capsys.readouterr().out.count(word) == len(MEASURED)
    assert page.read_text().count("stale") == len(readme.COMMANDS) - len(MEASURED) and "| 16k | " in page.read_text()


def test_a_page_lacks_what_was_not_measured(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("as it was")
    readme.main(str(page), str(tmp_path))
    assert capsys.readouterr().out.count("no ") == len(readme.COMMANDS) and page.read_text() == "as it was"


def test_without_matplotlib_there_is_no_plot(decode_record, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "scout_hf[bench]" in report.save(decode_record, tmp_path)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["cpu_decode.json"]


@needs_library
def test_command_measures_and_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    sizes = "--tokens 64 --cache-tokens 256 --heads 4 2 --head-dim 32 --repeat 3 --dense 0".split()
    result = CliRunner().invoke(app, ["bench", "cpu-kernel", *sizes, "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert "native" in result.stdout and f"wrote {tmp_path / 'new'}" in result.stdout.replace("\n", "")
    assert json.loads((tmp_path / "new" / "cpu_kernel.json").read_text())["settings"]["cache_tokens"] == 256


@needs_library
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokens 100", "blocks of 32"),
        ("--tokens 1024 --cache-tokens 512", "--cache-tokens"),
        ("--heads 5 2", "multiple"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    result = CliRunner().invoke(app, ["bench", "cpu-kernel", *options.split()])
    assert result.exit_code == 2 and message in result.stderr


def test_more_threads_than_cpus_are_refused():
    with pytest.raises(ValueError, match="--threads 100000"), machine.measuring(100000, print):
        pass


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_affinity_and_threads_are_restored():
    before, teams = os.sched_getaffinity(0), torch.get_num_threads()
    with machine.measuring(1, lambda line: None) as company:
        assert os.sched_getaffinity(0) == set(company.cpus) and len(company.cpus) == 1
        assert torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == before and torch.get_num_threads() == teams


def test_others_on_the_machine_are_told(monkeypatch):
    lines = []
    monkeypatch.setattr(machine, "_load", lambda: 1000.0)
    with machine.measuring(1, lines.append):
        pass
    assert len(lines) == 1 and lines[0].startswith("warning: load average 1000.0")


def test_calls_alternate_and_rare_ones_are_spread():
    order = []
    calls = {name: lambda name=name: lambda: order.append(name) for name in ("often", "rare")}
    times = timing.interleave(calls, {"often": 9, "rare": 3})
    assert len(times["often"].seconds) == 9 and len(times["rare"].seconds) == 3
    assert [order[part : part + 4].count("rare") for part in (0, 4, 8)] == [1, 1, 1]


def test_twins_share_weights_and_agree():
    model = models.make_llama(**TINY, num_hidden_layers=2)
    folded, short = models.twin(model), models.twin(model, layers=1)
    assert folded.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert short.config.num_hidden_layers == 1 and model.config.num_hidden_layers == 2
    from transformers import DynamicCache

    outs = []
    for one in (model, folded):
        with models.folded(one) if one is folded else nullcontext():
            cache = fill(DynamicCache(config=model.config), model.config, 64)
            outs.append(one(torch.ones((1, 1), dtype=torch.long), past_key_values=cache).logits)
    torch.testing.assert_close(outs[0], outs[1], atol=0.05, rtol=0.05)
