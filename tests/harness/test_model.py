"""The model class: HFLM's answers where everything is attended, decode-path scores, middle truncation, arguments."""

import json
import math

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import scout_hf  # noqa: E402
from scout_hf import ConfigError, RecallIntervals  # noqa: E402
from scout_hf.eval.harness import ScoutLM  # noqa: E402
from scout_hf.eval.harness.model import truncate  # noqa: E402
from scout_hf.eval.harness.tally import Tally  # noqa: E402
from scout_hf.eval.pocket import load_pocket, make_document, questions  # noqa: E402

SPARSE = {"budget": 64, "block_size": 16, "window": 16}


def requests(kind: str, *arguments: tuple, task: str = "task") -> list[Instance]:
    return [Instance(kind, {}, each, index, (task, index, 1)) for index, each in enumerate(arguments)]


def choices() -> list[tuple[str, str]]:
    """Five answers each to questions about documents of unequal length, an empty context, and one-word contexts."""
    asked = []
    for tokens in (330, 260, 180):
        document = make_document(tokens, 8, seed=tokens)
        prompt = questions(document)[1][0]
        asked += [(prompt, f" {fact.answer}") for fact in document.facts[:4]] + [(prompt, " seven")]
    return [*asked, ("", "the old baker walked"), ("the", " old baker"), ("the", " young baker"), ("<bos>", " the")]


@pytest.fixture(scope="module")
def stock(pocket_path):
    return HFLM(pretrained=pocket_path, device="cpu", dtype="float32", batch_size=4)


def scout(pocket_path, **options) -> ScoutLM:
    return ScoutLM(pretrained=pocket_path, **({"device": "cpu", "dtype": "float32", "batch_size": 4} | options))


def assert_close(found, expected, tolerance=2e-3):
    for (one, said), (other, wanted) in zip(found, expected, strict=True):
        assert math.isclose(one, other, abs_tol=tolerance), (found, expected)
        assert said == wanted


# -- log-likelihoods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"budget": None},
        {"budget": None, "batch_size": 32},
        {"budget": None, "split": "cpu", "layer_ahead": False, "resident": 64},
        {"budget": 64, "attention": "stock"},
        {"budget": 64, "scoring": "prefill"},
    ],
    ids=str,
)
def test_choices_are_scored_as_by_hflm(stock, pocket_path, options):
    expected = stock.loglikelihood(requests("loglikelihood", *choices()), disable_tqdm=True)
    found = scout(pocket_path, **options).loglikelihood(requests("loglikelihood", *choices()), disable_tqdm=True)
    assert_close(found, expected)
    assert {said for _, said in expected} == {True, False}


def test_choices_are_scored_by_sparse_steps(stock, pocket_path):
    lm = scout(pocket_path, **SPARSE)
    found = lm.loglikelihood(requests("loglikelihood", *choices()), disable_tqdm=True)
    expected = stock.loglikelihood(requests("loglikelihood", *choices()), disable_tqdm=True)
    apart = [abs(one[0] - other[0]) for one, other in zip(found, expected)]
    # Answers of three tokens, of one token, and contexts of one word, which have nothing to leave out.
    assert max(apart[:4]) > 0.01 and max(apart[4:15:5]) > 1e-3 and max(apart[15:]) < 2e-3
    cost = lm.get_model_info()["scout_hf"]["tasks"]["task"]
    assert 0.2 < cost["attended_share"] < 0.6 and cost["tokens_per_second"] > 0 and cost["kv_bytes"]["host"] > 0


def test_rolling_windows_are_scored_as_by_hflm(pocket_path):
    texts = [(make_document(tokens, 4, seed=tokens).text,) for tokens in (90, 70, 50)] + [("the",)]
    options = {"pretrained": pocket_path, "device": "cpu", "dtype": "float32", "batch_size": 3, "max_length": 40}
    expected = HFLM(**options).loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    for more in ({"budget": None}, {"attention": "stock"}, {"budget": 32, "scoring": "prefill"}):
        lm = ScoutLM(**options, **more)
        found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
        assert found == pytest.approx(expected, abs=2e-3)
    sparse = ScoutLM(**options, budget=8, block_size=8, window=0, sinks=0)
    found = sparse.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert abs(found[0] - expected[0]) > 0.01


