"""LongBench by lm-eval's own command line: local files, the hub's code path, and stock beside Scout."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import datasets  # noqa: E402

from scout_hf.eval.harness import HarnessError  # noqa: E402
from scout_hf.eval.harness.command import main  # noqa: E402
from scout_hf.eval.harness.longbench import local_tasks, read_local  # noqa: E402
from scout_hf.eval.harness.pocket_longbench import DATASETS, LONGBENCH_E, make_longbench  # noqa: E402

KINDS = {
    "hotpotqa": "qa_f1_score",
    "triviaqa": "qa_f1_score",
    "samsum": "rouge_score",
    "trec": "classification_score",
    "passage_retrieval_en": "retrieval_score",
    "passage_count": "count_score",
    "lcc": "code_sim_score",
    "passage_retrieval_zh": "retrieval_zh_score",
}
FEW = ("triviaqa", "trec", "passage_count")
ROWS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("longbench")
    make_longbench(folder, ROWS, tokens=384)
    return folder


@pytest.fixture(scope="module")
def much(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("longbench")
    make_longbench(folder, 20, tokens=384)
    return folder


def run(model, pocket_path, tasks, *options, out=None, batch=20, **model_args) -> int:
    given = ",".join(f"{name}={value}" for name, value in {"dtype": "float32", **model_args}.items())
    arguments = ["--model", model, "--model_args", f"pretrained={pocket_path},{given}", "--tasks", tasks]
    saving = ["--output_path", str(out), "--log_samples"] if out else []
    return main(["run", *arguments, "--device", "cpu", "--batch_size", str(batch), *saving, *map(str, options)])


def samples(folder: Path) -> dict[str, list[dict]]:
    """Rows by task, in the order of the file."""
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name.removeprefix("samples_").rsplit("_", 1)[0]] = sorted(rows, key=lambda row: row["doc_id"])
    return found


def answers(folder: Path) -> dict[str, list[str]]:
    return {task: [row["filtered_resps"][0] for row in rows] for task, rows in samples(folder).items()}


# -- the main run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "kinds"), [("data", FEW), pytest.param("much", KINDS, marks=pytest.mark.full)])
def test_stock_and_exact_scout_generate_the_same_on_every_row(given, kinds, request, pocket_path, tmp_path, capsys):
    """Several kinds of task, by lm-eval's own class, by ours unpatched and by ours at budget=None."""
    data = request.getfixturevalue(given)
    count = len((data / "trec.jsonl").read_text().splitlines())
    from lm_eval.tasks.longbench import _generate_config as stock
    from lm_eval.tasks.longbench import metrics

    tasks = ",".join(f"longbench_{name}" for name in kinds)
    local = ["--longbench-dir", data]
    assert run("hf", pocket_path, tasks, *local, out=tmp_path / "hf") == 0
    both = run("scout", pocket_path, tasks, *local, "--beside-stock", out=tmp_path / "both", budget=None)
    assert both == 0
    expected = answers(tmp_path / "hf")
    assert {task: len(rows) for task, rows in expected.items()} == {f"longbench_{name}": count for name in kinds}
    assert all(row.strip() for rows in expected.values() for row in rows)
    assert answers(tmp_path / "both" / "stock") == expected
    assert answers(tmp_path / "both" / "scout") == expected

    # Prompts, lengths and metrics are lm-eval's.
    for name in kinds:
        metric = KINDS[name]
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for row, sample in zip(rows, samples(tmp_path / "both" / "scout")[f"longbench_{name}"], strict=True):
            said = sample["filtered_resps"][0]
            prompt, options = sample["arguments"]["gen_args_0"].values()
            assert prompt == stock.dataset2prompt[name].format(context=row["context"], question=row["input"])
            assert options["max_gen_toks"] == stock.dataset2maxlen[name]
            score = max(
                getattr(metrics, metric)(said, answer, all_classes=row["all_classes"]) for answer in row["answers"]
            )
            assert sample["score"] == sample[metric] == pytest.approx(score)

    record = json.loads((tmp_path / "both" / "beside_stock.json").read_text())
    rows = {row["task"]: row for row in record["rows"]}
    assert set(rows) == set(expected)
    assert record["scout_hf"]["exact"] and record["scout_hf"]["settings"]["budget"] is None
    for row in rows.values():
        assert row["difference"] == 0 and row["metric"] == "score"
        assert row["cost"]["scout"]["attended_share"] == 1 and row["cost"]["stock"]["attended_share"] is None
        assert row["cost"]["scout"]["kv_bytes"]["host"] >= row["cost"]["stock"]["kv_bytes"]["stock"] > 0
        assert row["cost"]["scout"]["decode_tokens"] == row["cost"]["stock"]["decode_tokens"] > count
        assert row["cost"]["scout"]["tokens_per_second"] > 0
    # Three words of an answer among the 32 that are generated; one of eight classes, sometimes more of them.
    assert rows["longbench_triviaqa"]["scout"] > 0.15
    assert rows["longbench_trec"]["scout"] > 0.4
    shown = capsys.readouterr().out
    assert "stock attention and scout" in shown and "tok/s scout" in shown


