"""`scout-hf serve`: transformers' own server with a patched model, asked by the client of openai over the network."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from scout_hf.cli import app
from scout_hf.errors import ConfigError
from scout_hf.eval.options import Serve
from scout_hf.eval.text import load_text_model

pytest.importorskip("transformers.cli.serving", reason="this transformers has another server")
openai, uvicorn = pytest.importorskip("openai"), pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from scout_hf.eval.serve import command  # noqa: E402
from scout_hf.eval.serve.app import make_app  # noqa: E402
from scout_hf.eval.serve.generating import EndsWithItsRequest  # noqa: E402
from scout_hf.eval.serve.models import PatchedModel  # noqa: E402

CHAT = (
    "{% for one in messages %}<{{ one['role'] }}> {{ one['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
QUESTIONS = ("What does the with statement do?", "How are names resolved in a class?")
TOKENS, BLOCK = 24, 16
ENDLESS = {"generation_config": json.dumps({"max_new_tokens": 4000, "min_new_tokens": 4000, "do_sample": False})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The packaged text model, which talks to nobody, with a chat template."""
    path = tmp_path_factory.mktemp("models") / "talker"
    model, tokenizer = load_text_model()
    tokenizer.chat_template = CHAT
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(folder):
    """What ``generate()`` of the model, not patched, says to a list of messages or to a text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def answer(asked, tokens=TOKENS):
        if isinstance(asked, str):
            ids = tokenizer(asked, return_tensors="pt").input_ids
        else:
            options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            ids = tokenizer.apply_chat_template(asked, **options)["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


class Running:
    """A server in a thread of this process, as the command makes it."""

    def __init__(self, **options):
        self.options = Serve(
            **({"device": "cpu", "port": 0, "budget": "none", "set": [f"block_size={BLOCK}"]} | options)
        )
        config, store = command.config_of(self.options), command.store_of(self.options)
        self.models = command.load(self.options, config, store, lambda line: None)
        self.name, self.model = self.options.model, self.models.handle.model

    def __enter__(self):
        listening = command.listen("127.0.0.1", 0)
        self.address = command.address(listening)
        self._server = uvicorn.Server(
            uvicorn.Config(make_app(self.models), timeout_graceful_shutdown=1, log_level="error")
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]})
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *error):
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, **options)

    def chat(self, question, **options):
        messages = question if isinstance(question, list) else said(question)
        asked = {"model": self.name, "messages": messages, "max_tokens": TOKENS} | options
        return self.client().chat.completions.create(**asked)

    def stats(self):
        with urllib.request.urlopen(f"{self.address}/stats") as page:
            return json.load(page)


def said(question):
    return [{"role": "user", "content": question}]


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def running(folder):
    with Running(model=str(folder)) as running:
        yield running


@pytest.fixture
def fresh(running):
    running.models.handle.reset_stats()
    return running


# -- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_stock_and_came_through_the_patch(fresh, stock):
    answer = fresh.chat(QUESTIONS[0])
    assert answer.choices[0].message.content == stock(said(QUESTIONS[0])) != ""
    stats = fresh.stats()
    assert stats["steps"] == answer.usage.completion_tokens - 1 > 10
    assert stats["prefill_tokens"] == answer.usage.prompt_tokens and stats["stock_passes"] == {}
    assert stats == json.loads(json.dumps(fresh.models.handle.stats().to_dict()))


def test_a_stream_says_the_same_piece_by_piece(fresh, stock):
    pieces = [chunk.choices[0].delta.content or "" for chunk in fresh.chat(QUESTIONS[0], stream=True)]
    assert "".join(pieces) == stock(said(QUESTIONS[0])) and len([piece for piece in pieces if piece]) > 5
    assert fresh.stats()["steps"] > 10 and fresh.stats()["stock_passes"] == {}


def test_a_conversation_goes_on(running, stock):
    messages = said(QUESTIONS[0])
    for question in (QUESTIONS[1], "And then?"):
        answer = running.chat(messages).choices[0].message.content
        assert answer == stock(messages)
        messages = [*messages, {"role": "assistant", "content": answer}, *said(question)]


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_and_completions_are_patched_too(fresh, stock, streamed):
    client, expected = fresh.client(), stock(said(QUESTIONS[1]))
    asked = {"model": fresh.name, "input": QUESTIONS[1], "max_output_tokens": TOKENS, "stream": streamed}
    response = client.responses.create(**asked)
    text = response.output_text if not streamed else "".join(getattr(event, "delta", "") for event in response)
    assert text == expected
    asked = {"model": fresh.name, "prompt": QUESTIONS[1], "max_tokens": TOKENS, "stream": streamed}
    done = client.completions.create(**asked)
    assert "".join(part.choices[0].text for part in (done if streamed else [done])) == stock(QUESTIONS[1])
    assert fresh.stats()["steps"] > 20 and fresh.stats()["stock_passes"] == {}


def test_clients_at_once_get_each_their_own_answer(fresh, stock):
    questions = [*QUESTIONS, "Why?", "What is a generator?"]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = [done.choices[0].message.content for done in pool.map(fresh.chat, questions)]
    assert answers == [stock(said(question)) for question in questions] and len(set(answers)) > 2
    assert fresh.stats()["stock_passes"] == {} and fresh.stats()["alive_caches"] <= 1


def test_a_request_of_stock_attention_is_answered_and_told(fresh, stock):
    """Nothing that clients send is lost: what cannot use a ScoutCache is as in transformers, and counted."""
    config = {"max_new_tokens": TOKENS, "use_cache": False, "do_sample": False}
    done = fresh.chat(QUESTIONS[0], max_tokens=None, extra_body={"generation_config": json.dumps(config)})
    assert done.choices[0].message.content == stock(said(QUESTIONS[0]))
    assert fresh.stats()["steps"] == 0 and sum(fresh.stats()["stock_passes"].values()) == TOKENS


def test_a_request_that_fails_harms_no_other(fresh, stock):
    with pytest.raises(openai.InternalServerError):
        fresh.chat(QUESTIONS[0], max_tokens=0)
    assert fresh.chat(QUESTIONS[0]).choices[0].message.content == stock(said(QUESTIONS[0]))
    assert fresh.stats()["alive_caches"] == 0


# -- clients that go ------------------------------------------------------------------------------------------------


def ends_early(running, stock):
    """The next request is right, and comes while thousands of the tokens before it were never made."""
    assert running.chat(QUESTIONS[1]).choices[0].message.content == stock(said(QUESTIONS[1]))
    assert running.stats()["steps"] < 3000 and running.stats()["alive_caches"] <= 1


def test_a_stream_whose_client_goes_ends(fresh, stock):
    stream = fresh.chat(QUESTIONS[0], max_tokens=None, stream=True, extra_body=ENDLESS)
    for _ in range(5):
        next(stream)
    stream.close()
    ends_early(fresh, stock)


def test_an_answer_whose_client_goes_ends(fresh, stock):
    client = http.client.HTTPConnection(fresh.address.removeprefix("http://"))
    body = {"model": fresh.name, "messages": said(QUESTIONS[0]), **ENDLESS}
    client.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    until(lambda: fresh.models.handle.stats().steps > 5)
    client.close()
    ends_early(fresh, stock)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_before_its_turn_costs_nothing(fresh, stock, streamed):
    first = fresh.chat(QUESTIONS[0], max_tokens=None, stream=True, extra_body=ENDLESS)
    next(first), next(first)
    until(lambda: fresh.models.handle.stats().steps > 0)
    read = fresh.models.handle.stats().prefill_tokens
    with contextlib.suppress(openai.APITimeoutError):
        client = fresh.client(timeout=0.5)
        waiting = client.chat.completions.create(
            model=fresh.name, messages=said("why " * 500), stream=streamed, extra_body=ENDLESS
        )
        for _ in waiting:
            pass
    first.close()
    ends_early(fresh, stock)
    assert fresh.models.handle.stats().prefill_tokens < read + 100


def test_a_request_that_ends_before_its_stream_begins_ends_too(running, folder):
    """The server's own care begins with the first piece; a request may be gone before that."""
    model, tokenizer = running.model, AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig(**json.loads(ENDLESS["generation_config"]))
    manager, streamers = EndsWithItsRequest(), []

    async def request():
        inputs = tokenizer(QUESTIONS[0], return_tensors="pt")
        streamers.append(manager.generate_streaming(model, tokenizer, inputs, config, request_id="one")[1])

    async def server():
        await asyncio.create_task(request())
        await asyncio.wrap_future(manager.submit(lambda: None))  # behind it

    asyncio.run(server())
    assert streamers[0].total_tokens < 3000


