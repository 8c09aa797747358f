"""One page of what there is: everything or a part of it, self-contained, and nothing that was not measured."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scout_hf import ConfigError
from scout_hf.cli import app
from scout_hf.eval import arms
from scout_hf.eval.methods import plots
from scout_hf.eval.report import page

pytest.importorskip("matplotlib")
RESULTS = Path(__file__).parents[2] / "eval" / "results"
CONTEXTS = (8192, 16384)


def made_up():
    """A record of the comparison with all of its parts."""
    speeds = {"stock": 1, "stock folded": 2, "scout": 18, "scout, predicted": 20,
              "scout, predicted, no recall": 16, "scout, neither": 12, "hgca": 15,
              "infinigen, kept": 8, "infinigen": 4, "kvpr": 0.5, "dense": 0.5}  # fmt: skip
    shares = {"attention": 0.3, "wait": 0.2, "selection": 0.1, "moving": 0.1, "rest": 0.3}
    held = {"device_bytes": 1 << 24, "host_bytes": 1 << 28}
    cells = []
    for context in CONTEXTS:
        for way, speed in speeds.items():
            figures = {
                "step_ms": 4e3 / speed,
                "q1_ms": 3e3 / speed,
                "q3_ms": 5e3 / speed,
                "tokens_per_s": speed,
                "cpu_ms": 50.0,
                "exact": way in ("stock", "dense"),
            }
            found = {"way": way, "context": context, "batch": 4, "shape": "gqa", "shares": shares, **figures, **held}
            found |= {} if way.startswith("stock") else {"link_bytes": 1e6, "join_ms": 1.0}
            cells += [found | {"part": "speed"}, found | {"part": "equal"}, found | {"part": "equal", "gib": 0.5}]
    missing = {"way": "stock offloaded", "shape": "gqa", "context": CONTEXTS[1], "batch": 4, "missing": "needs a <GPU>"}
    cells.append(missing | {"part": "speed"})
    for way in arms.names():
        for budget in (256, 512) if arms.find(way).takes_budget else (4096,):
            figures = {"right": 9, "questions": 10, "row_step_ms": 1.0, "prefill_s": 1.0, "exact": False}
            where = {"part": "score", "way": way, "task": "needle", "context": 4096, "budget": budget}
            cells.append(where | figures | held)
    settings = {"budget": 2048, "layers": 4, "drift": 0.1, "threads": 1, "emulated_as": "as given"}
    settings |= {"emulation": {"link_gbps": 0.25, "cpu_gbps": None}}
    machine = {"cpu": "a CPU", "cpus": 2, "isa": "avx2", "memory_gib": 8.0, "torch": "2", "transformers": "5"}
    record = {"benchmark": "methods", "settings": settings, "machine": machine, "cells": cells}
    return record | {"commands": ["scout-hf bench methods --link-gbps 0.25 --out 'a <b>'"]}


class Reader(HTMLParser):
    """Tables as rows of cells, and the tags that are left open."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.open, self.cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""
        if tag not in ("meta", "img", "html", "!doctype"):
            self.open.append(tag)

    def handle_data(self, data):
        self.cell = None if self.cell is None else self.cell + data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None


def write(folder, record, out):
    folder.mkdir(exist_ok=True)
    (folder / "methods.json").write_text(json.dumps(record))
    page.write([folder], out)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for path in RESULTS.glob("*.json"):
        if path.stem != "methods":
            shutil.copy(path, folder)
    return write(folder, made_up(), folder / "report.html")


def test_every_part_is_there(whole):
    read = Reader(whole)
    assert not read.open
    main, names = read.tables[0], [row[0] for row in read.tables[0]]
    assert main[0][:6] == ["method", "exact", "answers right", "step ms", "quartiles", "x stock"]
    assert {"stock", "stock folded", "scout", "hgca", "infinigen", "kvpr", "dense"} <= set(names)
    by_name = {row[0]: row for row in main}
    assert by_name["scout, predicted"][2:6] == ["90 %", "200", "150–250", "10.00"]
    assert by_name["stock folded"][5] == "1.00"
    assert all(len({len(row) for row in table}) == 1 for table in read.tables)
    titles = re.findall("<h2>(.*?)</h2>", whole)
    shown = ("methods", "fidelity", "cpu_decode", "cpu_kernel", "sessions", "rivals", "drafts")
    assert titles == [page.TITLES[name] for name in shown]
    assert whole.count("<img") == len(plots.ALL)
    assert "In 0.5 GiB of the device" in whole and "one request of 8k tokens takes with stock" in whole
    assert "the paper's figure 8" in html.unescape(whole) and "(figure 12)" in whole


