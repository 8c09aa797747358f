"""The demo with a pocket model, which was trained for it and is packaged."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from tqdm import tqdm

import scout_hf
from scout_hf.eval.decode_path import Session, ask_all
from scout_hf.eval.options import Demo
from scout_hf.eval.pocket import ANSWER_WORDS, TRAINED_TOKENS, Document, Fact, load_pocket, make_document
from scout_hf.eval.pocket.tasks import usual_statements
from scout_hf.eval.settings import single_values_of
from scout_hf.eval.tables import tiers

STOCK, EXACT = "stock", "exact"
QUESTIONS, BUDGET, TOKENS, BLOCK_SIZE = 8, 1024, 8192, 16
EXCERPT_WORDS = 36

METHOD = """\
Every mode reads the document once (prefill) and asks each question on a fork of that cache. Every token of a question \
and of its answer is a decode step of its own, so nothing of it is attended densely; answers come from \
model.generate(). tok/s counts these steps. '2 tiers' runs the path meant for a GPU on the CPU: resident blocks are \
all attended, chosen ones that are not resident are attended in host memory, the choice is made one layer ahead with a \
predicted query, which is what this column may lose by; 'device' is what a GPU would hold in place of all KV. 'exact' \
copies all KV every step, in pages. The model has {parameters:.1f} million parameters and was trained on up to \
{trained} tokens ({threads} CPU thread(s) here): the larger the model and the longer the text, the more a step gains \
by reading less."""


def run(options: Demo, console: Console) -> bool:
    """Run the demo and print it; True if the exact mode answered everything as stock attention did."""
    tokens, questions = options.tokens or TOKENS, options.questions or QUESTIONS
    budget = BUDGET if options.budget is None else options.budget
    size = BLOCK_SIZE if options.block_size is None else options.block_size
    sparse = scout_hf.ScoutConfig(**({"budget": budget, "block_size": size} | single_values_of(options.set)))
    modes = {
        STOCK: None,
        EXACT: scout_hf.ScoutConfig(budget=None, block_size=sparse.block_size),
        "sparse": sparse,
        "2 tiers": replace(sparse, split="cpu"),
    }
    model, tokenizer = load_pocket()
    document = make_document(tokens, max(questions, usual_statements(tokens)), options.seed or 0)
    every = len(document.facts) / questions
    asked = [document.facts[int(index * every)] for index in range(questions)]
    console.print(_excerpt(document, asked[0]))
    documents, sessions = [(document.text, [fact.question for fact in asked])], {}
    with tqdm(
        total=len(modes) * (questions + 1), desc="reading and asking", unit="step", leave=False, disable=None
    ) as bar:
        for mode, config in modes.items():
            sessions[mode] = ask_all(model, tokenizer, config, documents, ANSWER_WORDS, bar.update)
    console.print(_answers(sessions, asked), _summary(sessions, asked))
    facts = {"parameters": model.num_parameters() / 1e6, "threads": torch.get_num_threads(), "trained": TRAINED_TOKENS}
    console.print(METHOD.format(**facts), highlight=False)
    _gain(sessions, console)
    return _compare(sessions[STOCK], sessions[EXACT], console)


def _excerpt(document: Document, fact: Fact) -> Panel:
    words = document.text.split()
    first = max(0, fact.position - EXCERPT_WORDS // 2)
    stop = fact.position + len(fact.answer.split())
    before, after = words[first : fact.position], words[stop : stop + EXCERPT_WORDS // 2]
    text = f"... {escape(' '.join(before))} [bold green]{escape(fact.answer)}[/] {escape(' '.join(after))} ..."
    title = f"{document.tokens} tokens, {len(document.facts)} hidden facts; one of them, at token {fact.position}"
    question = f"[bold]{escape(document.prompt(fact))}[/] -> [bold green]{escape(fact.answer)}[/]"
    return Panel(f"{text}\n\n{question}", title=title)


def _answers(sessions: dict[str, Session], asked: list[Fact]) -> Table:
    table = Table(title="what do they call the ...", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("fact")
    table.add_column("answer", overflow="fold")
    for mode in sessions:
        table.add_column(mode, justify="center", no_wrap=True)
    for row, fact in enumerate(asked):
        key = fact.question.split(" call the ", 1)[-1]
        right = [one.answers[row].text == fact.answer for one in sessions.values()]
        marks = ["[green]right[/]" if yes else "[red]wrong[/]" for yes in right]
        table.add_row(key, fact.answer, *marks)
    return table


def _summary(sessions: dict[str, Session], asked: list[Fact]) -> Table:
    table = Table(title="what it took", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("mode", "right", "attended", "tok/s", "prefill s", "KV in MiB by tier"):
        table.add_column(name, justify="left" if name in ("mode", "KV in MiB by tier") else "right")
    for mode, one in sessions.items():
        right = sum(given.text == fact.answer for given, fact in zip(one.answers, asked))
        speed, share = f"{one.tokens_per_second:.1f}", f"{one.attended_share:.1%}"
        table.add_row(mode, f"{right}/{len(asked)}", share, speed, f"{one.prefill_seconds:.1f}", tiers(one.kv_bytes))
    return table


def _gain(sessions: dict[str, Session], console: Console) -> None:
    stock, sparse = sessions[STOCK], sessions["sparse"]
    ratio = sparse.tokens_per_second / stock.tokens_per_second
    console.print(
        f"sparse: {ratio:.2f} x the tokens per second of stock, reading {sparse.attended_share:.1%} of the KV"
    )


def _compare(stock: Session, exact: Session, console: Console) -> bool:
    pairs = list(zip(stock.answers, exact.answers))
    different = sum(left.text != right.text for left, right in pairs)
    farthest = max((left.logits - right.logits).abs().max().item() for left, right in pairs)
    largest = max(left.logits.abs().max().item() for left, _ in pairs)
    verdict = f"{different} of {len(pairs)} answers differ from" if different else "all answers equal to"
    colour = "red" if different else "green"
    console.print(f"\n[{colour}]exact: {verdict} stock[/], logits within {farthest:.1e} (largest logit {largest:.1f})")
    return not different