# -- the store ------------------------------------------------------------------------------------------------------


def test_the_next_turn_reads_only_what_is_new(folder, stock, tmp_path):
    messages = said("Read this. " + "The with statement is used with context managers. " * 20)
    with Running(model=str(folder), store=tmp_path) as running:
        first = running.chat(messages)
        messages += [{"role": "assistant", "content": first.choices[0].message.content}, *said(QUESTIONS[1])]
        running.models.handle.reset_stats()
        second = running.chat(messages)
        stats = running.stats()
    assert second.choices[0].message.content == stock(messages)
    assert stats["found_tokens"] + stats["prefill_tokens"] == second.usage.prompt_tokens
    assert first.usage.total_tokens - 2 * BLOCK <= stats["found_tokens"] > 100
    with Running(model=str(folder), store=tmp_path) as running:  # which survives the server
        again = running.chat(messages)
        assert again.choices[0].message.content == stock(messages)
        assert running.stats()["prefill_tokens"] <= 2 * BLOCK and running.stats()["stock_passes"] == {}


def test_what_a_sparse_answer_left_is_read_again(folder, tmp_path):
    messages = said("Read this. " + "The with statement is used with context managers. " * 20)
    with Running(model=str(folder), store=tmp_path, budget="64") as running:
        first = running.chat(messages)
        assert running.stats()["attended_tokens"] < running.stats()["context_tokens"] / 2
        messages += [{"role": "assistant", "content": first.choices[0].message.content}, *said(QUESTIONS[1])]
        running.chat(messages)
        assert first.usage.prompt_tokens - BLOCK <= running.stats()["found_tokens"] <= first.usage.prompt_tokens