def test_too_long_contexts_lose_what_truncation_says(pocket_path):
    document = make_document(200, 8, seed=3)
    assert document.facts[0].position < 40
    prompt, answer = questions(document)[0]
    pairs = requests("loglikelihood", (prompt, f" {answer}"))
    options = {"max_length": 100, "dtype": "float32", "device": "cpu", "batch_size": 1}
    expected = HFLM(pretrained=pocket_path, **options).loglikelihood(pairs, disable_tqdm=True)
    left = scout(pocket_path, budget=None, truncation="left", **options).loglikelihood(pairs, disable_tqdm=True)
    assert_close(left, expected)
    words = prompt.split()
    kept = " ".join([*words[:49], *words[-49:]])
    whole = HFLM(pretrained=pocket_path, device="cpu", dtype="float32")
    expected = whole.loglikelihood(requests("loglikelihood", (kept, f" {answer}")), disable_tqdm=True)
    for scoring in ("decode", "prefill"):
        lm = scout(pocket_path, budget=None, scoring=scoring, **options)
        assert_close(lm.loglikelihood(pairs, disable_tqdm=True), expected)


def test_a_continuation_longer_than_the_model_is_refused(pocket_path):
    lm = scout(pocket_path, budget=None, max_length=16)
    text = " " + " ".join(["old"] * 17)
    with pytest.raises(ValueError, match="continuation of 17 tokens does not fit: max_length is 16"):
        lm.loglikelihood(requests("loglikelihood", ("the", text)), disable_tqdm=True)
    # One token less leaves room for one of context.
    ((score, _),) = lm.loglikelihood(requests("loglikelihood", ("the", text[:-4])), disable_tqdm=True)
    assert score < 0


# -- generation -----------------------------------------------------------------------------------------------------


def generated(lm, prompts, task="task", **options) -> list[str]:
    options = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False} | options
    return lm.generate_until(
        requests("generate_until", *[(prompt, options) for prompt in prompts], task=task), disable_tqdm=True
    )


def test_generations_are_those_of_hflm_and_of_hflm_on_a_patched_model(stock, pocket_path):
    prompts = [questions(make_document(tokens, 8, seed=tokens))[2][0] for tokens in (300, 420, 350, 280, 310)]
    expected = generated(stock, prompts)
    lm = scout(pocket_path, budget=None)
    assert generated(lm, prompts) == expected
    cost = lm.get_model_info()["scout_hf"]["tasks"]["task"]
    assert cost["decode_tokens"] == 2 * len(prompts) and cost["attended_share"] == 1
    model, tokenizer = load_pocket()
    with scout_hf.patch(model, budget=None) as handle:
        assert generated(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2), prompts) == expected
        assert handle.stats().steps > 0
    assert generated(ScoutLM(pretrained=model, tokenizer=tokenizer, budget=None), prompts) == expected


def test_adapters_are_served_and_measured():
    peft = pytest.importorskip("peft")
    model, tokenizer = load_pocket()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config).eval()
    given = {"pretrained": adapted, "tokenizer": tokenizer, "batch_size": 2}
    prompts, pairs = ["the old baker walked", "what do they call the"], requests("loglikelihood", ("the", " old baker"))
    expected = generated(HFLM(**given), prompts), HFLM(**given).loglikelihood(pairs, disable_tqdm=True)
    lm = ScoutLM(**given, budget=None)
    assert generated(lm, prompts) == expected[0]
    assert_close(lm.loglikelihood(pairs, disable_tqdm=True), expected[1])
    assert lm.get_model_info()["scout_hf"]["tasks"]["task"]["decode_tokens"] == 2 * 2 + 2


def test_the_batch_size_is_found_once(pocket_path, monkeypatch):
    sizes = iter([3])
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda self, *rest: next(sizes))
    lm = scout(pocket_path, budget=None, batch_size="auto")
    for task in ("one", "two"):
        assert len(generated(lm, ["the old baker", "the young baker"], task)) == 2
    assert len(lm.loglikelihood(requests("loglikelihood", ("the", " old")), disable_tqdm=True)) == 1