def test_nothing_is_fetched_and_nothing_is_markup_that_was_data(whole):
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!["']?data:)""", whole)
    assert "<script" not in whole and "<link" not in whole and "@import" not in whole
    assert "a &lt;b&gt;" in whole and "a <b>" not in whole and "needs a &lt;GPU&gt;" in whole
    # An arrow or a link of the README would show as it is typed.
    assert "](http" not in whole


def test_what_is_emulated_and_where_it_ran_are_told(whole):
    assert "<b>Emulated: link at 0.25 GB/s (as given).</b>" in whole
    assert "a CPU, avx2, 2 CPUs, 8.0 GiB of memory, torch 2, transformers 5" in whole
    assert "--link-gbps 0.25" in whole and "drifts synthetically, 10% per step" in whole


def test_a_part_of_it_is_a_page_too(tmp_path):
    record = made_up()
    few = record | {"cells": [one for one in record["cells"] if one["part"] == "score"]}
    text = write(tmp_path / "few", few, tmp_path / "few.html")
    assert text.count("<img") == 1 and not Reader(text).open
    none = write(tmp_path / "none", record | {"cells": []}, tmp_path / "none.html")
    assert "<img" not in none and page.TITLES["methods"] in none
    one = [cell for cell in record["cells"] if (cell["part"], cell["way"]) == ("speed", "scout")]
    text = write(tmp_path / "one", record | {"cells": one}, tmp_path / "one.html")
    assert "scout" in text and Reader(text).tables[0][1][5] == "-"


def test_records_without_shares_show_what_is_waited(tmp_path):
    record = made_up()
    for cell in record["cells"]:
        cell.pop("shares", None)
    assert write(tmp_path / "old", record, tmp_path / "old.html").count("<img") == len(plots.ALL)


def test_command(tmp_path):
    result = CliRunner().invoke(
        app, ["report", str(RESULTS / "cpu_kernel.json"), "--out", str(tmp_path / "a" / "b.html")]
    )
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.html"]
    assert page.TITLES["cpu_kernel"] in (tmp_path / "a" / "b.html").read_text()
    trace, half = tmp_path / "step.json", tmp_path / "half.json"
    trace.write_text('{"traceEvents": []}')
    half.write_text('{"benchmark": ')
    for path, told in (
        (trace, "not a result of"),
        (half, "half.json cannot be used"),
        (tmp_path / "no", "is missing"),
    ):
        result = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "c.html")])
        assert result.exit_code == 2 and told in result.stderr and not (tmp_path / "c.html").exists()
    (tmp_path / "nothing").mkdir()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nothing"), "--out", str(tmp_path / "c.html")])
    assert result.exit_code == 2 and "scout-hf bench" in result.stderr and not (tmp_path / "c.html").exists()


# -- what a record says is never markup -----------------------------------------------------------------------------

PAYLOAD = """x"'><script>alert(1)</script><img src=http://h onerror=alert(1)>`|</td>\n\n| {{ 7*7 }} | <!-- -->"""


def leaves(value, way=()):
    """The way to every string and number."""
    if isinstance(value, (dict, list)):
        for name, one in value.items() if isinstance(value, dict) else enumerate(value[:3]):
            yield from leaves(one, (*way, name))
    else:
        yield way


def changed(record, way, value):
    copy = json.loads(json.dumps(record))
    at = copy
    for name in way[:-1]:
        at = at[name]
    at[way[-1]] = value
    return copy


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.seen = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.add((tag, *(name for name, _ in attributes)))


PLAIN = "title style h1 h2 table thead tbody tr th td b p code".split()
KNOWN = {("html", "lang"), ("meta", "charset"), ("img", "alt", "src"), *((tag,) for tag in PLAIN)}
KNOWN |= {(tag, "class") for tag in ("p", "div", "td", "th")}


def records():
    yield "methods", {**made_up(), "cells": made_up()["cells"][:3] + made_up()["cells"][-3:]}
    for name in ("cpu_kernel", "cpu_decode"):
        yield name, json.loads((RESULTS / f"{name}.json").read_text())
    fidelity = json.loads((RESULTS / "fidelity.json").read_text())
    yield "fidelity", fidelity | {"cells": fidelity["cells"][:2]}


