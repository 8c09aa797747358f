"""Lossless drafts over a slow link: tokens per second beside exact and sparse decoding, with the same tokens.

A real model continues a real text, whose keys and values lie in host memory behind an emulated link. How many drafts
are accepted depends on both, so neither can be random here. That the exact arms chose the same tokens, and that each
arm did what its name says, is checked.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

import scout_hf
from scout_hf import CACHE, ScoutCache
from scout_hf.errors import ConfigError
from scout_hf.eval.bench import machine
from scout_hf.eval.bench.bandwidth import read_rate
from scout_hf.eval.bench.models import SHAPE
from scout_hf.eval.bench.options import Drafts, Tell, all_but, silent
from scout_hf.eval.caches import kv_bytes_per_token
from scout_hf.eval.clock import Clock
from scout_hf.eval.language.load import ask_at_terminal, load

GIVEN = ("out", "text", "session", "yes")
KEPT = {"budget": None, "split": "off"}
"""Settings of the cache that reads the prompt, and of the sessions that are kept."""
OTHERWISE = {"method": "scout", "budget": None, "split": "auto", "link_gbps": None}
REFERENCE = "one tier"
SKIPPED = 12
"""Tokens at the begin of a generation with drafts that are not timed: drafts measure both kinds of passes there."""
FEW = 2
"""The same for others."""
PIECE = 512
AT_LEAST = {"drafts": 3.0, "dense+drafts": 3.0}
"""Times the tokens per second of dense."""
SPARE_BYTES = 1 << 30


class Arm(NamedTuple):
    """A way to decode: options of ``patch``, and whether they draft, cross the link, and are exact."""

    options: dict[str, Any]
    drafts: bool = False
    link: bool = True
    exact: bool = True
    stepwise: bool = False  # by passes of one token, which are exact beside drafts


def arms_of(options: Drafts) -> dict[str, Arm]:
    """All arms by name, in the order of the tables."""
    two_tiers, dense = {"budget": options.budget, "split": "cpu"}, {"method": "dense"}
    return {
        "drafts": Arm(two_tiers | {"draft": options.most}, drafts=True),
        "dense+drafts": Arm(dense | {"budget": options.budget, "draft": options.most}, drafts=True),
        "sparse": Arm(two_tiers, exact=False),
        "dense": Arm(dense),
        "exact steps": Arm(two_tiers | {"draft": options.most}, stepwise=True),
        REFERENCE: Arm(dict(KEPT), link=False),
    }


def run(options: Drafts, tell: Tell = silent, seed: int = 0, loaded: Any = None) -> dict[str, Any]:
    """Measure all arms and return a record in a form that JSON takes; ``loaded`` is a model and its tokenizer."""
    if options.budget >= options.context:
        raise ValueError(f"--budget {options.budget}: within the budget nothing is drafted; take less than --context")
    threads = options.threads or min(torch.get_num_threads(), len(machine.usable_cpus()))
    with machine.measuring(threads, tell) as company, ExitStack() as stack:
        memory = read_rate(threads, 5)
        ask = (lambda question: True) if options.yes else ask_at_terminal
        model, tokenizer = loaded or load(options.model, ask, tell, torch.float32)
        text = model.config.get_text_config(decoder=True)
        of_token = kv_bytes_per_token(text)
        machine.check_memory(3 * of_token * options.context + SPARE_BYTES, "lower --context")
        ids = prompt_of(options, tokenizer)
        kept = options.session or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "prompt.kv"
        _read_prompt(model, ids, kept, tell)
        bench = _Bench(options, model, ids, kept, options.share * memory["gb_per_s"], tell)
        arms = bench.measure(random.Random(seed))
    return {
        "benchmark": "drafts",
        "settings": all_but(options, *GIVEN) | {"threads": threads, "seed": seed},
        "machine": machine.describe(),
        "company": company.record(),
        "model": {
            **{name: getattr(text, name) for name in SHAPE if hasattr(text, name)},
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_bytes_per_token": of_token,
        },
        "read": memory,
        "link_gbps": bench.link,
        "arms": arms,
        "ratios": {f"{name}/dense": one["tokens_per_s"] / arms["dense"]["tokens_per_s"] for name, one in arms.items()},
        "targets": targets(arms),
    }


def targets(arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What must hold, what was found, and whether it holds."""
    dense = arms["dense"]["tokens_per_s"]
    rows = [(f"{name}/dense", bound, arms[name]["tokens_per_s"] / dense) for name, bound in AT_LEAST.items()]
    rows.append(("exact steps/dense", 0.95, arms["exact steps"]["tokens_per_s"] / dense))
    return [{"name": name, "bound": bound, "found": found, "held": found >= bound} for name, bound, found in rows]


def prompt_of(options: Drafts, tokenizer: Any) -> torch.Tensor:
    """The first tokens of the text, (1, context); ValueError if it is shorter."""
    files = options.text or sorted(Path(scout_hf.__file__).parent.rglob("*.py"))
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in files)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : options.context]
    if ids.shape[1] < options.context:
        raise ValueError(
            f"--context {options.context}: the text has {ids.shape[1]} tokens; give more with --text, or a smaller one"
        )
    return ids