def test_clients_at_once_share_what_one_of_them_read(folder, stock, tmp_path):
    document = "The with statement is used with context managers. " * 20
    questions = [f"{document} {question}" for question in (*QUESTIONS, "Why?")]
    with Running(model=str(folder), store=tmp_path) as running, ThreadPoolExecutor(3) as pool:
        answers = [done.choices[0].message.content for done in pool.map(running.chat, questions)]
        assert answers == [stock(said(question)) for question in questions]
        assert running.stats()["found_tokens"] > 2 * running.stats()["prefill_tokens"] / 3


def test_what_was_read_for_a_client_that_went_is_kept(folder, stock, tmp_path):
    question = "The with statement is used with context managers. " * 20
    with Running(model=str(folder), store=tmp_path) as running:
        stream = running.chat(question, max_tokens=None, stream=True, extra_body=ENDLESS)
        for _ in range(3):
            next(stream)
        stream.close()
        answer = running.chat(question)
        assert answer.choices[0].message.content == stock(said(question))
        assert running.stats()["found_tokens"] > answer.usage.prompt_tokens - 2 * BLOCK


# -- the one model --------------------------------------------------------------------------------------------------


def test_the_model_has_the_name_that_was_given(running):
    with pytest.raises(openai.BadRequestError) as refused:
        running.chat("Hello", model="another/model")
    assert f"pinned to '{running.name}'" in refused.value.response.text
    if hasattr(running.models, "list_models"):  # since 5.24
        assert [one.id for one in running.client().models.list()] == [running.name]


def test_a_packaged_model_goes_by_its_short_name(folder, stock):
    models = PatchedModel("smollm2-135m", str(folder), patching, device="cpu")
    try:
        assert models.process_model_name("smollm2-135m") == models.process_model_name(str(folder))
        assert models.force_model == "smollm2-135m" and models.handle is not None
    finally:
        models.shutdown()


def patching(model):
    import scout_hf

    return scout_hf.patch(model, budget=None)


