"""What was measured is kept line by line; what was measured for something else is not taken."""

import json

import pytest

from scout_hf.eval.records import Journal as AnyJournal
from scout_hf.rules import count, fields


def Journal(path, **options):
    return AnyJournal(path, fields({}, {"right": count()}), **options)


class TestJournal:
    def test_only_what_was_asked_counts(self, tmp_path):
        journal = Journal(tmp_path / "cells.jsonl")
        journal.add({"budget": 64, "seed": 0}, {"right": 1})
        journal = Journal(tmp_path / "cells.jsonl")
        assert journal.get({"seed": 0, "budget": 64}) == {"right": 1}
        assert all(journal.get(one) is None for one in ({"budget": 64}, {"budget": 64, "seed": 1}, {}))

    def test_a_line_cut_off_is_measured_again(self, tmp_path):
        path = tmp_path / "cells.jsonl"
        for number in range(3):
            Journal(path).add({"cell": number}, {"right": number})
        path.write_bytes(path.read_bytes()[:-5])
        journal = Journal(path)
        assert [journal.get({"cell": number}) for number in range(3)] == [{"right": 0}, {"right": 1}, None]
        journal.add({"cell": 2}, {"right": 2})
        assert [json.loads(line)["result"]["right"] for line in path.read_text().splitlines()] == [0, 1, 2]

    def test_a_figure_that_is_no_number_leaves_the_file_readable(self, tmp_path):
        path = tmp_path / "cells.jsonl"
        Journal(path).add({"cell": 1}, {"right": 1})
        with pytest.raises(ValueError, match="right"):
            Journal(path).add({"cell": 2}, {"right": float("nan")})
        assert Journal(path).get({"cell": 1}) == {"right": 1}

    def test_other_code_counts_too_and_each_line_says_which(self, tmp_path):
        path = tmp_path / "cells.jsonl"
        Journal(path, commit="one").add({"cell": 1}, {})
        journal = Journal(path, commit="two")
        journal.add({"cell": 2}, {})
        assert journal.get({"cell": 1}) == {}
        assert [json.loads(line)["commit"] for line in path.read_text().splitlines()] == ["one", "two"]

    def test_fresh_begins_anew(self, tmp_path):
        path = tmp_path / "cells.jsonl"
        Journal(path).add({"cell": 1}, {})
        assert Journal(path, fresh=True).get({"cell": 1}) is None and not path.exists()

    @pytest.mark.parametrize(
        "text",
        [
            "nonsense\n",
            '{"schema": 1}\n',
            "[]\n",
            '{"schema":1,"asked":{},"result":\n{}\n',
            '{"schema":1,"commit":null,"asked":{},"result":{"right":-1}}\n',
            '{"schema":1,"commit":null,"asked":{},"result":{"right":NaN}}\n',
            '{"schema":1,"commit":7,"asked":{},"result":{}}\n',
            "[" * 200_000 + "\n",
        ],
    )
    def test_a_foreign_file_is_left_alone(self, tmp_path, text):
        path = tmp_path / "cells.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"cells.jsonl, line \d is not a result.*--fresh"):
            Journal(path)
        assert path.read_text() == text
