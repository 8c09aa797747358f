"""The demo: its document, a real model's answers side by side, and the pocket model where there is no other."""

import hashlib
import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import scout_hf
from scout_hf import ConfigError, ScoutCache, ScoutConfig
from scout_hf.cli import app
from scout_hf.errors import MissingFileError
from scout_hf.eval import decode_path
from scout_hf.eval.demo import asking, command, real, text
from scout_hf.eval.language.load import load
from scout_hf.eval.language.packaged import cache_folder
from scout_hf.eval.options import Demo
from scout_hf.eval.text import load_text_model
from scout_hf.files import read_json

SMALL = "demo --pocket --tokens 512 --questions 3 --budget 128".split()
PARAGRAPHS = 12


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return lambda arguments: CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def plan():
    return read_json(text.FACTS, text.RULE, "")


@pytest.fixture(scope="module")
def topics():
    return pytest.importorskip("pydoc_data.topics").topics


@pytest.fixture(scope="module")
def stand_in(plan, topics):
    """A small model that knows no facts, and the beginning of the document."""
    facts = [fact | {"before": 3 * index} for index, fact in enumerate(plan["facts"][:4])]
    document = text.make_document(topics, plan | {"paragraphs": plan["paragraphs"][:PARAGRAPHS], "facts": facts})
    return *load_text_model(), document


def shown(stand_in, **options):
    """The demo's verdict, and what it printed on 80 columns."""
    page, options = io.StringIO(), Demo(threads=1, **options)
    same = real.run("A stand-in", *stand_in, real.configs_of(options), options, Console(file=page, width=80))
    return same, page.getvalue()


# -- the document ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="its reference may be another")
def test_the_document_is_the_same_in_every_python(topics):
    document = text.read_document()
    assert hashlib.sha256(document.text.encode()).hexdigest().startswith("8f334be7b902a1a9")
    assert len(document.facts) == 12 and all(document.text.count(fact.text) == 1 for fact in document.facts)


def test_facts_stand_all_over_the_document_and_each_answers_its_question(plan, topics):
    document = text.read_document()
    at = [0, *(document.text.index(fact.text) / len(document.text) for fact in document.facts), 1]
    assert all(0 < after - before < 1.5 / len(plan["facts"]) for before, after in zip(at, at[1:]))
    for fact in document.facts:
        assert fact.text.startswith(f"{fact.begin} {fact.answer}")
        assert document.text.count(fact.begin) == 1 and fact.answer not in fact.question