def test_tasks_keep_their_own_tallies_and_answers_their_order(pocket_path):
    prompts = [questions(make_document(300 + 40 * number, 8, seed=number))[2][0] for number in range(4)]
    lm = scout(pocket_path, budget=None)
    options = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    mixed = [
        Instance("generate_until", {}, (prompt, options), 0, (("short", "long")[number % 2], number, 1))
        for number, prompt in enumerate(prompts)
    ]
    assert lm.generate_until(mixed, disable_tqdm=True) == [generated(lm, [prompt], "again")[0] for prompt in prompts]
    tasks = lm.get_model_info()["scout_hf"]["tasks"]
    assert set(tasks) == {"short", "long", "again"}
    assert tasks["short"]["decode_tokens"] == tasks["long"]["decode_tokens"] == 4
    assert tasks["again"]["decode_tokens"] == 8
    json.dumps(lm.get_model_info(), default=str)


def test_tallies_of_processes_and_of_request_types():
    first = Tally(10, 1.0, 20, 2.0, {"host": 5}, 5.0, 10.0)
    first.add(Tally(1, 0.5, 20, 3.0, {"host": 3, "digests": 3}, 5.0, 30.0), at_once=True)
    assert (first.prefill_seconds, first.decode_seconds, first.decode_tokens) == (1.0, 3.0, 40)
    assert first.kv_bytes == {"host": 3, "digests": 3} and first.as_dict()["attended_share"] == 0.25
    first.add(Tally(decode_seconds=1.0, kv_bytes={"host": 4}))
    assert first.as_dict()["tokens_per_second"] == 10 and first.kv_bytes == {"host": 3, "digests": 3}


@pytest.mark.parametrize(
    ("count", "limit", "how", "expected"),
    [
        (10, 10, "middle", list(range(10))),
        (10, 6, "middle", [0, 1, 2, 7, 8, 9]),
        (10, 7, "middle", [0, 1, 2, 7, 8, 9]),
        (10, 1, "middle", [9]),
        (10, 6, "left", [4, 5, 6, 7, 8, 9]),
    ],
)
def test_truncation_keeps_what_longbench_keeps(count, limit, how, expected):
    assert truncate(range(count), limit, how) == expected


@pytest.mark.parametrize(("truncation", "ones"), [("middle", 4), ("left", 2)])
def test_prompts_that_are_too_long_are_cut_row_by_row(pocket_path, truncation, ones):
    lm = scout(pocket_path, budget=None, truncation=truncation)
    strings = [" ".join(["one"] * 6 + ["two"] * 6), "three four", " ".join(["one"] * 3 + ["two"] * 5)]
    ids, mask = lm.tok_batch_encode(strings, left_truncate_len=8)
    rows = [lm.tokenizer.decode(row[real.bool()]) for row, real in zip(ids, mask)]
    assert rows[0].split() == ["one"] * ones + ["two"] * (8 - ones)
    assert rows[1:] == ["three four", strings[2]]
    assert mask[1].tolist() == [0] * 6 + [1] * 2 and (ids[1, :6] == lm.tokenizer.pad_token_id).all()


def test_rows_that_are_cut_are_padded_on_the_side_that_is_asked_for(pocket_path):
    lm = scout(pocket_path, budget=None)
    ids, mask = lm.tok_batch_encode([" ".join(["one"] * 12), "three four"], padding_side="right", left_truncate_len=8)
    assert mask.tolist() == [[1] * 8, [1] * 2 + [0] * 6]
    assert lm.tokenizer.decode(ids[1, :2]) == "three four" and (ids[1, 2:] == lm.tokenizer.pad_token_id).all()