@pytest.mark.parametrize("kind", ["methods", "cpu_kernel", "cpu_decode", "fidelity"])
def test_a_payload_in_any_field_is_text_or_refused(kind, monkeypatch):
    record, path = dict(records())[kind], RESULTS / f"{kind}.json"
    monkeypatch.setattr(page, "_drawn", lambda *_: None)
    monkeypatch.setattr(page, "_images", lambda *_: page.Part())
    shown = 0
    for way in leaves(record):
        if way[0] in ("benchmark", "study") or "ms" in way:
            continue
        try:
            text = page.render({path: changed(record, way, PAYLOAD)})
        except ConfigError:
            continue
        assert "<script" not in text and "<!-- " not in text and "49" not in re.findall(r"\| (..) \|", text), way
        assert Tags(text).seen <= KNOWN and not Reader(text).open, way
        shown += "&lt;script&gt;" in text
    assert shown >= {"fidelity": 1}.get(kind, 3)


def test_names_of_files_and_pictures_are_text_too(tmp_path):
    bad = 'cpu_kernel"><script>alert(1)<|script>'
    (tmp_path / f"{bad}.png").write_bytes(b"")
    shutil.copy(RESULTS / "cpu_kernel.json", tmp_path / f"{bad}.json")
    page.write([tmp_path / f"{bad}.json"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and text.count("cpu_kernel&#34;&gt;&lt;script&gt;") == 2


def test_all_fields_at_once(tmp_path):
    record = made_up()
    for one in record["cells"]:
        one["way"] = PAYLOAD if one["way"] == "hgca" else one["way"]
        if "missing" in one:
            one["missing"] = PAYLOAD
    record["settings"] |= {"emulated_as": PAYLOAD, "shape": "gqa"}
    record["machine"] = dict.fromkeys(page.SHOWN, PAYLOAD)
    record["commands"] = [PAYLOAD]
    text = write(tmp_path / "bad", record, tmp_path / "bad.html")
    assert "<script" not in text and text.count("&lt;script&gt;") > 4 and Tags(text).seen <= KNOWN


def test_the_template_is_the_only_place_that_makes_markup():
    source = Path(page.__file__).read_text()
    assert "autoescape=True" in source and source.count("get_template") == 1 and "from_string" not in source
    source += Path(page.__file__).with_name("page.html.jinja").read_text()
    assert not re.search(r"Markup|\|\s*safe\b|autoescape\s+false|autoescape=False", source)


# -- what a record must hold ----------------------------------------------------------------------------------------

WRONG = {
    "nothing": None,
    "text": "many",
    "huge": 1e300,
    "below zero": -(10**12),
    "deep": json.loads("[" * 30 + "]" * 30),
    "object": {"a": {}},
    "control": "\x1b[2J",
}


@pytest.mark.parametrize("kind", ["methods", "cpu_kernel", "cpu_decode", "fidelity"])
@pytest.mark.parametrize("count", [2, pytest.param(len(WRONG), marks=pytest.mark.full)])
def test_a_record_that_was_changed_is_shown_or_refused_by_name(kind, count, tmp_path, monkeypatch):
    """So many values in each place, in turn."""
    record, path = dict(records())[kind], tmp_path / "changed.json"
    monkeypatch.setattr(page, "_drawn", lambda *_: None)
    refused, values = 0, list(WRONG.values())
    for place, way in enumerate(leaves(record)):
        # One row is as good as the next, and single times are not shown.
        if "ms" in way or any(isinstance(name, int) and name for name in way):
            continue
        for value in (values[(count * place + step) % len(values)] for step in range(count)):
            path.write_text(json.dumps(changed(record, way, value)))
            try:
                page.write([path], tmp_path / "page.html")
            except ConfigError as error:
                refused += 1
                assert "changed.json" in str(error) and len(str(error)) < 600
    assert refused > 20


def test_a_terminal_shows_words_as_they_are(capsys, monkeypatch):
    from scout_hf.eval.bench import report

    monkeypatch.setenv("COLUMNS", "300")
    record = made_up()
    record["machine"] |= {"scout_hf": "0.1", "cpu": "[red]a[/] [/nonsense] :smile:"}
    record["cells"][0]["way"] = "[link=http://h]way[/link]"
    report.show(record)
    told = capsys.readouterr().out
    assert "[red]a[/] [/nonsense] :smile:" in told and "[link=http://h]way[/link]" in told