def test_a_python_that_lacks_paragraphs_has_a_shorter_document(plan, topics):
    whole = text.make_document(topics, plan)
    half = topics[plan["topic"]][: len(topics[plan["topic"]]) // 2]
    document = text.make_document(topics | {plan["topic"]: half}, plan)
    assert document.facts == whole.facts and len(document.text) < 0.7 * len(whole.text)
    assert all(fact.text in document.text for fact in document.facts)
    with pytest.raises(ConfigError, match="specialnames .* another text"):
        text.make_document({}, plan)


def test_emphasis_and_line_breaks_make_no_other_paragraph():
    assert text.paragraphs("The *name*\nis `x`.\n \n**Not**  this.") == ["The name is x.", "Not this."]


def test_prompts_share_the_document_and_end_in_a_question(stand_in):
    _, tokenizer, document = stand_in
    prompts = text.make_prompts(tokenizer, document)
    assert document.text in tokenizer.decode(prompts.shared)
    for fact, whole, begin in zip(document.facts, prompts.whole, prompts.begins):
        assert whole[: len(prompts.shared)] == prompts.shared and len(whole) > len(prompts.shared)
        assert tokenizer.decode(whole).endswith(f"{fact.question}\n") and tokenizer.decode(begin) == fact.begin


def test_prompts_take_the_chat_template(stand_in):
    _, tokenizer, document = stand_in
    tokenizer.chat_template = "<{{ messages[0]['content'] }}>{% if add_generation_prompt %}you:{% endif %}"
    try:
        prompts = text.make_prompts(tokenizer, document)
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(prompts.whole[1]).endswith(f"{document.facts[1].question}>you:")


# -- a real model ---------------------------------------------------------------------------------------------------


def test_demo_shows_answers_and_costs_side_by_side(stand_in):
    same, page = shown(stand_in, budget=128)
    assert same and "all answers equal to stock" in page
    for expected in (
        "stock",
        "exact",
        "sparse",
        "/4",
        "tok/s",
        "budget=128",
        "4 hidden facts",
        "A stand-in has",
        "Gained:",
        "Lost:",
    ):
        assert expected in page
    assert max(map(len, page.splitlines())) <= 80
    assert not hasattr(stand_in[0], "_scout_handle")


def test_sparse_is_always_sparse_whatever_the_machine_is_fast_at():
    configs = real.configs_of(Demo())
    assert configs == {"stock": None, "exact": ScoutConfig(budget=None), "sparse": ScoutConfig(budget=2048)}


def test_any_setting_can_be_tried(stand_in):
    configs = real.configs_of(Demo(budget=512, set=["mass=0.95", "window=64"]))
    assert configs["sparse"] == ScoutConfig(budget=512, mass=0.95, window=64)
    assert configs["exact"] == ScoutConfig(budget=None)
    assert real.configs_of(Demo(set=["budget=0.5"]))["sparse"] == ScoutConfig(budget=0.5)
    same, page = shown(stand_in, set=["mass=0.5", "budget=1.0"])
    assert same and "budget=1.0, mass=0.5" in " ".join(page.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mass", "--set mass is not allowed"),
        ("mass=0.9,0.95", "--set mass is not allowed with 2 values here: one, such as mass=0.95"),
        ("mas=0.9", "did you mean 'mass'"),
        ("mass=2", "mass=2 is not allowed"),
        ("digest=signs", "digest='signs' is not known"),
    ],
)
def test_wrong_settings_are_told_before_a_model_is_fetched(given, message, invoke, monkeypatch):
    monkeypatch.setattr(command, "fetched", None)
    result = invoke(["demo", "--set", given])
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_what_the_model_cannot_do_is_told_before_the_document_is_read(stand_in, monkeypatch):
    monkeypatch.setattr(real, "read", None)
    with pytest.raises(ConfigError, match="dense_layers=99"):
        shown(stand_in, set=["dense_layers=99"])


def test_the_pocket_model_takes_settings_too(invoke):
    result = invoke([*SMALL, "--set", "window=16"])
    assert result.exit_code == 0
    result = invoke([*SMALL, "--set", "method=nonesuch"])
    assert result.exit_code == 2 and "method='nonesuch' is not known" in " ".join(result.output.split())


def test_demo_says_where_exact_differs_from_stock(stand_in, monkeypatch):
    before = asking.ask

    def wrong_when_exact(model, tokenizer, session, *rest):
        before(model, tokenizer, session, *rest)
        if session.config is not None and session.config.budget is None:
            session.texts[-1] = "nothing of the kind"

    monkeypatch.setattr(asking, "ask", wrong_when_exact)
    same, page = shown(stand_in, budget=128, questions=2)
    assert not same and "2 of 2 answers differ from stock" in page and "✗ nothing" in page


def test_every_answer_token_is_a_decode_step_of_its_mode(stand_in):
    model, tokenizer, document = stand_in
    prompts = text.make_prompts(tokenizer, document)
    ids, begin = prompts.shared, prompts.begins[2]
    begun = asking.read(model, ids)
    assert begun.get_seq_length() == len(ids) - asking.LAST_TOKENS
    sessions = [asking.open_session(model, begun, ids, one) for one in (None, ScoutConfig(budget=64, digest="minmax"))]
    ticks = []
    asking.ask_all(model, tokenizer, prompts, [2, 0], sessions, ticks.append)
    assert len(ticks) == 4
    for session in sessions:
        assert session.cache.get_seq_length() == len(ids)  # questions are asked from copies
        assert isinstance(session.cache, ScoutCache) == (session.config is not None)
        steps = sum(len(logits) - 1 for logits in session.logits)
        assert len(session.step_seconds) == steps >= 2 * len(begin)
    stock, sparse = sessions
    assert len(ids) < stock.attended_tokens < len(ids) + 64
    assert 64 <= sparse.attended_tokens <= 64 + 2 * 32
    # The pass of the question is dense in every mode, the steps after it are not.
    assert torch.allclose(stock.logits[0][0], sparse.logits[0][0], atol=1e-3)
    assert not torch.allclose(stock.logits[0][1 : len(begin)], sparse.logits[0][1 : len(begin)], atol=1e-3)