def post(running, path, **body):
    request = urllib.request.Request(
        f"{running.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as page:
        return page.read().decode()


def test_no_other_model_is_loaded(running):
    told = post(running, "/load_model", model="another/model")
    assert '"status": "error"' in told and "is not served" in told
    assert '"status": "ready"' in post(running, "/load_model", model=running.name)
    assert len(running.models.loaded_models) == 1


def test_an_unloaded_model_is_not_patched_and_a_loaded_one_is(folder, stock):
    with Running(model=str(folder)) as running:
        first = running.model
        assert "_scout_handle" in first.__dict__
        post(running, "/reset")
        assert "_scout_handle" not in first.__dict__ and running.models.handle is None and running.stats() == {}
        assert running.chat(QUESTIONS[0]).choices[0].message.content == stock(said(QUESTIONS[0]))
        assert running.models.handle.model is not first and running.stats()["steps"] > 10


def test_the_end_of_the_server_removes_the_patch_also_while_it_answers(folder):
    with Running(model=str(folder)) as running:
        stream = running.chat(QUESTIONS[0], max_tokens=None, stream=True, extra_body=ENDLESS)
        for _ in range(3):
            next(stream)
    stream.close()
    assert "_scout_handle" not in running.model.__dict__ and running.models.handle is None
    assert not running.models.loaded_models


# -- the command ----------------------------------------------------------------------------------------------------


def test_settings_are_those_of_patch():
    config = command.config_of(Serve("m", budget="0.25", split="cpu", set=["block_size=16", "mass=0.9"]))
    assert (config.budget, config.split, config.block_size, config.mass) == (0.25, "cpu", 16, 0.9)
    assert command.config_of(Serve("m", budget="none")).budget is None
    assert command.config_of(Serve("m")) == command.ScoutConfig()


WRONG = {
    "No such option": ["--speed", "9"],
    "nonsense": ["--set", "nonsense=1"],
    "leave one out": ["--budget", "64", "--set", "budget=128"],
    "budget=-3 is not allowed": ["--budget", "-3"],
    "with 2 values": ["--set", "block_size=16,32"],
    "is not the folder of a model": [],
    "--store-limit 1GiB is of a store": ["--store-limit", "1GiB"],
    "--store-limit plenty is not allowed": ["--store", "kept", "--store-limit", "plenty"],
    "--store /dev/null/kept cannot be used": ["--store", "/dev/null/kept"],
    "--host 192.0.2.1 --port 8000 cannot be listened at": ["--host", "192.0.2.1", "--port", "8000"],
}


@pytest.mark.parametrize("told", WRONG)
def test_what_is_wrong_is_told_in_a_line(told, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "no"), "--port", "0", *WRONG[told]])
    assert done.exit_code == 2 and told in done.output
    assert "Usage" in done.output or (done.output.startswith("error: ") and done.output.count("\n") == 1)


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port} cannot be listened at"):
            command.run(Serve(str(tmp_path / "no"), port=port), print)


def test_a_model_that_cannot_be_served_leaves_a_free_port(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0", "--device", "cpu"])
    assert done.exit_code == 2 and f"{tmp_path} cannot be served" in done.output.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_command_serves_until_it_is_interrupted(folder, stock):
    words = [sys.executable, "-c", "from scout_hf.cli import app; app(prog_name='scout-hf')", "serve", str(folder)]
    words += ["--port", "0", "--device", "cpu", "--budget", "none", "--threads", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, bufsize=1) as server:
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if "startup complete" in line:
                    break
            (url,) = re.findall(r"is served at (http://127.0.0.1:\d+/v1)", "".join(lines))
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            asked = {"model": str(folder), "messages": said(QUESTIONS[0])}
            answer = client.chat.completions.create(**asked, max_tokens=TOKENS).choices[0].message.content
            assert answer == stock(said(QUESTIONS[0]))
            server.send_signal(signal.SIGINT)
            rest = server.stderr.read()
            assert server.wait(20) == 0 and "Application shutdown complete" in rest and "Traceback" not in rest
        finally:
            server.kill()


PAGE = Path(__file__).parents[2] / "docs" / "guides" / "serving.md"


def test_the_guide_runs_as_it_is_written(running, capsys):
    code = "".join(re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S))
    assert code.count("http://127.0.0.1:8000") >= 1 and '"smollm2-135m"' in code
    code = code.replace("http://127.0.0.1:8000", running.address).replace('"smollm2-135m"', repr(running.name))
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.strip()
