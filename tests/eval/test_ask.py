"""`scout-hf read` and `scout-hf ask`: a text is read ahead once, and questions begin with what is on disk."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from scout_hf import PrefixStore
from scout_hf.cli import app
from scout_hf.errors import ConfigError
from scout_hf.eval.ask import opening, reading
from scout_hf.eval.ask.pace import Pace, in_words
from scout_hf.eval.ask.prompt import INTRODUCTION, begin_ids, end_ids, frame_of
from scout_hf.eval.ask.texts import texts_in
from scout_hf.eval.language.reference import reference_text
from scout_hf.eval.text import load_text_model
from scout_hf.prefix.reading import read_ahead

CHAT = (
    "{{ bos_token }}{% for one in messages %}<{{ one['role'] }}> {{ one['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TEXT = reference_text()[:3000]
QUESTION, NEW = "What is a name?", 12
EXACT = ["--set", "budget=none", "--set", "block_size=16"]
CHUNK, EVERY = 64, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The packaged text model with a chat template."""
    path = tmp_path_factory.mktemp("models") / "talker"
    model, tokenizer = load_text_model()
    tokenizer.chat_template, tokenizer.bos_token = CHAT, "<|endoftext|>"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def stock(folder, tokenizer):
    """What the model, not patched, says to a question about a text."""
    model = AutoModelForCausalLM.from_pretrained(folder)

    def answer(question=QUESTION, text=TEXT):
        ids = torch.tensor([begin_ids(tokenizer, text) + end_ids(tokenizer, question)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("scout_hf.patching.read_ahead", lambda *given: read_ahead(*given, chunk=CHUNK, every=EVERY))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a text, in which the usual store is too."""
    monkeypatch.setenv("SCOUT_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def told(done, code=0):
    """Answers and messages of a command that ended so."""
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout, done.stderr


def found(errors):
    return int(re.search(r"found (\d+) tokens in the store", errors)[1])


# -- the time that is left ------------------------------------------------------------------------------------------


def cost(first, last, a=0.01, b=1e-5):
    """Seconds where a token at place p takes a + b p."""
    return a * (last - first) + b * (last**2 - first**2) / 2


@pytest.mark.parametrize("skipped", [0, 4096])
def test_the_rest_grows_with_the_square_of_the_length(skipped):
    """Also where the store had the beginning, and with chunks of several lengths."""
    pace = Pace()
    ends = [skipped, *(skipped + each for each in (512, 1024, 1100, 1612))]
    assert pace.seconds(0, 10) is None
    for first, last in zip(ends, ends[1:]):
        pace.add(first, last, cost(first, last))
    assert pace.seconds(ends[-1], 32768) == pytest.approx(cost(ends[-1], 32768))
    assert pace.seconds(ends[-1], 32768) > 3 * (cost(skipped, ends[-1]) / (ends[-1] - skipped)) * (32768 - ends[-1])


def test_one_chunk_tells_of_its_mean_and_a_slow_start_is_left_out():
    pace = Pace()
    pace.add(0, 100, 2.0)
    assert pace.seconds(100, 200) == pytest.approx(2.0)
    warm = Pace()
    warm.add(0, 100, 60.0)
    for first in (100, 200, 300):
        warm.add(first, first + 100, cost(first, first + 100))
    assert warm.seconds(400, 900) == pytest.approx(cost(400, 900))


def test_what_noise_says_is_never_below_nothing():
    faster, origin = Pace(), Pace()
    for index, seconds in enumerate((9.0, 3.0, 2.0, 1.0)):
        faster.add(index * 10, index * 10 + 10, seconds)
    assert faster.seconds(40, 50) == pytest.approx(2.0)
    for index, seconds in enumerate((0.0, 0.0, 1.0, 5.0)):
        origin.add(index * 10, index * 10 + 10, seconds)
    assert origin.seconds(0, 10) >= 0 and origin.seconds(40, 50) > origin.seconds(30, 40) > 0


def test_times_are_said_as_people_say_them():
    assert [in_words(each) for each in (0.2, 59.4, 61, 3599, 3660)] == [
        "0 s", "59 s", "1 min 1 s", "59 min 59 s", "1 h 1 min",
    ]  # fmt: skip


# -- the prompt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_all_questions_share_the_beginning_and_nothing_is_lost(tokenizer, plain):
    frame, begin = frame_of(tokenizer, plain), begin_ids(tokenizer, TEXT, plain)
    assert frame.head.endswith(INTRODUCTION) and frame.head.startswith(INTRODUCTION if plain else "<|endoftext|><user>")
    for question in (QUESTION, "", " a"):
        whole = tokenizer.decode(begin + end_ids(tokenizer, question, plain))
        assert whole == f"{frame.head}{TEXT}{frame.middle}{question}{frame.end}"
    head = len(begin) - len(tokenizer(TEXT).input_ids)
    assert begin_ids(tokenizer, TEXT, plain, most=5) == begin[: head + 5]


def test_what_looks_like_a_special_token_in_a_text_is_text(tokenizer):
    (special,) = tokenizer("<|endoftext|>").input_ids
    text, question = "Ends <|endoftext|> here.", "<|endoftext|>?"
    whole = begin_ids(tokenizer, text) + end_ids(tokenizer, question)
    assert whole.count(special) == 1 == whole[:1].count(special)  # that of the template
    assert text in tokenizer.decode(whole) and question in tokenizer.decode(whole)


def test_a_template_with_the_date_gives_the_same_text_tomorrow(tokenizer, monkeypatch):
    dated = "Today: {{ strftime_now('%d %b %Y') }} {{ date_string }} {{ messages[0]['content'] }}"
    monkeypatch.setattr(tokenizer, "chat_template", dated)
    assert frame_of(tokenizer).head.startswith("Today: 26 Jul 2024 26 Jul 2024 ")


@pytest.mark.parametrize(
    "template", ["no text", "{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_cannot_be_used_is_told(tokenizer, template, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ConfigError, match="try --plain"):
        frame_of(tokenizer)
    assert frame_of(tokenizer, plain=True).head == INTRODUCTION


def test_the_first_token_of_a_tokenizer_without_a_template(tokenizer):
    class Beginning:
        bos_token_id, chat_template = 7, None

        def __call__(self, text, add_special_tokens=True, **options):
            ids = tokenizer(text, add_special_tokens=False).input_ids if text else []
            return type("Encoded", (), {"input_ids": [7] * add_special_tokens + ids})

    assert begin_ids(Beginning(), TEXT)[:2] == [7, begin_ids(tokenizer, TEXT, plain=True)[0]]


# -- reading and asking ---------------------------------------------------------------------------------------------


def test_what_was_read_is_found_and_answered_as_by_stock(place, folder, tokenizer, stock, small_pieces):
    tokens = len(begin_ids(tokenizer, TEXT))
    whole = tokens // 16 * 16
    out, _ = told(call("read", folder, "text.txt", "--store", "st", *EXACT))
    assert f"text.txt: found 0 tokens, read {whole} in " in out and f"; {whole} of {tokens} tokens are kept, " in out
    out, errors = told(call("ask", folder, QUESTION, "--store", "st", "--new-tokens", NEW))
    assert out.strip() == stock().strip()
    assert found(errors) == whole and f"read {tokens - whole}\n" in errors
    assert re.search(rf"first token after [\d.]+ s, {NEW} tokens at [\d.]+ tokens/s", errors)
    # By its name, by its file, and read again.
    for text in ("text.txt", place / "text.txt"):
        out, errors = told(call("ask", folder, QUESTION, "--store", "st", "--text", text, "--new-tokens", NEW))
        assert out.strip() == stock().strip() and found(errors) == whole
    out, _ = told(call("read", folder, "text.txt", "--store", "st", *EXACT))
    assert f"text.txt: found {whole} tokens, read 0 in 0 s; " in out
    assert len(PrefixStore("st").segments()) == -(-whole // EVERY)  # nothing of the questions


def test_asking_reads_what_is_not_there_and_several_questions_share_it(place, folder, stock):
    questions = (QUESTION, "Why?")
    out, errors = told(call("ask", folder, *questions, "--text", "text.txt", "--new-tokens", NEW, *EXACT))
    assert out.split() == " ".join(map(stock, questions)).split()
    assert found(errors) == 0 and all(f"> {question}\n" in errors for question in questions)
    _, errors = told(call("ask", folder, QUESTION, "--new-tokens", 1))
    assert found(errors) > 500 and "1 tokens" in errors and Path("cache/store").is_dir()


def test_the_text_that_was_used_last_is_asked_about(place, folder):
    Path("other.txt").write_text("Another text. " * 20)
    told(call("read", folder, "text.txt", "other.txt"))
    _, errors = told(call("ask", folder, QUESTION, "--new-tokens", 1))
    assert errors.startswith("other.txt: ")
    told(call("ask", folder, QUESTION, "--new-tokens", 1, "--text", "text.txt"))
    _, errors = told(call("ask", folder, QUESTION, "--new-tokens", 1))
    assert errors.startswith("text.txt: ")


def test_together_by_name_from_the_standard_input_and_plain(place, folder, tokenizer):
    Path("b.txt").write_text("The second.")
    told(call("read", folder, "text.txt", "b.txt", "--together", "--name", "both", "--plain"))
    done = CliRunner().invoke(app, ["read", str(folder), "-", "--tokens", "100"], input=TEXT)
    assert "standard input: found 0 tokens" in told(done)[0]
    both, piped = sorted(texts_in(PrefixStore("cache/store")), key=lambda one: one.name)
    assert tokenizer.decode(both.ids) == f"{INTRODUCTION}{TEXT}\n\nThe second." and both.name == "both" and both.plain
    assert piped.ids == begin_ids(tokenizer, TEXT, most=100)
    _, errors = told(call("ask", folder, QUESTION, "--new-tokens", 1, "--text", "both"))
    assert found(errors) == len(both.ids) // 32 * 32


def test_a_name_stays_when_the_text_is_asked_by_its_file(place, folder):
    told(call("read", folder, "text.txt", "--name", "novel"))
    for text in ("text.txt", "novel"):
        assert found(told(call("ask", folder, QUESTION, "--new-tokens", 1, "--text", text))[1]) > 500
    assert [one.name for one in texts_in(PrefixStore("cache/store"))] == ["novel"]


def test_dtype_and_settings_of_the_reading_are_those_of_the_asking(place, folder):
    told(call("read", folder, "text.txt", "--dtype", "bfloat16", "--set", "block_size=64"))
    for more in ([], ["--text", place / "text.txt"], ["--set", "budget=256"]):
        _, errors = told(call("ask", folder, QUESTION, "--new-tokens", 1, *more))
        assert found(errors) > 500 and found(errors) % 64 == 0
    _, errors = told(call("ask", folder, QUESTION, "--new-tokens", 1, "--text", "./text.txt", "--dtype", "float32"))
    assert found(errors) == 0
    (wrong,) = told(call("ask", folder, QUESTION, "--text", "text.txt", "--dtype", "x"), 2)[1].splitlines()
    assert "--dtype x is not allowed: a dtype of torch, such as float32" in wrong


def test_an_unlisted_text_is_asked_about_with_its_file(place, folder):
    told(call("read", folder, "text.txt", "--unlisted"))
    _, errors = told(call("ask", folder, QUESTION), 2)
    assert "no text was read with" in errors and "the store has no texts; try scout-hf read" in errors
    assert not list(Path("cache/store").glob("texts/*"))
    # Listed from then on.
    assert found(told(call("ask", folder, QUESTION, "--text", "text.txt", "--new-tokens", 1))[1]) > 500
    assert found(told(call("ask", folder, QUESTION, "--new-tokens", 1))[1]) > 500


def test_a_reading_that_was_interrupted_goes_on(place, folder, tokenizer, small_pieces, monkeypatch):
    tokens = len(begin_ids(tokenizer, TEXT))

    @contextlib.contextmanager
    def stops_at(name, total, at=192):
        def tick(there):
            if there == at:
                raise KeyboardInterrupt

        yield tick

    with monkeypatch.context() as once:
        once.setattr(reading, "progress", stops_at)
        out, errors = told(call("read", folder, "text.txt", *EXACT), 130)
    assert not out and errors == (
        f"text.txt: stopped at 192 of {tokens} tokens, which are kept; the same command goes on from there\n"
    )
    assert f"192 of {tokens}" in told(call("session", "ls"))[0]
    out, _ = told(call("read", folder, "text.txt", *EXACT))
    assert f"found 192 tokens, read {tokens // 16 * 16 - 192} in" in out


def test_the_bar_says_how_long_it_will_take(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(opening.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(opening.tqdm, "set_postfix_str", lambda bar, text, refresh: said.append(text))
    with opening.progress("text", 8192) as tick:
        for there in range(0, 4096, 512):
            now[0] += cost(there - 512, there) if there else 3.0
            tick(there)
    assert (
        said[-1] == f"about {in_words(cost(3584, 8192))} left"
        and said[0] == f"about {in_words(15 * cost(0, 512))} left"
    )


def test_what_is_wrong_is_told_before_a_model_is_loaded(place, folder):
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("Café".encode("latin-1"))
    Path("more").mkdir()
    Path("more/text.txt").write_text("x")
    wrong = {
        ("read", "no/model", "no.txt"): "no.txt is not there, or no file",
        ("read", "no/model", "more"): "more is not there, or no file",
        ("read", "no/model", "empty.txt"): "empty.txt is empty; give a file with a text",
        ("read", "no/model", "latin.txt"): "latin.txt is no text in UTF-8 (byte 3); convert it first",
        ("read", "no/model", "text.txt", "text.txt"): "a TEXT is named twice",
        ("read", "no/model", "text.txt", "more/text.txt"): "two texts have the name text.txt",
        ("read", "no/model", "text.txt", "latin.txt", "--name", "x"): "--name x is for one text, and there are 2",
        ("read", "no/model", "text.txt", "--store-limit", "much"): "--store-limit much is not allowed: bytes, such as",
        ("read", "no/model", "text.txt", "--set", "block_size=0"): "block_size=0",
        ("read", "no/model", "text.txt", "--store", "text.txt"): "--store text.txt cannot be used",
        ("ask", "no/model", " "): "a question is empty (' ')",
        ("ask", "no/model", QUESTION, "--text", "no.txt"): "there is no file no.txt, and no text of that name was read",
        ("ask", "no/model", QUESTION, "--text", "more"): "--text more is no file",
        ("ask", "./no/model", QUESTION, "--text", "text.txt"): "./no/model is not the folder of a model",
        ("read", "./no/model", "text.txt"): "./no/model is not the folder of a model",
    }
    for words, expected in wrong.items():
        _, errors = told(call(*words), 2)
        assert errors.startswith("error: ") and expected in errors and errors.count("\n") == 1, (words, errors)


def test_texts_that_do_not_fit_are_refused(place, folder, tokenizer, monkeypatch):
    _, errors = told(call("read", folder, "text.txt", "--store-limit", "100KB"), 2)
    asked = re.search(
        r"take about [\d.]+ MiB, and the store is limited to 97.7 KiB; try --store-limit (\d+MiB)", errors
    )
    told(call("read", folder, "text.txt", "--store-limit", asked[1]))
    Path("long.txt").write_text(TEXT * 40)
    _, errors = told(call("read", folder, "long.txt"), 2)
    most = re.search(r"long.txt has \d+ tokens and 64 for .* made for 16384: try --tokens (\d+)", errors)[1]
    assert 15000 < int(most) < 16384 - 64
    _, errors = told(call("ask", folder, QUESTION, "--text", "long.txt"), 2)
    assert "try --tokens" in errors
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    told(call("read", folder, "text.txt"))  # which is there already
    _, errors = told(call("read", folder, "text.txt", "--store", "x"), 2)
    assert "the rest of text.txt takes about " in errors and "has 1000 bytes free; try another --store" in errors


def test_other_weights_and_other_models_do_not_take_a_text(place, folder, tmp_path):
    told(call("read", folder, "text.txt"))
    _, errors = told(call("ask", "other/model", QUESTION), 2)
    assert "no text was read with other/model" in errors and f"there is text.txt with {folder}" in errors
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data += 1
    changed = tmp_path / "changed"
    model.save_pretrained(changed)
    AutoTokenizer.from_pretrained(folder).save_pretrained(changed)
    (one,) = Path("cache/store/texts").glob("*.json")
    one.write_text(json.dumps(json.loads(one.read_text()) | {"model": str(changed)}))
    _, errors = told(call("ask", changed, QUESTION), 2)
    assert "text.txt was read with other weights than" in errors and "--text" in errors
    one.write_text(one.read_text()[:-20])
    assert "the store has no texts" in told(call("ask", changed, QUESTION), 2)[1]


def test_damage_is_read_again(place, folder, stock, small_pieces):
    """It shows when the text is attended: in the pass of the question, or of what is read behind it."""
    told(call("read", folder, "text.txt", *EXACT))
    for again in ("ask", "read"):
        second = sorted(PrefixStore("cache/store").segments(), key=lambda one: one.first)[1]
        data = bytearray((second.path / "pages.safetensors").read_bytes())
        data[-1] ^= 1
        (second.path / "pages.safetensors").write_bytes(data)
        if again == "ask":
            out, errors = told(call("ask", folder, QUESTION, "Why?", "--new-tokens", NEW))
            assert out.split() == f"{stock()} {stock('Why?')}".split()
            assert [int(each) for each in re.findall(r"found (\d+) tokens", errors)][1:] == [128]
        else:
            Path("text.txt").write_text(TEXT + TEXT)
            out, errors = told(call("read", folder, "text.txt", *EXACT))
            assert "text.txt: found 128 tokens" in out
        assert errors.count("is damaged: ") == 1 and "it was removed, and is read again" in errors


def test_a_store_that_cannot_be_written_to_serves_questions(place, folder, monkeypatch):
    told(call("read", folder, "text.txt"))

    def fails(*given, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("scout_hf.eval.ask.texts.write_text", fails)
    for text in ([], ["--text", place / "text.txt"]):
        _, errors = told(call("ask", folder, QUESTION, "--new-tokens", 1, *text))
        assert found(errors) > 500 and "text.txt could not be listed in the store: " in errors


def test_names_are_shown_as_they_are_and_notes_are_private(place, folder):
    odd = Path("a\x1b[31m\udcff.txt")
    odd.write_text(TEXT)
    out, _ = told(call("read", folder, odd))
    assert out.startswith("a?[31m?.txt: found 0")
    (one,) = texts_in(PrefixStore("cache/store"))
    assert one.name == "a?[31m?.txt"
    assert one.path.stat().st_mode & 0o077 == one.path.parent.stat().st_mode & 0o077 == 0
