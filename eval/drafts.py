"""Lossless drafts beside exact decoding: are the tokens equal, and what do drafts gain over an emulated link.

``python -m scout_hf.eval.drafts equal smollm2-135m --generations 200`` generates greedily from pieces of a text, with
and without drafts, on one tier and on two in turn, and ends with an error if a token differs.

``python -m scout_hf.eval.drafts link smollm2-135m --context 8192`` times decoding by drafts, by sparse steps, by exact
steps and by ``dense``, over a link of 1/50 of what memory reads. The text must be that long. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

import scout_hf
from scout_hf import CACHE, ScoutCache
from scout_hf.eval.language import load

MEASURED_BYTES = 1 << 28
OTHERWISE = {"method": "scout", "budget": None, "split": "auto", "link_gbps": None}
SKIPPED = 12
"""Tokens at the begin of a generation that are not timed: drafts measure both kinds of steps there."""


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    def per_second(self, skipped: int) -> float:
        """Tokens per second, without the prompt and the first ``skipped`` tokens."""
        times = self.times[1 + skipped :]
        return (len(times) - 1) / (times[-1] - times[0])


def equal(name: str, text: str, generations: int, new: int, most: int, budget: int, seed: int = 0) -> dict[str, Any]:
    """Greedy generations of a model with and without drafts; how many are equal."""
    model, tokenizer = load(name, dtype=torch.float32)
    ids, chance = tokenizer(text, return_tensors="pt").input_ids, random.Random(seed)
    same = drafted = accepted = checks = 0
    for number in range(generations):
        tokens = chance.randrange(2 * budget, 4 * budget)
        first = chance.randrange(ids.shape[1] - tokens)
        prompt = ids[:, first : first + tokens]
        settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new, "do_sample": False}
        with scout_hf.patch(model, budget=None):
            wanted = model.generate(prompt, **settings)
        with scout_hf.patch(model, draft=most, budget=budget, split="cpu" if number % 2 else "off") as handle:
            got, stats = model.generate(prompt, **settings), handle.stats()
        same += torch.equal(got, wanted)
        drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
        checks += stats.draft_checks
        if number % 10 == 9 or number == generations - 1:
            print(f"{same} of {number + 1} equal, {accepted} of {drafted} drafts accepted, {checks} checks", flush=True)
    assert drafted, "nothing was drafted: let the budget be smaller"
    return {"generations": generations, "equal": same, "drafted": drafted, "accepted": accepted, "checks": checks}


def link(name: str, text: str, context: int, share: float, budget: int, new: int) -> dict[str, Any]:
    """Tokens per second by each way of decoding, over a link of ``share`` of what memory reads."""
    model, tokenizer = load(name, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :context]
    if ids.shape[1] < context:
        raise SystemExit(f"the text has {ids.shape[1]} tokens; give more with --text, or a smaller --context")
    memory = statistics.median(_reads() for _ in range(5))
    over = {"link_gbps": share * memory}
    ways: dict[str, dict[str, Any]] = {
        "drafts": {"draft": True, "budget": budget, "split": "cpu", **over},
        "sparse": {"budget": budget, "split": "cpu", **over},
        "dense": {"method": "dense", **over},
        "exact, one tier": {"budget": None, "split": "off"},
    }
    found: dict[str, Any] = {"context": context, "memory_gbps": memory, **over}
    tokens = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "prompt.kv"
        with scout_hf.patch(model, budget=None, split="off") as handle, torch.no_grad():
            cache = handle.new_cache()
            for part in ids[:, :-1].split(512, dim=1):
                model(part, **{CACHE: cache}, logits_to_keep=1)
            cache.save(kept)
        for way, options in ways.items():
            count = new if "budget" in options else SKIPPED + 8
            settings = {name: value for name, value in options.items() if name != "draft"}
            with scout_hf.patch(model, **options) as handle:
                cache, clock = ScoutCache.load(kept, model, **OTHERWISE | settings), Clock()
                count_of = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, CACHE: cache}
                out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **count_of)
                tokens[way], stats = out[0, context:], handle.stats()
            assert stats.attended_tokens < context / 2 if way == "sparse" else way == "drafts" or stats.exact
            assert way != "dense" or stats.recalled_bytes > 0.9 * stats.steps * stats.kv_bytes["host"]
            found[way] = {"tokens_per_second": clock.per_second(SKIPPED), "attended": stats.attended_tokens}
            found[way] |= {"acceptance": stats.acceptance, "tokens_per_exact_pass": stats.tokens_per_exact_pass}
            print(way, json.dumps(found[way]), *stats.notes, sep="\n  ", flush=True)
    assert found["drafts"]["acceptance"] is not None, "nothing was drafted"
    shortest = min(map(len, tokens.values()))
    exact = tokens["exact, one tier"][:shortest]
    found["equal"] = all(torch.equal(tokens[way][:shortest], exact) for way in ("drafts", "dense"))
    speed = {way: found[way]["tokens_per_second"] for way in ways}
    found["drafts_to"] = {way: speed["drafts"] / speed[way] for way in ways}
    return found


def _reads() -> float:
    """GB/s that memory is read at."""
    data = torch.ones(MEASURED_BYTES // 4)
    begun = time.perf_counter()
    data.sum()
    return MEASURED_BYTES / (time.perf_counter() - begun) / 1e9


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = parser.add_subparsers(required=True, dest="way")
    for way, options in {
        "equal": {"generations": 200, "new": 32, "most": 5, "budget": 128},
        "link": {"context": 8192, "budget": 2048, "new": 80},
    }.items():
        one = ways.add_parser(way)
        one.add_argument("name", metavar="model", help="a packaged model, a folder, or a name of the hub")
        one.add_argument("--text", nargs="+", type=Path, default=[Path(__file__)], help="files to take prompts from")
        for option, default in options.items():
            one.add_argument(f"--{option}", type=int, default=default)
    one.add_argument("--share", type=float, default=1 / 50, help="of what memory reads")
    given = vars(parser.parse_args())
    way, given["text"] = given.pop("way"), "\n\n".join(path.read_text(encoding="utf-8") for path in given["text"])
    found = {"equal": equal, "link": link}[way](**given)
    print(json.dumps(found, indent=1))
    if way == "equal" and found["equal"] < found["generations"]:
        raise SystemExit(f"{found['generations'] - found['equal']} generations differ")


if __name__ == "__main__":
    main()
