"""What a study says: paired losses with their errors, tables, plots, and a README that matches the JSON."""

import io
import json
import math
import random
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from scout_hf.cli import app
from scout_hf.eval.fidelity import report
from scout_hf.eval.fidelity.cells import BLOCK, BUDGET, MODES, TOKENS, Cell, cells_of
from scout_hf.eval.fidelity.plots import NO_PLOT, PLOTS, save_plots
from scout_hf.eval.fidelity.summary import CENTRE, along, find, points, rows
from scout_hf.eval.fidelity.tables import COMMAND, LONG_NAMES, parts, tables
from scout_hf.eval.markdown import begin_mark, between_marks, end_mark, to_markdown, update

BEGIN, END = begin_mark(COMMAND), end_mark(COMMAND)


def markdown(record):
    return to_markdown(parts(record))


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results" / "fidelity.json"


def record(cell, **result):
    return {**cell.as_dict(), "attended_share": 0.2, "tokens_per_second": 100.0, "seconds": 1.0, **result}


def cell(mode="full", task="needle", model="llama", tokens=TOKENS, digest="minmax", budget=BUDGET, stress="none"):
    sparse = {"block_size": BLOCK, "budget": budget, "digest": digest}
    sparse = {name: sparse[name] for name in Cell.takes(mode)}
    return Cell(model, task, tokens, mode, **sparse, stress=stress)


def made_up(cells, seed=0):
    """Results for these cells as random as a study's may be, all parts there."""
    rng = random.Random(seed)
    found = []
    for one in cells:
        result = {"nll": [text + rng.uniform(0, 0.1) for text in (1.0, 1.6, 2.2, 3.0)]} if one.task == "text" else {}
        result = result or {"right": "".join(rng.choice("0111") for _ in range(16))}
        if one.mode != "full":
            layers = {name: [None, rng.random(), rng.random()] for name in ("mass", "block_recall")}
            result |= layers
        if one.mode.startswith("predicted"):
            result["cosine"] = [None, rng.random(), rng.random()]
            result |= {"cpu_ratio_by_step": {"0": [0.1, 0.2], "1": [0.2, 0.3]}} if one.task == "text" else {}
        found.append(record(one, **result))
    return {
        "study": "fidelity",
        "settings": {"preset": "full", "questions": 8, "seed": 0},
        "failed": 0,
        "machine": {"cpu": "none"},
        "weights": {"llama": "0" * 12},
        "cells": found,
    }


@pytest.fixture(scope="module")
def whole():
    return made_up(cells_of(("llama", "qwen3", "text"), quick=False))


class TestSummary:
    def table(self, *records, text=False):
        return rows(records, text)

    def test_losses_are_shown_apart(self):
        table = self.table(
            record(cell(), right="11111111"),
            record(cell("real"), right="11111110"),
            record(cell("real-two-tiers"), right="11111100"),
            record(cell("predicted"), right="11110001"),
        )
        real, two, predicted = (find(table, mode=mode) for mode in ("real", "real-two-tiers", "predicted"))
        assert real.lost_to_selection.value == 1 / 8 and real.lost_to_prediction is None
        assert two.lost_to_selection.value == 2 / 8 and two.lost_to_prediction is None
        # Selection: as two tiers with the real query; prediction: what comes on top; together all that is lost.
        assert predicted.lost_to_selection.value == 2 / 8 and predicted.lost_to_prediction.value == 1 / 8
        assert 1 - predicted.score.value == pytest.approx(2 / 8 + 1 / 8)
        # Three questions changed sides, so the paired error is not that of two independent figures.
        differences = [0, 0, 0, 0, 1, 1, 0, -1]
        spread = sum((one - 1 / 8) ** 2 for one in differences) / 7 / 8
        assert predicted.lost_to_prediction.error == pytest.approx(math.sqrt(spread))

    def test_equal_answers_lose_nothing_for_certain(self):
        table = self.table(record(cell(), right="1010"), record(cell("real"), right="1010"))
        assert find(table, mode="real").lost_to_selection == (0.0, 0.0)
        assert find(table, mode="full").score.error > 0

    def test_means_are_over_models_and_tasks(self):
        table = self.table(
            record(cell(), right="1111"),
            record(cell(task="trace"), right="1100"),
            record(cell("real"), right="1100"),
            record(cell("real", task="trace"), right="0000"),
        )
        real = find(table, mode="real")
        assert real.score.value == 0.25 and real.count == 8 and real.lost_to_selection.value == 0.5
        assert real.score.error == pytest.approx(math.sqrt(0.25 * 4 / 3 / 4) / 2)

    def test_no_comparison_with_other_questions(self):
        part = [
            record(cell(), right="1111"),
            record(cell("real"), right="1111"),
            record(cell("real", task="copy"), right="11"),
        ]
        assert find(self.table(*part), mode="real").lost_to_selection is None
        other = [record(cell(), right="1111"), record(cell("real"), right="11")]
        assert find(self.table(*other), mode="real").lost_to_selection is None
        assert find(self.table(record(cell("predicted"), right="11")), mode="predicted").lost_to_prediction is None

    def test_settings_do_not_mix(self):
        table = self.table(
            record(cell(tokens=1024), right="0000"),
            record(cell(stress="scale"), right="0000"),
            record(cell("real", stress="scale"), right="0000"),
            record(cell(), right="1111"),
            record(cell("real", digest="oracle"), right="1111"),
            record(cell("real-two-tiers", budget=0.25), right="0000"),
            record(cell("predicted"), right="0000"),
        )
        assert find(table, digest="oracle").lost_to_selection.value == 0
        assert find(table, mode="real", stress="scale").lost_to_selection.value == 0
        assert find(table, mode="predicted").lost_to_selection is None

    def test_text_loses_perplexity(self):
        full, sparse = [1.0, 2.0, 3.0], [1.1, 2.1, 3.1]
        table = self.table(
            record(cell(task="text", model="text"), nll=full),
            record(cell("real", "text", "text"), nll=sparse),
            text=True,
        )
        real = find(table, mode="real")
        assert find(table, mode="full").score.value == pytest.approx(math.exp(2))
        assert real.lost_to_selection.value == pytest.approx(math.exp(0.1) - 1)
        # The texts differ much, the differences not at all.
        assert real.lost_to_selection.error == pytest.approx(0, abs=1e-9) and real.score.error > 1
        assert not self.table(record(cell("real", "text", "text"), nll=sparse))

    def test_several_rows_are_no_row(self):
        table = self.table(record(cell(), right="1"), record(cell(tokens=1024), right="1"))
        with pytest.raises(ValueError, match="2 rows"):
            find(table, mode="full")