def test_generate_cuts_the_middle_of_a_prompt(pocket_path):
    """The fact stands at the start: it survives the cut of the middle, and not a cut from the left."""
    filler = make_document(600, 1, seed=5).text
    prompt = f"they call the amber falcon seven kilo mango . {filler} what do they call the amber falcon"
    options = {"budget": None, "max_length": 300}
    assert generated(scout(pocket_path, **options), [prompt]) == ["seven kilo mango"]
    assert generated(scout(pocket_path, truncation="left", **options), [prompt]) != ["seven kilo mango"]


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 7}, "budget=7 is not allowed"),
        ({"block_size": 33}, "block_size=33"),
        ({"digest": "nonesuch"}, "nonesuch"),
        ({"dense_layers": (0, 77)}, "dense_layers=.*layers 0 to 5"),
        ({"bugdet": 2048}, "'bugdet' is unknown; 'budget'"),
        ({"truncation": True}, "truncation=True is not allowed: 'middle' or 'left'"),
        ({"scoring": "sparse"}, "scoring='sparse'"),
        ({"attention": "eager"}, "attention='eager'"),
        ({"recall": "nowhere.json"}, "recall='nowhere.json': there is no such file"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_before_weights_are_loaded(monkeypatch, pocket_path, options, message):
    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(ConfigError, match=message):
        scout(pocket_path, **options)


def test_other_arguments_reach_from_pretrained(pocket_path):
    lm = scout(pocket_path, attn_implementation="eager", budget=0.5, dense_layers=(0, 1), host_dtype="int8")
    assert "eager" in lm.model.config._attn_implementation
    assert (lm.scout_config.budget, lm.scout_config.dense_layers, lm.handle.exact) == (0.5, (0, 1), False)
    with pytest.raises(TypeError, match="nonesuch"):
        scout(pocket_path, nonesuch=1)


def test_a_saved_recall_profile_is_a_model_argument(pocket_path, tmp_path):
    path = tmp_path / "recall.json"
    RecallIntervals((3,) * 6, 0.12, "llama").save(path)
    lm = scout(pocket_path, recall=str(path), split="cpu")
    assert lm.scout_config.recall.intervals == (3,) * 6
    json.dumps(lm.get_model_info(), default=str)


def test_a_patched_model_object_is_not_patched_again():
    model, tokenizer = load_pocket()
    with scout_hf.patch(model), pytest.raises(scout_hf.PatchError, match="patched already"):
        ScoutLM(pretrained=model, tokenizer=tokenizer)


# -- whole evaluations ----------------------------------------------------------------------------------------------

CHOICE = """
task: pocket_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
PERPLEXITY = """
task: pocket_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
"""


@pytest.fixture
def local_tasks(tmp_path):
    rows = []
    for number in range(4):
        document = make_document(60, 4, seed=100 + number)
        answers = [fact.answer for fact in document.facts[:4]]
        rows.append({"text": questions(document)[number][0], "choices": answers, "label": number})
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("text", PERPLEXITY)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    return TaskManager(include_defaults=False, include_path=str(tmp_path))


def test_a_string_of_model_args_in_simple_evaluate(local_tasks, pocket_path, stock):
    def evaluate(model, model_args=None):
        results = lm_eval.simple_evaluate(
            model=model, model_args=model_args, tasks=["pocket_choice", "pocket_text"], task_manager=local_tasks,
            device="cpu", batch_size=4, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
        return results, [results["results"][f"pocket_{name}"] for name in ("choice", "text")]

    _, expected = evaluate(stock)
    assert expected[0]["acc,none"] == 1
    base = f"pretrained={pocket_path},dtype=float32"
    results, exact = evaluate("scout", f"{base},budget=None,dense_layers=2,layer_ahead=False,recall=0.5")
    assert exact[0]["acc,none"] == 1
    assert exact[1]["word_perplexity,none"] == pytest.approx(expected[1]["word_perplexity,none"], rel=1e-4)
    told = results["config"]["scout_hf"]
    assert told["exact"] and told["settings"]["dense_layers"] == 2 and told["settings"]["recall"] == 0.5
    assert set(told["tasks"]) == {"pocket_choice", "pocket_text"}
    _, sparse = evaluate("scout", f"{base},budget=16,block_size=16,window=0,sinks=0")
    exactly, lost = (
        abs(math.log(one[1]["word_perplexity,none"] / expected[1]["word_perplexity,none"])) for one in (exact, sparse)
    )
    assert lost > 1e-5 and lost > 10 * exactly


def test_torch_is_left_as_it_was(pocket_path):
    lm = scout(pocket_path, budget=None)
    lm.loglikelihood(requests("loglikelihood", ("the", " old")), disable_tqdm=True)
    assert torch.is_grad_enabled()
    assert len(lm.model._forward_pre_hooks) == 1, "only the patch's own hook stays"
