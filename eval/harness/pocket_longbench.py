"""Small data sets in LongBench's own format, made of pocket documents, so that its tasks run with no download.

Files, columns, prompts and metrics are those of LongBench; the texts are the pocket model's. Where a prompt ends with
the question (triviaqa, trec, samsum) the model can answer; where instructions in words that it does not know follow,
only the path is tested.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scout_hf.eval.pocket import Document, Fact, make_document
from scout_hf.files import write_text

FACTS = 8
LONGBENCH_E = ("hotpotqa", "trec", "passage_count", "lcc")
# Away from the seeds that other evaluations of the pocket model use.
FIRST_SEED = 70_000


def make_longbench(folder: Path, rows: int = 20, tokens: int = 1024, seed: int = 0) -> list[Path]:
    """Write ``<dataset>.jsonl`` for every kind of task, and ``<dataset>_e.jsonl`` for some; returns the paths.

    The longest document of a file has ``tokens``, from 256 up, the shortest half of that. Files of the same name are
    replaced.
    """
    if rows < 1 or tokens < 256:
        raise ValueError(f"rows={rows}, tokens={tokens}: at least 1 row, and documents of at least 256 tokens")
    folder.mkdir(parents=True, exist_ok=True)
    names = [*DATASETS, *(f"{name}_e" for name in LONGBENCH_E)]
    paths = [folder / f"{name}.jsonl" for name in names]
    for path, name in zip(paths, names):
        lines = [_row(name, number, rows, tokens, seed) for number in range(rows)]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return paths


def _row(name: str, number: int, rows: int, tokens: int, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{name}-{seed}-{number}")
    length = tokens // 2 + (tokens - tokens // 2) * (number + 1) // rows
    document = make_document(length, FACTS, FIRST_SEED + rng.randrange(10**9))
    fields = DATASETS[name.removesuffix("_e")](rng, document, rng.choice(document.facts))
    language = "zh" if name in ("dureader", "multifieldqa_zh", "passage_retrieval_zh") else "en"
    return {
        **fields,
        "length": length,
        "dataset": name,
        "language": language,
        "all_classes": fields.get("all_classes"),
        "_id": f"{name}-{seed}-{number:04d}",
    }


def _question(rng: random.Random, document: Document, fact: Fact) -> dict[str, Any]:
    return {"input": fact.question, "context": document.text, "answers": [fact.answer]}


def _passages(rng: random.Random, document: Document, fact: Fact) -> dict[str, Any]:
    parts = _paragraphs(document, 6)
    context = "\n\n".join(f"Passage {number} :\n{part}" for number, part in enumerate(parts, start=1))
    return {"input": fact.question, "context": context, "answers": [fact.answer]}


def _summary(rng: random.Random, document: Document, fact: Fact) -> dict[str, Any]:
    return {"input": fact.question, "context": document.text, "answers": [f"{fact.answer} ."]}


def _class(rng: random.Random, document: Document, fact: Fact) -> dict[str, Any]:
    classes = [one.answer.split()[0] for one in document.facts]
    answer = fact.answer.split()[0]
    return {"input": fact.question, "context": document.text, "answers": [answer], "all_classes": classes}


def _retrieval(heading: str) -> Callable[[random.Random, Document, Fact], dict[str, Any]]:
    def make(rng: random.Random, document: Document, fact: Fact) -> dict[str, Any]:
        parts = _paragraphs(document, 9)
        chosen = rng.randrange(len(parts))
        context = "\n\n".join(f"{heading}{number}: {part}" for number, part in enumerate(parts, start=1))
        sentence = parts[chosen].split(" . ")[0]
        return {"input": sentence, "context": context, "answers": [f"{heading}{chosen + 1}"]}

    return make


def _count(rng: random.Random, document: Document, fact: Fact) -> dict[str, Any]:
    parts = _paragraphs(document, 6)
    shown = [*parts, *rng.choices(parts, k=3)]
    rng.shuffle(shown)
    context = "\n\n".join(f"Paragraph {number}: {part}" for number, part in enumerate(shown, start=1))
    return {"input": "", "context": context, "answers": [str(len(parts))]}


def _code(rng: random.Random, document: Document, fact: Fact) -> dict[str, Any]:
    lines = document.text.replace(" . ", " .\n")
    return {"input": "", "context": f"{lines}\n{fact.question}\n", "answers": [fact.answer]}


def _paragraphs(document: Document, count: int) -> list[str]:
    sentences = [f"{sentence} ." for sentence in document.text.removesuffix(" .").split(" . ")]
    size = -(-len(sentences) // count)
    return [" ".join(sentences[begin : begin + size]) for begin in range(0, len(sentences), size)]


DATASETS: dict[str, Callable[[random.Random, Document, Fact], dict[str, Any]]] = {
    "multifieldqa_en": _question,
    "hotpotqa": _passages,
    "triviaqa": _question,
    "samsum": _summary,
    "trec": _class,
    "passage_retrieval_en": _retrieval("Paragraph "),
    "passage_count": _count,
    "lcc": _code,
    "dureader": _question,
    "multifieldqa_zh": _question,
    "passage_retrieval_zh": _retrieval("段落"),
}
"""What makes the input, context, answers and classes of a row, by data set."""
