"""A real model in transformers, with scout_hf, and in other runtimes: reading a text, then decoding behind it.

All arms are timed in turn, in rounds; the other runtimes are in processes of their own, which wait meanwhile. Each arm
proves what it did: tokens in its cache, tokens attended, and that it goes on as the model of transformers would.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scout_hf
from scout_hf.errors import ConfigError
from scout_hf.eval import rules
from scout_hf.eval.arms import RIVALS, Missing
from scout_hf.eval.bench import bandwidth, machine
from scout_hf.eval.bench.options import Rivals, Tell, all_but, silent
from scout_hf.eval.bench.rivals_idle import Arm, Idle
from scout_hf.eval.bench.rivals_ours import Ours, format_of
from scout_hf.eval.bench.rivals_process import RivalError
from scout_hf.eval.bench.rivals_theirs import Setting, Their, files_for, settings_for
from scout_hf.eval.bench.timing import Timing
from scout_hf.eval.language.load import ask_at_terminal, load
from scout_hf.eval.language.reference import reference_text
from scout_hf.eval.records import write_record
from scout_hf.eval.tables import short, three
from scout_hf.files import read_json

FIRST_TOKENS = 8
"""In the cache before the first step of a context of 0."""

FEW = 256
"""A shorter text is over before reading it can be timed."""

PROMPTS, PROMPT_TOKENS, APART, LIKELY = 8, 48, 97, 5
"""Texts behind which others must go on with one of the likeliest tokens, and by how many tokens they are apart."""

LONGEST_WORD = 8
"""Characters of a token, more than on average."""

READ_REPEAT = 5
SPARE_BYTES = 3 << 30
WITH_DIGESTS = 1.15
BUSY = 0.05
QUICK = {"contexts": [0, 8192], "prefill": 1024, "rounds": 2, "steps": 4}
GIVEN = ("out", "gguf", "openvino", "rivals_python", "yes", "quick", "model")


def run(options: Rivals, tell: Tell = silent, seed: int = 0) -> dict[str, Any]:
    """Measure a model; the record, with those of other models that ``out`` had. It is written after each context."""
    options = replace(options, **QUICK) if options.quick else options
    contexts = sorted(set(options.contexts))
    forms = list(dict.fromkeys(format_of(name) for name in options.weights))
    scout_hf.ScoutConfig(budget=options.budget, block_size=options.block_size)
    threads = options.threads or min(torch.get_num_threads(), len(machine.usable_cpus()))
    record, entry = _begin(options, contexts, forms, threads)
    ask = (lambda question: True) if options.yes else ask_at_terminal
    with machine.measuring(threads, tell) as company:
        entry["read"] = bandwidth.read_rate(threads, READ_REPEAT)
        with ExitStack() as stack:
            bench = _Bench(options, contexts, forms, threads, seed, ask, tell, stack, entry)
            for context in contexts:
                entry["contexts"].append(bench.measure(context))
                tell(_told(entry["contexts"][-1]))
                _write(record, options.out)
            entry["idle_cpus"] = bench.idle()
        # Processes that ended count as this one's, and not as others.
        entry["company"] = company.record()
    for name, cpus in entry["idle_cpus"].items():
        if cpus > BUSY:
            tell(f"warning: {name} used {cpus:.2f} CPUs while others were timed")
    _write(record, options.out)
    return record


class _Bench:
    """All arms of a model, ready to be measured."""

    def __init__(
        self,
        options: Rivals,
        contexts: Sequence[int],
        forms: Sequence[str],
        threads: int,
        seed: int,
        ask: Callable[[str], bool],
        tell: Tell,
        stack: ExitStack,
        entry: dict[str, Any],
    ):
        self.options, self.tell, self.entry, self._stack = options, tell, entry, stack
        self._order, self._idle = random.Random(seed), Idle()
        longest = max(FIRST_TOKENS, *contexts)
        tell(f"loading {options.model}")
        _, tokenizer = load(options.model, ask, tell, torch.bfloat16)
        self.ids = _text(tokenizer, longest)
        scout = {"budget": options.budget, "block_size": options.block_size, "ask": ask, "tell": tell}
        wanted = [name for name in RIVALS if _is_chosen(name, options.arm)]
        self.ours = {form: Ours(options.model, form, stack, self.ids, wanted, **scout) for form in forms}
        first = next(iter(self.ours.values()))
        config = first.model.config.get_text_config()
        entry["model"] = {
            name: getattr(config, name, None)
            for name in ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
        }
        self._check_memory(config, longest, len(wanted))
        self.arms: dict[str, Arm] = {}
        for form, ours in self.ours.items():
            for name in ours.chosen:
                title = self._title(form, name)
                self.arms[title] = ours.decoders[name]
                entry["arms"].append({"name": title, "kind": "transformers", "weights": form, "kv": _kv(form)})
        prompts = [self.ids[place : place + PROMPT_TOKENS] for place in range(0, PROMPTS * APART, APART)]
        likely = first.likeliest(prompts, LIKELY)
        for setting in self._settings(config, ask):
            if _is_chosen(setting.name, options.arm):
                self._open(setting, threads, longest, prompts, likely)

    def measure(self, context: int) -> dict[str, Any]:
        """Read up to a context, then decode in rounds."""
        tokens, options = max(context, FIRST_TOKENS), self.options
        row: dict[str, Any] = {"context": context, "prefill": {}, "arms": {}}
        # A text is read as far as was asked, and what is decoded behind in a longer context is that repeated.
        reads = min(tokens, options.prefill)
        for form, ours in self.ours.items():
            if reads <= ours.length():
                continue
            self.tell(f"context {context}: reading {reads} tokens, {form}")
            for name, seconds in ours.read(reads).items():
                if tokens == reads >= FEW:
                    row["prefill"][self._title(form, name)] = seconds
        for name, arm in list(self.arms.items()):
            if isinstance(arm, Their):
                seconds = self._watched(name, lambda arm=arm, name=name: self._read(arm, name, reads, tokens))
                if seconds and tokens >= FEW:
                    row["prefill"][name] = seconds
        for ours in self.ours.values():
            ours.start(tokens, options.steps)
        self._decode(row)
        return row

    def idle(self) -> dict[str, float]:
        """CPUs that each process used on average while another one was timed."""
        return self._idle.shares()

    def _read(self, arm: Their, name: str, reads: int, tokens: int) -> float | None:
        """Have so many tokens in the cache of an arm; seconds, if it read them all."""
        seconds = None
        if reads > arm.length():
            self.tell(f"context {tokens}: reading {reads} tokens, {name}")
            seconds = arm.read(reads)
        if reads < tokens:
            self.tell(f"context {tokens}: {'filling' if arm.rival.fills else 'reading'}, {name}")
            seconds = arm.fill(tokens)
        return seconds

    def _decode(self, row: dict[str, Any]) -> None:
        self.tell(f"context {row['context']}: {self.options.rounds} rounds of steps")
        taken: dict[str, list[list[float]]] = {name: [] for name in self.arms}
        done: dict[str, dict[str, Any]] = {}
        for _ in range(self.options.rounds):
            names = list(self.arms)
            for name in self._order.sample(names, len(names)):
                arm = self.arms[name]
                with self._idle.turn(arm, self.arms):
                    found = self._watched(name, arm.steps)
                if found:
                    taken[name].append(found[0])
                    done[name] = found[1]
        ours = next(iter(self.ours.values()))
        for name, arm in list(self.arms.items()):
            if isinstance(arm, Their):
                numbers = ours.kv_numbers(done[name]["held_tokens"])
                facts = self._watched(name, lambda arm=arm, numbers=numbers: arm.facts(numbers))
            else:
                facts = arm.facts()
            if facts:
                row["arms"][name] = self._found(taken[name], facts | done[name])
        rounds = {name: one["rounds_ms"] for name, one in row["arms"].items()}
        row["ratios"] = {
            f"{one}/{other}": float(np.median([a / b for a, b in zip(rounds[one], rounds[other])]))
            for one in rounds
            for other in rounds
            if one != other
        }

    def _found(self, rounds: list[list[float]], facts: dict[str, Any]) -> dict[str, Any]:
        seconds = tuple(one for part in rounds for one in part)
        found = Timing(seconds, (False,) * len(seconds)).record(facts["read_bytes"])
        return found | {
            "tokens_per_s": 1e3 / found["median_ms"],
            "limit_ms": facts["read_bytes"] / self.entry["read"]["gb_per_s"] / 1e6,
            "rounds_ms": [1e3 * float(np.median(part)) for part in rounds],
            **facts,
        }

    def _watched(self, name: str, call: Callable[[], Any]) -> Any:
        """What a call gives; an arm that fails is told of, and takes no further part."""
        try:
            return call()
        except RivalError as error:
            self._failed(name, f"failed: {error}")
            arm = self.arms.pop(name)
            if isinstance(arm, Their):
                arm.close()
            else:
                for ours in self.ours.values():
                    ours.drop(arm)
            return None

    def _failed(self, name: str, why: str) -> None:
        self.tell(f"{name}: {why}")
        next(one for one in self.entry["arms"] if one["name"] == name)["told"] = why

    def _settings(self, config: Any, ask: Callable[[str], bool]) -> list[Setting]:
        options = self.options
        files = files_for(options.model, options.gguf, options.f16, ask, self.tell)
        found = settings_for(files, options.openvino, config.num_hidden_layers, config.vocab_size)
        if not found:
            why = "needs the same weights as a GGUF file: --gguf FILE"
            for kind in ("llama.cpp", "OpenVINO"):
                if _is_chosen(kind, options.arm):
                    self.entry["arms"].append({"name": kind, "kind": kind, "weights": "", "kv": "", "told": why})
                    self.tell(f"{kind}: {why}")
        return found

    def _open(self, setting: Setting, threads: int, longest: int, prompts: Any, likely: Any) -> None:
        name, python = setting.name, self.options.rivals_python or sys.executable
        told = {"name": name, "kind": setting.kind, "weights": setting.weights, "kv": setting.kv}
        self.entry["arms"].append(told)
        self.tell(f"opening {name}")
        try:
            arm = Their(setting, python, threads, longest, self.ids, self.options.steps, self.tell)
        except Missing as why:
            self._failed(name, str(why))
            return
        except RivalError as error:
            self._failed(name, f"failed: {error}")
            return
        self._stack.callback(arm.close)
        self.arms[name] = arm
        told |= {"weights": arm.setting.weights, "attention": arm.attention, "versions": arm.rival.versions}
        told["agrees"] = self._watched(name, lambda: arm.must_be(prompts, likely))

    def _title(self, form: str, name: str) -> str:
        return name if len(self.ours) == 1 else f"{name} ({form.partition(' (')[0].removeprefix('torch ')})"

    def _check_memory(self, config: Any, tokens: int, arms: int) -> None:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head
        # Stock and stock folded have one cache; two are read, of which one is what all others are filled from.
        held = WITH_DIGESTS * max(1, arms - 1) * tokens + 2 * min(tokens, self.options.prefill)
        need = sum(numbers * held * ours.model.dtype.itemsize for ours in self.ours.values())
        machine.check_memory(int(need) + SPARE_BYTES, "lower --contexts, or choose arms with --arm")


def _begin(
    options: Rivals, contexts: list[int], forms: list[str], threads: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record, with other models that were measured before, and the entry of this one."""
    settings = all_but(options, *GIVEN) | {"contexts": contexts, "weights": forms, "threads": threads}
    path, models = options.out and options.out / "rivals.json", []
    if path and path.exists():
        held = read_json(path, rules.RIVALS, "give another --out, or move the file away")
        models = [one for one in held["models"] if one["name"] != options.model]
    facts = machine.describe()
    entry = {"name": options.model, "settings": settings, "machine": facts, "company": None, "arms": [], "contexts": []}
    record = {"benchmark": "rivals", "settings": settings, "machine": facts, "models": [*models, entry]}
    return record, entry


def _write(record: dict[str, Any], out: Path | None) -> None:
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_record(record, out / "rivals.json")


def _told(row: dict[str, Any]) -> str:
    """One line for who waits."""
    times = ", ".join(f"{name} {three(one['median_ms'])}" for name, one in row["arms"].items())
    return f"context {short(row['context'])}, ms a step: {times}"


def _text(tokenizer: Any, tokens: int) -> list[int]:
    """Tokens of a text in plain English, from its beginning again where it is too short."""
    wanted = max(tokens, PROMPTS * APART + PROMPT_TOKENS)
    found = tokenizer(reference_text()[: wanted * LONGEST_WORD], add_special_tokens=False)["input_ids"]
    if not found:
        raise ConfigError("the model's tokenizer makes no tokens of English text")
    return (found * -(-wanted // len(found)))[:wanted]


def _is_chosen(name: str, chosen: Sequence[str] | None) -> bool:
    return not chosen or any(name.lower().startswith(one.lower()) for one in chosen)


def _kv(form: str) -> str:
    return "bfloat16" if "bfloat16" in form else "float32"
