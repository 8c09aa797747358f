"""The demo with a real language model: what is run, and what is shown of it."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel

from scout_hf import ScoutCache, ScoutConfig
from scout_hf.diagnostics import usable_cpus
from scout_hf.errors import ConfigError
from scout_hf.eval.demo.asking import Session, ask_all, bytes_per_token, open_session, read
from scout_hf.eval.demo.text import Document, Fact, make_prompts, place
from scout_hf.eval.options import Demo
from scout_hf.eval.settings import single_values_of
from scout_hf.selection import check_digest

STOCK, EXACT, SPARSE = "stock", "exact", "sparse"
MOST_THREADS = 8
"""More gain nothing on a model of this size."""
WIDEST = 12
EXCERPT = 300

METHOD = """\
{name} has {parameters:.0f} million parameters, here in {dtype} on {threads} CPU thread(s). The document was read \
once, with stock attention, in {read:.0f} s. Every mode answers from a copy of that cache by model.generate(), all \
modes in turn for each question. A question is read in one pass; each token of an answer is a decode step, also of the \
beginning, which is given. The facts are some that this model finds with full attention. tok/s is of the median step; \
KV read is what a step attends, and digests. exact is budget=None, sparse {settings}."""


def configs_of(options: Demo) -> dict[str, ScoutConfig | None]:
    """Settings by mode; ConfigError for wrong ones."""
    budget = ScoutConfig().sparse_budget if options.budget is None else options.budget
    sparse = ScoutConfig(**({"budget": budget} | single_values_of(options.set)))
    check_digest(sparse.digest, None, sparse.mass)
    return {STOCK: None, EXACT: ScoutConfig(budget=None), SPARSE: sparse}


def run(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    document: Document,
    configs: dict[str, ScoutConfig | None],
    options: Demo,
    console: Console,
) -> bool:
    """Ask a model about a document in every mode and print it; True if exact answered as stock did.

    Parameters
    ----------
    name : str
        Of the model, for the reader.
    model : PreTrainedModel
        Not patched.
    tokenizer : PreTrainedTokenizerBase
    document : Document
    configs : dict
        As :func:`configs_of` gives it.
    options : Demo
    console : Console

    Raises
    ------
    ConfigError
        If more is to be asked than the document has facts, before it is read.
    """
    asked = _spread(len(document.facts), options.questions)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or min(MOST_THREADS, len(usable_cpus())))
    try:
        return _run(name, model, tokenizer, document, configs, asked, console)
    finally:
        torch.set_num_threads(threads)


def _run(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    document: Document,
    configs: dict[str, ScoutConfig | None],
    asked: list[int],
    console: Console,
) -> bool:
    ScoutCache(model.config, configs[SPARSE])  # ConfigError for what this model cannot do, before all is read
    start = time.perf_counter()
    prompts, facts = make_prompts(tokenizer, document), [document.facts[index] for index in asked]
    tokens = len(prompts.shared)
    console.print(_excerpt(document, facts[len(facts) // 2], tokens))
    with tqdm(total=tokens, desc="reading", unit=" tokens", leave=False, disable=None) as bar:
        begun = read(model, prompts.shared, bar.update)
        sessions = {mode: open_session(model, begun, prompts.shared, config) for mode, config in configs.items()}
        bar.update(tokens - begun.get_seq_length())
    said = {
        "name": name,
        "parameters": model.num_parameters() / 1e6,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "read": time.perf_counter() - start,
        "settings": _said(configs[SPARSE] or ScoutConfig()),
    }
    per_token = bytes_per_token(begun)
    del begun
    with tqdm(total=len(asked) * len(sessions), desc="asking", unit=" answers", leave=False, disable=None) as bar:
        ask_all(model, tokenizer, prompts, asked, list(sessions.values()), bar.update)
    places = [place(tokenizer, document, fact) for fact in facts]
    console.print(_answers(sessions, facts, places), _summary(sessions, facts, per_token))
    console.print(METHOD.format(**said), highlight=False)
    same = _compare(sessions[STOCK], sessions[EXACT], console)
    console.print(closing(sessions, facts, per_token), highlight=False, style="bold")
    console.print(f"{time.perf_counter() - start:.0f} seconds in all", style="dim", highlight=False)
    return same


def is_right(text: str, fact: Fact) -> bool:
    """Whether what follows the given beginning is the fact's answer."""
    return text.lower().startswith(fact.answer.lower())