def test_all_modes_answer_a_question_before_the_next_one(monkeypatch):
    prompts, seen = text.Prompts([], ["p0", "p1", "p2"], ["b0", "b1", "b2"]), []
    monkeypatch.setattr(asking, "ask", lambda model, tokenizer, *asked: seen.append(asked))
    asking.ask_all(None, None, prompts, [2, 0], ["stock", "sparse"])
    assert seen == [(mode, f"p{index}", f"b{index}") for index in (2, 0) for mode in ("stock", "sparse")]


def test_answers_are_those_of_stock_generate(stand_in):
    """Without a document read before, copies, and other modes."""
    model, tokenizer, document = stand_in
    prompts = text.make_prompts(tokenizer, document)
    session = asking.open_session(model, asking.read(model, prompts.shared), prompts.shared, None)
    asking.ask(model, tokenizer, session, prompts.whole[1], prompts.begins[1])
    ids = torch.tensor([prompts.whole[1] + prompts.begins[1]])
    out = model.generate(ids, max_new_tokens=asking.LENGTH, do_sample=False)
    assert session.texts == [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()]


@pytest.mark.parametrize(
    ("stock", "sparse", "said"),
    [
        ("ab", "ab", "Lost: no right answer."),
        ("ab", "ax", "Lost: 1 of the 2 answers that full attention gives right."),
        ("xb", "ax", "Lost: 1 of the 1 answers that full attention gives right, with 1 right that stock gives wrong."),
    ],
)
def test_the_closing_sentence_says_what_was_gained_and_lost(stock, sparse, said):
    facts = [text.Fact("", "", "", answer) for answer in "AB"]
    sessions = {
        "stock": asking.Session(None, texts=[*stock], step_seconds=[0.4], attended=[1000]),
        "exact": asking.Session(ScoutConfig(budget=None), None, [*stock], [], [0.2], [1000], 999),
        "sparse": asking.Session(ScoutConfig(), None, [*sparse], [], [0.1, 0.1, 9.0], [150, 250], 5000),
    }
    sentence = real.closing(sessions, facts, 100.0)
    assert sentence.startswith("Gained: 4.00 x the tokens per second of stock by reading 25% of the KV (2.00 x with")
    assert sentence.endswith(said)