def test_a_small_budget_shows_in_the_table(data, pocket_path, tmp_path):
    options = ["--longbench-dir", data, "--beside-stock", "--limit", 6, "--gen_kwargs", "max_gen_toks=5"]
    tiny = {"budget": 32, "block_size": 16, "window": 16}
    assert run("scout", pocket_path, "longbench_fewshot", *options, out=tmp_path, **tiny) == 0
    rows = {row["task"]: row for row in json.loads((tmp_path / "beside_stock.json").read_text())["rows"]}
    assert rows["longbench_triviaqa"]["difference"] < -0.1
    assert 0 < rows["longbench_triviaqa"]["cost"]["scout"]["attended_share"] < 0.5
    assert set(rows) == {"longbench_fewshot", "longbench_triviaqa", "longbench_trec", "longbench_samsum"}
    assert rows["longbench_fewshot"]["cost"] == {"stock": None, "scout": None}


# -- local files ----------------------------------------------------------------------------------------------------


def evaluated(data, pocket_path, tasks, tmp_path) -> set[str]:
    code = run("scout", pocket_path, tasks, "--longbench-dir", data, "--limit", 1, "--gen_kwargs", "max_gen_toks=2",
               out=tmp_path / "out")  # fmt: skip
    assert code == 0
    return {task.removeprefix("longbench_") for task in samples(tmp_path / "out")}


def test_groups_hold_what_exists_and_say_what_is_missing(data, pocket_path, tmp_path, capsys):
    assert evaluated(data, pocket_path, "longbench", tmp_path) == set(DATASETS)
    told = capsys.readouterr().err
    assert "longbench: not in" in told and "qasper.jsonl" in told and "lsht.jsonl" in told
    assert "hotpotqa.jsonl" not in told.split("longbench: not in")[1].splitlines()[0]
    assert "overrides existing" not in told and "Custom kwargs" not in told


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("longbench_e", {f"{name}_e" for name in LONGBENCH_E} - {"passage_count_e"}),
        ("longbench_tasks_e", {f"{name}_e" for name in LONGBENCH_E}),
        ("longbench_multi,longbench_lcc", {"hotpotqa", "dureader", "lcc"}),
    ],
)
def test_longbench_e_tags_and_lists(data, pocket_path, tmp_path, tasks, expected):
    """The stock group longbench_e leaves out two of its subgroups; the tag has all."""
    assert evaluated(data, pocket_path, tasks, tmp_path) == expected