class TestShown:
    def test_tables_fit_a_terminal_and_hold_every_mode(self, whole):
        console = Console(width=80, record=True, file=io.StringIO())
        report.show(whole, console)
        text = console.export_text()
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        names = ("two tiers", "int8 KV", "pred., real on CPU", "pred., no recall", "oracle", "recent", "more rivals")
        assert all(name in text for name in names)
        assert text.count("lost: prediction") > 10 and text.count("lost: selection") > 10
        assert "perplexity by budget" in text

    def test_one_cell_is_enough(self):
        for part in ([cell()], [cell("real")], [cell(task="text", model="text")], [cell("predicted", stress="scale")]):
            assert len(list(tables(made_up(part)))) == 1

    def test_factors_are_varied_one_at_a_time(self, whole):
        table = rows(whole["cells"], text=False)
        assert [name for name, _ in points(table, "budget")] == ["3 %", "6 %", "12.5 %", "25 %", "50 %"]
        assert [name for name, _ in points(table, "tokens")] == ["1k", "2k", "4k", "8k"]
        assert [name for name, _ in points(table, "stress")] == ["none", "scale", "offset", "8k", "more rivals"]
        assert [name for name, _ in points(table, "fixed")] == ["1k", "2k", "4k", "8k"]
        for axis in ("budget", "tokens", "block_size"):
            for row in along(table, axis, "minmax", "real").values():
                assert {name: row.setting[name] for name in CENTRE if name != axis}.items() <= CENTRE.items()

    def test_plots_are_left_out_without_matplotlib(self, whole, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert save_plots(whole, tmp_path) == [NO_PLOT] and not list(tmp_path.iterdir())

    def test_plots(self, whole, tmp_path):
        pytest.importorskip("matplotlib")
        lines = save_plots(whole, tmp_path)
        assert {path.stem for path in tmp_path.glob("*.png")} == {f"fidelity_{name}" for name in PLOTS} and len(
            lines
        ) == len(PLOTS)
        assert save_plots(made_up([cell()]), tmp_path / "none") == []

    def test_saved_as_it_was(self, whole, tmp_path):
        path = tmp_path / "fidelity.json"
        report.save(whole, path)
        again = report.load(path)
        assert [one["right"] for one in again["cells"] if "right" in one] == [
            one["right"] for one in whole["cells"] if "right" in one
        ]
        assert rows(again["cells"], True)[0].score.value == pytest.approx(
            rows(whole["cells"], True)[0].score.value, 1e-4
        )
        assert {name: again[name] for name in again if name != "cells"} == {
            name: whole[name] for name in whole if name != "cells"
        }

    @pytest.mark.parametrize("text", ["", "[]", '{"study": "speed", "cells": []}'])
    def test_something_else_is_refused(self, tmp_path, text):
        path = tmp_path / "fidelity.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="give a fidelity.json"):
            report.load(path)


class TestReadme:
    def test_it_is_up_to_date(self):
        text = (ROOT / "docs/results/fidelity.md").read_text(encoding="utf-8")
        assert between_marks(text, COMMAND)[1].strip() == markdown(report.load(RESULTS)), (
            "again: scout-hf fidelity --report eval/results/fidelity.json --readme docs/results/fidelity.md"
        )

    def test_only_what_is_between_the_marks_changes(self, whole, tmp_path):
        path = tmp_path / "README.md"
        path.write_text(f"# Ä\n{BEGIN}\nold\n{END}\nrest\n", encoding="utf-8")
        assert [update(path, COMMAND, markdown(whole)) for _ in range(2)] == [True, False]
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# Ä\n{BEGIN}\n") and text.endswith(f"\n{END}\nrest\n")
        assert "old" not in text and markdown(whole) in text
        assert update(path, COMMAND, markdown(made_up([cell(), cell("real")])))

    def test_tables_are_whole(self, whole):
        text = markdown(whole)
        blocks = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
        assert len(blocks) == 1 + 5 + 3
        for lines in blocks:
            assert len({line.count("|") for line in lines}) == 1 and set(lines[1]) == set("|-")
        assert "lost to selection | lost to prediction" in text and "Perplexity" in text
        row = find(rows(whole["cells"], False), **CENTRE, digest="sign", mode="predicted-auto")
        assert f"| `sign` | {LONG_NAMES['predicted-auto']} | {100 * row.score.value:.1f}±" in text

    def test_what_was_measured_is_named(self, whole):
        text = markdown(whole)
        assert 'Right, in %, by budget, one tier / two tiers / two tiers with `cpu_query="predicted"`:' in text
        assert "Right, in %, by block size, one tier / two tiers:" in text
        part = [one for one in whole["cells"] if one["mode"] in ("full", "predicted-auto")]
        alone = markdown({**whole, "cells": part})
        assert "Right, in %, by block size, two tiers:" in alone and "| `sign` | " in alone
        assert "by block size" not in markdown({**whole, "cells": [one for one in part if one["mode"] == "full"]})

    def test_a_file_without_marks_is_left_alone(self, whole, tmp_path):
        path = tmp_path / "README.md"
        path.write_text("# nothing\n")
        with pytest.raises(ValueError, match="no place for the tables"):
            update(path, COMMAND, markdown(whole))
        assert path.read_text() == "# nothing\n"


class TestCommand:
    def call(self, *options):
        return CliRunner().invoke(app, ["fidelity", *map(str, options)])

    def test_a_part_of_the_quick_study(self, tmp_path):
        part = ["--only", "model=llama", "--only", "task=needle", "--only", "digest=oracle", "--only", "mode=full,real"]
        options = [*part, "--questions", 2, "--jobs", 1, "--out", tmp_path / "new" / "study"]
        result = self.call(*options)
        assert result.exit_code == 0, result.output
        saved = json.loads((tmp_path / "new" / "study" / "fidelity.json").read_text())
        assert [one["mode"] for one in saved["cells"]] == ["full", "real"]
        assert saved["settings"]["questions"] == 2 and saved["settings"]["modes"] == MODES
        assert {"commit", "cpu", "torch", "transformers", "scout_hf"} <= set(saved["machine"])
        assert len(saved["weights"]["llama"]) == 12 and saved["failed"] == 0
        assert "oracle" in result.output and "lost to" in result.output
        again = self.call(*options)
        assert "2 of 2 cells are measured already" in again.output

    def test_a_report_measures_nothing(self, whole, tmp_path):
        report.save(whole, tmp_path / "fidelity.json")
        page = tmp_path / "page.md"
        page.write_text(f"{BEGIN}{END}")
        result = self.call("--report", tmp_path / "fidelity.json", "--readme", page)
        assert result.exit_code == 0 and "perplexity" in result.output and "changed" in result.output
        assert "| `minmax` |" in page.read_text() and sorted(tmp_path.iterdir()) == [tmp_path / "fidelity.json", page]

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--only", "digest=guess"], "nothing of that in this study"),
            (["--only", "speed=1"], "fields are model, task"),
            (["--report", "/nonexistent/fidelity.json"], "/nonexistent/fidelity.json"),
        ],
    )
    def test_wrong_options_end_in_a_message(self, options, message, tmp_path):
        result = self.call(*options, "--out", tmp_path / "out")
        assert result.exit_code == 2 and message in result.output.replace("\n", " ")
        assert not (tmp_path / "out").exists()
