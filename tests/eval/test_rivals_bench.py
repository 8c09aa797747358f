"""The comparison with other runtimes, which stand-ins play: who is missing, ends, lies or is another model is said."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from scout_hf.cli import app
from scout_hf.errors import ConfigError
from scout_hf.eval import arms
from scout_hf.eval.bench import (
    bandwidth,
    readme,
    report,
    rivals,
    rivals_apart,
    rivals_ours,
    rivals_report,
    rivals_theirs,
)
from scout_hf.eval.bench.options import Rivals
from scout_hf.eval.bench.rivals_process import Rival, RivalError
from scout_hf.eval.language import gguf_files
from scout_hf.eval.language.gguf_files import GgufFacts
from scout_hf.eval.pocket import load_pocket
from scout_hf.eval.records import read_record
from tests.eval.figures import check_numbers
from tests.integration.common import llama

STANDINS = Path(__file__).parent / "standins"
OURS = ["stock", "stock folded", "scout exact", "scout auto", "scout sparse"]
LLAMA, LLAMA_Q8, OPENVINO = "llama.cpp Q4_1 (f16 KV)", "llama.cpp Q4_1 (q8_0 KV)", "OpenVINO Q4_1 (u8 KV)"
OPTIONS = {"contexts": [0, 512], "prefill": 512, "budget": 128, "block_size": 16, "rounds": 2, "steps": 2, "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pocket")
    for part in load_pocket():
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plan(folder):
    """What the model itself goes on with behind the prompts that others are asked about."""
    model, tokenizer = load_pocket()
    ids = rivals._text(tokenizer, 0)
    prompts = [
        ids[place : place + rivals.PROMPT_TOKENS] for place in range(0, rivals.PROMPTS * rivals.APART, rivals.APART)
    ]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([part])).logits[0, -1] for part in prompts]
    following = {" ".join(map(str, part)): int(row.argmax()) for part, row in zip(prompts, logits)}
    return {"vocabulary": model.config.vocab_size, "next": following, "else": int(logits[0].argmin())}


def measure(folder, plan, tmp_path, lines=None, standins="there", **changes):
    """The entry of the model, with stand-ins that follow the plan."""
    file = tmp_path / "model.gguf"
    file.write_text(json.dumps(plan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(STANDINS / standins))
        patch.setattr(bandwidth, "SPAN_BYTES", 1 << 24)
        layers = load_pocket()[0].config.num_hidden_layers
        patch.setattr(gguf_files, "facts", lambda file: GgufFacts("Q4_1", layers, plan["vocabulary"], 1 << 20))
        patch.setattr(gguf_files, "foreign", lambda file, known: set())
        options = Rivals(str(folder), **OPTIONS | {"gguf": [file]} | changes)
        return rivals.run(options, (lines if lines is not None else []).append)


def told(record):
    return {one["name"]: one["told"] for one in record["models"][-1]["arms"] if "told" in one}


@pytest.fixture(scope="module")
def record(folder, plan, tmp_path_factory):
    return measure(folder, plan, tmp_path_factory.mktemp("all"))


def test_the_record_is_complete(record):
    json.dumps(record, allow_nan=False)
    check_numbers(record, ("_ms", "gb_per_s", "tokens_per_s", ".n", "prefill"))
    (entry,) = record["models"]
    assert [one["name"] for one in entry["arms"]] == [*OURS, LLAMA, LLAMA_Q8, OPENVINO] and not told(record)
    assert [one["agrees"] for one in entry["arms"][5:]] == [1, 1, 1]
    assert {one["attention"] for one in entry["arms"][5:7]} == {"flash attention enabled"}
    empty, long = entry["contexts"]
    assert not empty["prefill"] and set(long["prefill"]) == {"stock", "scout exact", LLAMA, LLAMA_Q8, OPENVINO}
    for row in (empty, long):
        assert set(row["arms"]) == {*OURS, LLAMA, LLAMA_Q8, OPENVINO} and len(row["ratios"]) == 8 * 7
        assert all(len(one["rounds_ms"]) == 2 for one in row["arms"].values())
    assert {name: one["n"] for name, one in long["arms"].items()} == dict.fromkeys(long["arms"], 4)
    # Nobody was timed with another context, and only the sparse arm attended to less than all.
    assert all(512 < one["held_tokens"] < 512 + 64 for one in long["arms"].values())
    shares = {name: one["kv_share"] for name, one in long["arms"].items()}
    assert 0.2 < shares.pop("scout sparse") < 0.4 and set(shares.values()) == {1.0}
    assert long["arms"]["scout exact"]["exact"] and not long["arms"]["scout sparse"]["exact"]
    assert set(entry["idle_cpus"]) == {"transformers", LLAMA, LLAMA_Q8, OPENVINO}


def test_a_longer_context_is_filled_with_what_was_read(folder, plan, tmp_path):
    record = measure(
        folder, plan, tmp_path, contexts=[100, 512], prefill=64, arm=["stock", "scout exact", "llama", "Open"]
    )
    for row in record["models"][0]["contexts"]:
        least = row["context"]
        assert set(row["arms"]) == {"stock", "stock folded", "scout exact", LLAMA, LLAMA_Q8, OPENVINO}
        assert all(least < one["held_tokens"] < least + 64 for one in row["arms"].values())
    # One that cannot be given keys and values reads on, and says how long that took.
    assert set(row["prefill"]) == {OPENVINO} and not told(record)


def test_a_rival_that_cannot_be_filled_is_left_out(folder, plan, tmp_path):
    record = measure(folder, plan | {"takes_nothing": True}, tmp_path, prefill=64, arm=["stock", "llama.cpp Q4_1 (f16"])
    first, second = record["models"][0]["contexts"]
    assert LLAMA in first["arms"] and LLAMA not in second["arms"] and "did not take keys" in told(record)[LLAMA]


def test_arms_by_the_format_of_their_weights(folder, plan, tmp_path):
    record = measure(folder, plan, tmp_path, contexts=[64], weights=["float32", "bfloat16"], arm=["scout"])
    (entry,) = record["models"]
    names = [f"{name} ({form})" for form in ("float32", "bfloat16") for name in OURS[2:]]
    assert [one["name"] for one in entry["arms"]] == names == list(entry["contexts"][0]["arms"])
    single, half = (entry["contexts"][0]["arms"][f"scout exact ({form})"] for form in ("float32", "bfloat16"))
    assert single["kv_bytes"] == 2 * half["kv_bytes"] and single["read_bytes"] == 2 * half["read_bytes"]


def test_what_is_not_installed_is_said_and_left_out(folder, plan, tmp_path):
    lines = []
    record = measure(folder, plan, tmp_path, lines, "absent", contexts=[0])
    missing = told(record)
    assert missing.keys() == {LLAMA, LLAMA_Q8, OPENVINO} and set(record["models"][0]["contexts"][0]["arms"]) == set(
        OURS
    )
    assert "pip install llama-cpp-python" in missing[LLAMA] and "pip install openvino-genai" in missing[OPENVINO]
    assert sum("not installed" in line for line in lines) == 3
    assert "pip install llama-cpp-python" in printed(record)


def test_without_a_gguf_file_others_say_so(folder, plan, tmp_path):
    assert told(measure(folder, plan, tmp_path, contexts=[0], gguf=[])) == dict.fromkeys(
        ("llama.cpp", "OpenVINO"), "needs the same weights as a GGUF file: --gguf FILE"
    )


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"broken": True}, "ValueError: llama.cpp cannot load it"),
        ({"flash": "disabled"}, "flash attention is off"),
        ({"kv_type": 0}, "its cache is of the types"),
        ({"more": 3}, "should be in its cache"),
        ({"fewer": 1}, "were counted"),
        ({"next": {}}, "it is another model"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_a_rival_that_is_not_what_it_says_takes_no_part(folder, plan, tmp_path, fault, why):
    record = measure(folder, plan | fault, tmp_path, contexts=[0], arm=["stock", "llama.cpp Q4_1 (f16", "OpenVINO"])
    failed = told(record)
    assert failed and all(why in text and text.startswith("failed: ") for text in failed.values())
    assert not failed.keys() & record["models"][0]["contexts"][0]["arms"].keys()
    assert "stock" in record["models"][0]["contexts"][0]["arms"]


def test_a_rival_that_dies_leaves_what_was_measured(folder, plan, tmp_path):
    out = tmp_path / "out"
    record = measure(folder, plan | {"dies_at": 300}, tmp_path, out=out)
    first, second = record["models"][0]["contexts"]
    assert LLAMA in first["arms"] and LLAMA not in second["arms"] and {*OURS, OPENVINO} == second["arms"].keys()
    assert "its process ended (9): out of patience" in told(record)[LLAMA]
    assert read_record(out / "rivals.json", "rivals")["models"] == json.loads(json.dumps(record["models"]))


def test_rows_are_written_as_they_come(folder, plan, tmp_path, monkeypatch):
    out, before = tmp_path / "out", rivals._Bench.measure

    def interrupted(bench, context):
        if context:
            raise KeyboardInterrupt
        return before(bench, context)

    monkeypatch.setattr(rivals._Bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(folder, plan, tmp_path, out=out, arm=["stock"])
    (entry,) = read_record(out / "rivals.json", "rivals")["models"]
    assert [row["context"] for row in entry["contexts"]] == [0] and entry["company"] is None


def test_other_models_of_a_record_are_kept(folder, plan, tmp_path, record):
    out = tmp_path / "out"
    out.mkdir()
    held = record["models"][0]
    (out / "rivals.json").write_text(json.dumps(record | {"models": [held | {"name": "another"}, held]}))
    found = measure(folder, plan, tmp_path, out=out, contexts=[0], arm=["stock"])["models"]
    assert [one["name"] for one in found] == ["another", str(folder)]
    assert found[0] == json.loads(json.dumps(held)) | {"name": "another"} and len(found[1]["contexts"]) == 1


def test_an_arm_of_ours_that_is_not_what_it_says_takes_no_part(folder, plan, tmp_path, monkeypatch):
    sparse = arms.Arm("scout exact", {"split": "off", "budget": 64})
    monkeypatch.setattr(rivals_ours, "RIVALS", arms.RIVALS | {"scout exact": sparse})
    record = measure(folder, plan, tmp_path, contexts=[512, 600], arm=["stock", "scout exact"])
    assert [set(row["arms"]) for row in record["models"][0]["contexts"]] == [{"stock", "stock folded"}] * 2
    assert "calls exact: False" in told(record)["scout exact"]


def test_a_gguf_file_of_another_shape_is_refused(folder, plan, tmp_path):
    with pytest.raises(ConfigError, match="is another model: it has .* layers and 7 tokens.*--gguf"):
        measure(folder, plan | {"vocabulary": 7}, tmp_path, contexts=[0])


# -- the process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def standins(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STANDINS / "there"))


def test_a_rival_that_hangs_is_ended(plan, tmp_path, standins):
    (tmp_path / "plan").write_text(json.dumps(plan | {"hangs_at": 1}))
    with Rival("llama.cpp", sys.executable, 1, limit=30) as rival:
        rival.ask("open", file=str(tmp_path / "plan"), threads=1, tokens=8, kv="f16")
        rival._limit = 0.3
        with pytest.raises(RivalError, match="did not answer within 0.3 s"):
            rival.ask("read", ids=[1])
        with pytest.raises(RivalError):
            rival.grown_bytes()


def test_what_libraries_print_is_no_answer(plan, tmp_path, standins):
    (tmp_path / "plan").write_text(json.dumps(plan))
    with Rival("llama.cpp", sys.executable, 1) as rival:
        said = rival.ask("open", file=str(tmp_path / "plan"), threads=1, tokens=8, kv="q8_0")
        assert said == {"vocabulary": plan["vocabulary"], "kv_types": [8, 8]}
        assert "prints as it likes" in rival.log() and "flash_attn" in rival.log()
        assert rival.ask("read", ids=[1, 2, 3])["held"] == 3
        count = rivals_apart.WARM_UPS + 2
        for _ in range(2):  # what was decoded is forgotten
            said = rival.ask("step", ids=[1] * count)
            assert said["held"] == 3 + count and len(said["seconds"]) == 2
        assert rival.ask("read", ids=[4])["held"] == 4
        assert [rival.ask("fill", tokens=tokens)["held"] for tokens in (6, 7)] == [6, 7]


def test_a_program_that_is_no_python_is_an_error(tmp_path):
    with pytest.raises(RivalError, match="its process ended"):
        Rival("llama.cpp", "/bin/false", 1)


# -- the arms of transformers ---------------------------------------------------------------------------------------


def test_twins_share_weights_and_no_settings():
    model = llama()
    other = rivals_ours.twin(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters()))
    assert other is not model and other.config is not model.config
    ids = torch.ones((1, 3), dtype=torch.long)
    torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_twins_share_quantised_weights():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no 8-bit kernels in this torch")
    model = torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear})
    packed = [[one._packed_params for one in part.modules() if hasattr(one, "_packed_params")]
              for part in (model, rivals_ours.twin(model))]  # fmt: skip
    assert packed[0] and all(one is two for one, two in zip(*packed))


@pytest.mark.parametrize(
    ("arm", "why"),
    [
        (arms.Arm("scout exact", {"split": "off", "budget": 64, "block_size": 16}), "calls exact: False"),
        (arms.Arm("stock", folded=True), "attends by folded_sdpa|attends by sdpa"),
    ],
    ids=["exact that is sparse", "stock that is folded"],
)
def test_an_arm_that_does_something_else_is_an_error(arm, why):
    model = llama()
    with arm.caches(model) as caches:
        honest = arms.Arm("stock") if arm.folded else arm
        decoder = rivals_ours.Decoder(honest, model, caches, [1, 2, 3])
        cache = caches.new()
        with torch.no_grad():
            model(torch.ones((1, 256), dtype=torch.long), past_key_values=cache)
        decoder.start(cache, 2)
        with pytest.raises(RivalError, match=why):
            decoder.steps()


def test_formats_are_found_by_the_beginning_of_their_names():
    assert rivals_ours.format_of("torch int8") == "torch int8, dynamic (float32)"
    with pytest.raises(ConfigError, match="--weights float128.*bfloat16"):
        rivals_ours.format_of("float128")


# -- tables ---------------------------------------------------------------------------------------------------------


def printed(record):
    sink = io.StringIO()
    report.show(record, Console(file=sink, width=80))
    return sink.getvalue()


def test_tables_fit_a_terminal_and_a_plot_is_made(record, tmp_path):
    text = printed(record)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text and "The fastest step" in text
    busy = record["models"][0] | {"company": record["models"][0]["company"] | {"cpus_used_by_others": 0.7}}
    assert "NOT QUIET" in printed(record | {"models": [busy]})
    pytest.importorskip("matplotlib")
    report.save(record, tmp_path)
    assert (tmp_path / "rivals.png").stat().st_size > 1000


def test_long_names_fit_too(record):
    (entry,) = record["models"]
    text = json.dumps(entry).replace("scout sparse", "scout sparse (bitsandbytes int8)")
    assert "…" not in printed(record | {"models": [json.loads(text)]})


def test_it_is_read_back_and_told_in_markdown(record, tmp_path):
    (tmp_path / "rivals.json").write_text(json.dumps(record))
    text = readme.markdown(read_record(tmp_path / "rivals.json", "rivals"))
    assert f"| {LLAMA} | Q4_1 | f16 | " in text and "| stock | float32 | float32 | " in text
    broken = json.loads(json.dumps(record))
    del broken["models"][0]["contexts"][0]["arms"]["stock"]["kv_share"]
    (tmp_path / "rivals.json").write_text(json.dumps(broken))
    with pytest.raises(ConfigError, match="kv_share"):
        read_record(tmp_path / "rivals.json", "rivals")


def entry_of(**times):
    """An entry with these times of arms at 0, 4k and 16k tokens; None where there is none."""
    contexts = []
    for place, context in enumerate((0, 4096, 16384)):
        found = {name: steps[place] for name, steps in times.items() if steps[place]}
        ratios = {f"{one}/{two}": a / b for one, a in found.items() for two, b in found.items() if one != two}
        contexts.append(
            {"context": context, "arms": {name: {"median_ms": ms} for name, ms in found.items()}} | {"ratios": ratios}
        )
    return {"arms": [{"name": name} for name in times], "contexts": contexts}


@pytest.mark.parametrize(
    ("times", "sentences"),
    [
        (
            {"stock": (50, 90, 300), "scout exact": (50.1, 60, 70), "llama": (20, 40, 100)},
            [
                "The fastest step: llama from none to 4k; scout exact from 16k on.",
                "scout exact is faster than stock from 4k on, llama from 16k on.",
            ],
        ),
        (
            {"stock": (50, 90, 300), "scout exact": (40, 60, 70), "llama": (20, 40, 60)},
            [
                "The fastest step: llama from none on.",
                "scout exact is faster at all contexts than stock; not than llama.",
            ],
        ),
        (
            {"scout exact": (60, 60, 70), "llama": (20, 40, 60), "openvino": (20, 40, 60)},
            ["The fastest step: llama from none on.", "scout exact is not faster than llama and openvino."],
        ),
        (
            {"stock": (50, 90, 300), "scout exact": (60, 40, 310), "llama": (20, 45, None)},
            [
                "The fastest step: llama at none; scout exact at 4k; stock from 16k on.",
                "scout exact is faster than llama from 4k on; not than stock.",
            ],
        ),
    ],
    ids=["passes", "never", "never at all", "passes, and falls back"],
)
def test_who_wins_from_where_on(times, sentences):
    assert list(rivals_report.wins(entry_of(**times))) == sentences


# -- files and the command ------------------------------------------------------------------------------------------


def test_a_gguf_file_and_the_same_in_f16(tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    file, random = tmp_path / "small.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    weight = random.standard_normal((4, 32)).astype(np.float32)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    # A head that is the embedding too is read wholly.
    assert gguf_files.facts(file) == ("Q8_0", 3, 4, 4 * 34 + 32 * 4)
    gguf_files.write_f16(file, tmp_path / "made" / "f16.gguf", lambda line: None)
    assert gguf_files.facts(tmp_path / "made" / "f16.gguf") == ("F16", 3, 4, 4 * 32 * 2 + 32 * 4)
    reader = gguf.GGUFReader(tmp_path / "made" / "f16.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    unpacked = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0).astype(np.float16)
    np.testing.assert_array_equal(found["token_embd.weight"], unpacked)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["f16.gguf"]


def test_weights_that_openvino_does_not_know_are_written_in_another_format(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    monkeypatch.setenv("SCOUT_HF_CACHE", str(tmp_path / "cache"))
    kinds, random = gguf.GGMLQuantizationType, np.random.default_rng(0)
    file = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(3)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    held = {"token_embd.weight": kinds.Q5_0, "output.weight": kinds.Q4_1}
    weights = {
        name: gguf.quants.quantize(random.standard_normal((4, 64)).astype(np.float32), held[name]) for name in held
    }
    for name, data in weights.items():
        writer.add_tensor(name, data, raw_dtype=held[name])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    given = rivals_theirs.Setting("openvino", file, "Q4_K_M", "u8", 1)
    made = rivals_theirs.loadable(given, print)
    assert made.weights == "Q4_K_M, Q5_0 as Q8_0" and made.step_bytes == 4 * 2 * 20 and made.file != file
    assert rivals_theirs.loadable(made, print) is made and rivals_theirs.loadable(given, None) == made
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(made.file).tensors}
    assert [found[name].tensor_type for name in held] == [kinds.Q8_0, kinds.Q4_1]
    np.testing.assert_array_equal(found["output.weight"].data, weights["output.weight"])
    numbers = gguf.quants.dequantize(weights["token_embd.weight"], kinds.Q5_0)
    close = gguf.quants.dequantize(found["token_embd.weight"].data, kinds.Q8_0)
    assert np.abs(numbers - close).max() < 0.01 * np.abs(numbers).max()
    llama_cpp = rivals_theirs.Setting("llama.cpp", file, "Q4_K_M", "f16", 1)
    assert rivals_theirs.loadable(llama_cpp, print) is llama_cpp


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_text("nothing")
    with pytest.raises(ConfigError, match="cannot be read as GGUF"):
        gguf_files.facts(tmp_path / "x.gguf")


def test_a_folder_without_a_model_of_openvino_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="openvino_model.bin"):
        rivals_theirs.settings_for([], tmp_path, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gguf nowhere.gguf", "nowhere.gguf is missing"),
        ("--rivals-python /no/such/python", "--rivals-python /no/such/python is missing"),
        ("--weights float128", "--weights float128"),
        ("--budget 0", "budget"),
    ],
)
def test_wrong_options_are_refused(options, message):
    result = CliRunner().invoke(app, ["bench", "rivals", *options.split()])
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " ")