def test_a_config_file_and_tasks_of_ones_own_work_too(data, pocket_path, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text(
        "task: mine\ntest_split: test\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}/trec.jsonl}}}}\n"
        "doc_to_text: '{{input}}'\ndoc_to_target: '{{answers[0]}}'\noutput_type: generate_until\n"
        "generation_kwargs: {max_gen_toks: 2, until: []}\nmetric_list: [{metric: exact_match}]\n"
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: scout\nmodel_args: {{pretrained: {pocket_path}, budget: null}}\ntasks: [mine, longbench_trec]\n"
        f"include_path: {tmp_path / 'own'}\ndevice: cpu\nlimit: 1\nlog_samples: true\n"
        f"output_path: {tmp_path / 'out'}\ngen_kwargs: {{max_gen_toks: 2}}\n"
    )
    assert main(["run", "--config", str(config), "--longbench-dir", str(data), "--beside-stock"]) == 0
    assert set(answers(tmp_path / "out" / "scout")) == {"mine", "longbench_trec"}
    assert (tmp_path / "out" / "beside_stock.json").is_file()


@pytest.mark.parametrize(
    ("line", "metric", "message"),
    [
        (b"{oops", "qa_f1", "line 3: it is not valid JSON"),
        (b"[1, 2]", "qa_f1", "line 3: a JSON object .* this is of type list"),
        (b'{"context": "c", "answers": ["a"]}', "qa_f1", "line 3: 'input' must be a string, it is None"),
        (b'{"input": "i", "context": 3, "answers": ["a"]}', "qa_f1", "line 3: 'context' must be a string, it is 3"),
        (b'{"input": "i", "context": "c", "answers": "a"}', "qa_f1", "line 3: 'answers' must be a list of strings"),
        (b'{"input": "i", "context": "c", "answers": []}', "qa_f1", "line 3: 'answers'.* at least one"),
        (b'{"input": "i", "context": "c", "answers": [7]}', "qa_f1", r"line 3: 'answers'.* it is \[7\]"),
        (b'{"input": "i", "context": "c", "answers": ["a"]}', "get_classification_with_score", "line 3: 'all_classes'"),
        (b'{"input": "i", "context": "c", "answers": ["4"]}', "get_retrieval_with_score", "line 3: .*Paragraph"),
        (b'{"input": "i", "context": "c", "answers": ["4"]}', "get_retrieval_zh_with_score", "line 3: 'answers'"),
        (b'{"input": "\xff"}', "qa_f1", "line 3: it is not UTF-8 text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, metric, message):
    good = {"input": "i", "context": "c", "answers": ["Paragraph 4, 段落4"], "all_classes": ["a"]}
    path = tmp_path / "trec.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(good).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(HarnessError, match=message) as failure:
        read_local(str(path), metric)
    assert str(path) in str(failure.value)


def test_rows_are_given_as_the_stock_tasks_want_them(tmp_path):
    row = {"question": "q", "context": "c\u2028d", "answers": ["a", "b"], "length": 3, "extra": {"no": "matter"}}
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text(json.dumps(row | {"input": "i"}, ensure_ascii=False) + "\n" + json.dumps(row), encoding="utf-8")
    rows = read_local(str(path), "qa_f1", pretrained="any")["test"]
    assert [one["question"] for one in rows] == ["i", "q"]
    assert rows[0]["answers"] == ["a", "b"] and rows[0]["context"] == "c\u2028d" and "extra" not in rows[0]
    path.write_text("\n")
    with pytest.raises(HarnessError, match="has no rows"):
        read_local(str(path), "qa_f1")


def test_missing_files_are_named(data, pocket_path, tmp_path, capsys):
    options = ["--longbench-dir", data]
    assert run("scout", pocket_path, "longbench_qasper", *options, budget=None) == 2
    told = capsys.readouterr().err
    assert f"there is no file {data}/qasper.jsonl" in told and "hotpotqa.jsonl" in told and "Traceback" not in told
    for folder, message in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "has none of LongBench's files")):
        assert run("scout", pocket_path, "longbench", "--longbench-dir", folder) == 2
        assert f"--longbench-dir {folder} {message}" in capsys.readouterr().err


def test_every_stock_task_has_a_local_twin_or_says_what_it_lacks(tmp_path):
    from lm_eval.tasks import TaskManager

    make_longbench(tmp_path, 1, 256)
    with local_tasks(tmp_path) as local:
        manager = TaskManager(include_path=str(local.folder))
        stock = [name for name in TaskManager().all_subtasks if name.startswith("longbench_")]
        assert len(stock) == 34
        for name in stock:
            source = str(manager.task_index[name].yaml_path)
            assert source.startswith(str(local.folder)), source
        assert len(local.missing["longbench"]) == 21 - len(DATASETS) and "longbench_lcc" not in local.missing
    assert not local.folder.exists()


# -- the hub --------------------------------------------------------------------------------------------------------


def test_longbench_by_name_asks_the_hub_for_every_data_set(data, pocket_path, monkeypatch, tmp_path):
    """Only the loader is replaced: everything up to it and after it is lm-eval's code for the hub."""
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name))
        lines = (data / "trec.jsonl").read_text().splitlines()[:2]
        rows = [
            {"question" if key == "input" else key: value for key, value in json.loads(line).items()} for line in lines
        ]
        for row in rows:
            row["answers"] = [f"Paragraph 3 段落3 {row['answers'][0]}"]
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = ["--limit", 2, "--gen_kwargs", "max_gen_toks=2"]
    assert run("scout", pocket_path, "longbench", *options, out=tmp_path, budget=None) == 0
    assert len(asked) == 21 and {path for path, _ in asked} == {"Xnhyacinth/LongBench"}
    assert {f"longbench_{name}" for _, name in asked} == set(samples(tmp_path))
    assert run("scout", pocket_path, "longbench_e", *options, budget=None) == 0
    assert all(name.endswith("_e") for _, name in asked[21:]) and len(asked) > 21


@pytest.mark.parametrize("tasks", ["longbench", "longbench_hotpotqa_e"])
def test_a_missing_hub_names_the_offline_option(pocket_path, tasks, capsys):
    assert run("scout", pocket_path, tasks, budget=None) == 2
    told = capsys.readouterr().err
    assert "error: the Hugging Face Hub cannot be reached: Couldn't reach 'Xnhyacinth/LongBench'" in told
    assert "--longbench-dir DIR" in told and "Traceback" not in told
    assert told.count("error:") == 1