def _read_prompt(model: Any, ids: torch.Tensor, kept: Path, tell: Tell) -> None:
    """Let all but the last token be in a session: read it, unless there is one."""
    if kept.exists():
        held = ScoutCache.load(kept, model).token_ids
        if held is None or not torch.equal(held, ids[:, :-1]):
            raise ConfigError(
                f"{kept} is a session of another text or length than --text and --context give; give the ones that it "
                "was made with, or another --session"
            )
        return
    tell(f"reading {ids.shape[1]} tokens")
    with scout_hf.patch(model, **KEPT) as handle, torch.no_grad():
        cache = handle.new_cache()
        for part in ids[:, :-1].split(PIECE, dim=1):
            model(part, **{CACHE: cache}, logits_to_keep=1)
        cache.save(kept)


class _Bench:
    """All arms over one prompt."""

    def __init__(self, options: Drafts, model: Any, ids: torch.Tensor, kept: Path, link: float, tell: Tell):
        self.options, self.model, self.ids, self.kept, self.link, self.tell = options, model, ids, kept, link, tell
        self.arms = arms_of(options)

    def measure(self, order: random.Random) -> dict[str, dict[str, Any]]:
        """Results by arm; all arms in random order in every round."""
        speeds: dict[str, list[float]] = {name: [] for name in self.arms}
        facts: dict[str, dict[str, Any]] = {}
        tokens: dict[str, torch.Tensor] = {}
        for number in range(self.options.rounds):
            for name in order.sample(list(self.arms), len(self.arms)):
                self.tell(f"round {number + 1} of {self.options.rounds}: {name}")
                speed, chosen, facts[name] = self._one(name, self.arms[name])
                speeds[name].append(speed)
                if self.arms[name].exact and not torch.equal(tokens.setdefault(name, chosen), chosen):
                    raise RuntimeError(f"{name} chose other tokens in another round")
                tokens[name] = chosen
        known = tokens[REFERENCE]
        return {
            name: facts[name]
            | {
                "tokens_per_s": statistics.median(speeds[name]),
                "rounds_tokens_per_s": speeds[name],
                "tokens": len(tokens[name]),
                "equal": _same(tokens[name], known) if arm.exact else None,
            }
            for name, arm in self.arms.items()
        }

    def _one(self, name: str, arm: Arm) -> tuple[float, torch.Tensor, dict[str, Any]]:
        """Tokens per second, the tokens, and what the statistics say."""
        new = self.options.new if arm.drafts or not arm.exact or not arm.link else FEW + self.options.exact_new
        over: dict[str, Any] = {"link_gbps": self.link} if arm.link else {}
        settings = {key: value for key, value in arm.options.items() if key != "draft"}
        decode: Callable[..., tuple[float, torch.Tensor]] = self._stepwise if arm.stepwise else self._generated
        with scout_hf.patch(self.model, **arm.options, **over) as handle:
            cache = ScoutCache.load(self.kept, self.model, **OTHERWISE | settings | over)
            speed, tokens = decode(cache, new, SKIPPED if arm.drafts else FEW)
            stats = handle.stats()
        if arm.drafts and not stats.drafted_tokens:
            raise ConfigError(
                f"{name}: nothing was drafted ({'; '.join(stats.notes)}); take another --model or --context"
            )
        if wrong := _not_done(name, arm, stats, self.options.context):
            raise RuntimeError(f"{name}: {wrong}; this is a fault of the benchmark")
        found = {
            "attended": stats.attended_tokens,
            "drafted": stats.drafted_tokens,
            "checks": stats.draft_checks,
            "acceptance": stats.acceptance,
            "tokens_per_exact_pass": stats.tokens_per_exact_pass,
            "notes": list(stats.notes),
        }
        return speed, tokens, found

    def _generated(self, cache: ScoutCache, new: int, skipped: int) -> tuple[float, torch.Tensor]:
        clock, count = Clock(), {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        mask = torch.ones_like(self.ids)
        out = self.model.generate(self.ids, attention_mask=mask, streamer=clock, **count, **{CACHE: cache})
        return clock.per_second(skipped), out[0, self.ids.shape[1] :]

    def _stepwise(self, cache: ScoutCache, new: int, skipped: int) -> tuple[float, torch.Tensor]:
        token, chosen, clock = self.ids[:, -1:], [], Clock()
        clock.put(token)
        with torch.no_grad():
            for _ in range(new):
                token = self.model(token, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
                chosen.append(token)
                clock.put(token)
        return clock.per_second(skipped), torch.cat(chosen, dim=1)[0]


def _not_done(name: str, arm: Arm, stats: Any, context: int) -> str | None:
    """What an arm did not do that its name says; None if it did all of it."""
    if arm.exact != stats.exact:
        return f"exact is {stats.exact}"
    if not arm.exact and stats.attended_tokens > 0.75 * context:
        return f"steps attended to {stats.attended_tokens:.0f} of {context} tokens"
    if name == "dense" and stats.recalled_bytes < 0.9 * stats.steps * stats.kv_bytes["host"]:
        return f"{stats.recalled_bytes} bytes crossed the link in {stats.steps} steps"
    return None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    count = min(len(one), len(other))
    return torch.equal(one[:count], other[:count])