@pytest.mark.parametrize(
    "options, message", [({"budget": 3}, "budget=3"), ({"questions": 9}, "questions 9 .* has 4 facts")]
)
def test_wrong_settings_are_told_before_anything_is_read(stand_in, monkeypatch, options, message):
    monkeypatch.setattr(asking, "read", None)
    with pytest.raises(ConfigError, match=message):
        shown(stand_in, **options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model_answers_as_with_full_attention():
    """Exact decoding gives the tokens and logits of stock; the defaults keep what full attention gets right."""
    if not (cache_folder() / "models" / command.MODEL).is_dir() and not os.environ.get("SCOUT_TEST_NETWORK"):
        pytest.skip(f"{command.MODEL} is not in {cache_folder()}; SCOUT_TEST_NETWORK=1 fetches it")
    try:
        model, tokenizer = load(command.MODEL)
    except MissingFileError as error:
        pytest.skip(f"{command.MODEL} cannot be had: {error}")
    document = text.read_document()
    prompts = text.make_prompts(tokenizer, document)
    begun = asking.read(model, prompts.shared)
    sessions = [asking.open_session(model, begun, prompts.shared, one) for one in real.configs_of(Demo()).values()]
    asking.ask_all(model, tokenizer, prompts, range(len(document.facts)), sessions)
    stock, exact, sparse = sessions
    right, sparse_right = (sum(map(real.is_right, one.texts, document.facts)) for one in (stock, sparse))
    assert right >= 0.9 * len(document.facts) and stock.texts == exact.texts
    assert sparse_right >= 0.95 * right
    assert sparse.attended_tokens < 0.5 * len(prompts.shared) < exact.attended_tokens
    for ours, theirs in zip(exact.logits, stock.logits):
        assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max()


# -- which model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch):
    """What the command asked and ran, with a model that is not there yet."""
    seen = {"questions": []}

    def fetched(name, ask, tell):
        seen["yes"] = ask("Fetch it?")
        return "folder" if seen["yes"] else None

    monkeypatch.setattr(command, "fetched", fetched)
    monkeypatch.setattr(command, "load", lambda folder: ("model of " + folder, "tokenizer"))
    for name in ("real", "pocket"):
        monkeypatch.setattr(
            getattr(command, name), "run", lambda *given, name=name: seen.update(ran=name, given=given) or True
        )
    return seen


def on_page(**options):
    page = io.StringIO()
    assert command.run(Demo(**options), Console(file=page, width=1000))
    return page.getvalue()


def test_yes_fetches_the_real_model(chosen):
    assert on_page(yes=True) == ""
    assert chosen["ran"] == "real" and chosen["given"][:3] == ("SmolLM2-135M-Instruct", "model of folder", "tokenizer")


def test_nobody_to_ask_is_no(chosen, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    page = on_page()
    assert chosen["ran"] == "pocket" and "--yes fetches it" in page and "pocket model" in page


@pytest.mark.parametrize(("typed", "ran"), [("y", "real"), ("", "pocket"), ("n", "pocket")])
def test_a_user_is_asked_first(chosen, monkeypatch, typed, ran):
    terminal = io.StringIO(f"{typed}\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "Fetch it?" in on_page() and chosen["ran"] == ran


def test_without_network_a_sentence_says_so_and_the_pocket_model_answers(chosen, monkeypatch):
    def offline(*given):
        raise MissingFileError("the package could not be fetched")

    monkeypatch.setattr(command, "fetched", offline)
    page = on_page(yes=True)
    assert chosen["ran"] == "pocket"
    assert len(page.splitlines()) == 1 and "had (the package could not be fetched). The demo goes on" in page


def test_a_wrong_budget_is_no_reason_for_another_model(chosen):
    with pytest.raises(ConfigError, match="budget=3"):
        on_page(budget=3)
    assert "ran" not in chosen


# -- the pocket model -----------------------------------------------------------------------------------------------


def test_pocket_demo_shows_answers_and_costs(invoke):
    result = invoke(SMALL)
    assert result.exit_code == 0, result.output
    for expected in ("512 tokens", "stock", "exact", "sparse", "2 tiers", "tok/s", "host", "digests"):
        assert expected in result.stdout
    assert "all answers equal to stock" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_pocket_demo_fails_if_exact_differs_from_stock(invoke, monkeypatch):
    right = decode_path.answer

    def wrong_when_patched(model, tokenizer, cache, *rest):
        given = right(model, tokenizer, cache, *rest)
        return replace(given, text="nothing") if isinstance(cache, ScoutCache) else given

    monkeypatch.setattr(decode_path, "answer", wrong_when_patched)
    result = invoke(SMALL)
    assert result.exit_code == 1, result.output
    assert "3 of 3 answers differ" in result.stdout


@pytest.mark.parametrize(
    "options, message",
    [(["--budget", "3"], "budget=3"), (["--block-size", "7"], "block_size=7"), (["--questions", "300"], "facts")],
)
def test_wrong_settings_end_in_a_message(invoke, options, message):
    result = invoke([*SMALL, *options])
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    "options",
    [
        "--tokens 1024",
        "--block-size 16",
        "--seed 1",
        "--budget 99 --set budget=64",
        "--pocket --budget 99 --set budget=64",
    ],
)
def test_no_option_is_ignored(invoke, options):
    result = invoke(["demo", *options.split()])
    assert result.exit_code == 2 and "leave" in result.output


# -- the command line -----------------------------------------------------------------------------------------------


def test_version_names_what_a_bug_report_needs(invoke):
    result = invoke(["version"])
    assert result.exit_code == 0
    for expected in (scout_hf.__version__, "torch", "transformers", "native code", "GPU"):
        assert expected in result.stdout


def test_the_command_line_starts_without_torch():
    code = "import sys, scout_hf.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