def closing(sessions: dict[str, Session], facts: list[Fact], per_token: float) -> str:
    """One sentence: what was gained, and what was lost."""
    stock, exact, sparse = (sessions[mode] for mode in (STOCK, EXACT, SPARSE))
    right = [[is_right(text, fact) for text, fact in zip(one.texts, facts)] for one in (stock, sparse)]
    lost = sum(before and not after for before, after in zip(*right))
    more = sum(after and not before for before, after in zip(*right))
    loss = f"{lost} of the {sum(right[0])} answers that full attention gives right" if lost else "no right answer"
    luck = f", with {more} right that stock gives wrong" if more else ""
    share = _read_bytes(sparse, per_token) / _read_bytes(stock, per_token)
    sped = [one.tokens_per_second / stock.tokens_per_second for one in (sparse, exact)]
    return (
        f"Gained: {sped[0]:.2f} x the tokens per second of stock by reading {share:.0%} of the KV ({sped[1]:.2f} x "
        f"with exact attention). Lost: {loss}{luck}."
    )


def _spread(there: int, wanted: int | None) -> list[int]:
    """Indices of so many facts, over the whole document."""
    wanted = there if wanted is None else wanted
    if wanted > there:
        raise ConfigError(f"--questions {wanted} is not allowed: the document has {there} facts")
    return [int((index + 0.5) * there / wanted) for index in range(wanted)]


def _excerpt(document: Document, fact: Fact, tokens: int) -> Panel:
    first = document.text.index(fact.text)
    before, after = document.text[max(0, first - EXCERPT) : first], document.text[first + len(fact.text) :][:EXCERPT]
    hidden = f"[bold green]{escape(fact.text)}[/]"
    text = f"... {escape(before.partition(' ')[2])}{hidden}{escape(after.rpartition(' ')[0])} ..."
    asked = f"[bold]{escape(fact.question)}[/]\n{escape(fact.begin)} [bold green]{escape(fact.answer)}[/]"
    return Panel(f"{text}\n\n{asked}", title=f"{document.title}: {tokens} tokens, {len(document.facts)} hidden facts")


def _answers(sessions: dict[str, Session], facts: list[Fact], places: list[int]) -> Table:
    table = Table(title="answers", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("at token", justify="right", min_width=5)
    table.add_column("asked for", overflow="fold")
    for mode in sessions:
        table.add_column(mode, no_wrap=True)
    for row, (fact, at) in enumerate(zip(facts, places)):
        table.add_row(str(at), escape(fact.begin), *(_marked(one.texts[row], fact) for one in sessions.values()))
    return table


def _marked(text: str, fact: Fact) -> str:
    if is_right(text, fact):
        return f"[green]{escape(fact.answer[:WIDEST])}[/]"
    words = " ".join(text.split()[:2]).rstrip(".,") or "nothing"
    return f"[red]✗ {escape(words[: WIDEST - 2])}[/]"


def _summary(sessions: dict[str, Session], facts: list[Fact], per_token: float) -> Table:
    table = Table(title="what it took", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("mode", "right", "tokens attended", "KV read, MB/step", "tok/s", "x stock"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for mode, one in sessions.items():
        right, speed = sum(map(is_right, one.texts, facts)), one.tokens_per_second
        cells = (f"{right}/{len(facts)}", f"{one.attended_tokens:.0f}", f"{_read_bytes(one, per_token) / 1e6:.0f}")
        table.add_row(mode, *cells, f"{speed:.1f}", f"{speed / sessions[STOCK].tokens_per_second:.2f}")
    return table


def _read_bytes(session: Session, per_token: float) -> float:
    exact = session.config is None or session.config.budget is None
    return session.attended_tokens * per_token + (0 if exact else session.digest_bytes)


def _compare(stock: Session, exact: Session, console: Console) -> bool:
    """Say whether all answers are the same, and how far their logits are apart."""
    pairs = list(zip(stock.texts, exact.texts))
    if different := sum(left != right for left, right in pairs):
        console.print(f"\n[red]exact: {different} of {len(pairs)} answers differ from stock[/]", highlight=False)
        return False
    farthest = max(float((left - right).abs().max()) for left, right in zip(stock.logits, exact.logits))
    largest = max(float(left.abs().max()) for left in stock.logits)
    apart = f"logits within {farthest:.1e} (largest logit {largest:.1f})"
    console.print(f"\n[green]exact: all answers equal to stock[/], {apart}", highlight=False)
    return True


def _said(config: ScoutConfig) -> str:
    changed = [field.name for field in fields(config) if getattr(config, field.name) != field.default]
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in changed) or "with default settings"
