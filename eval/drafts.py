"""Lossless drafts beside exact decoding: are the tokens equal, and what do drafts gain over an emulated link.

``python -m scout_hf.eval.drafts equal smollm2-135m --generations 200`` generates greedily from pieces of a text, with
and without drafts, on one tier and on two in turn, and ends with an error if a token differs.

``python -m scout_hf.eval.drafts link smollm2-135m --context 8192`` is ``scout-hf bench drafts``: it times decoding by
drafts, by sparse steps, by exact steps and by ``dense``, over a link of 1/50 of what memory reads. The text must be
that long. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

import scout_hf
from scout_hf.eval.bench import report
from scout_hf.eval.bench.options import Drafts
from scout_hf.eval.language import load


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


def link(name: str, text: list[Path], out: Path | None, **options: Any) -> dict[str, Any]:
    """Measure what ``scout-hf bench drafts`` does, and show it; the record."""
    record = Drafts(name, text=text, yes=True, **options).measure(print)
    report.show(record)
    for line in [] if out is None else report.save(record, out):
        print(line)
    return record


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = parser.add_subparsers(required=True, dest="way")
    for way, options in {
        "equal": {"generations": 200, "new": 32, "most": 5, "budget": 128},
        "link": {"context": 16384, "budget": 2048, "most": 16, "new": 80, "exact-new": 8, "rounds": 1},
    }.items():
        one = ways.add_parser(way)
        one.add_argument("name", metavar="model", help="a packaged model, a folder, or a name of the hub")
        one.add_argument("--text", nargs="+", type=Path, default=[], help="files to take prompts from; own sources")
        for option, default in options.items():
            one.add_argument(f"--{option}", type=int, default=default)
    one.add_argument("--share", type=float, default=1 / 50, help="of what memory reads")
    one.add_argument("--session", type=Path, help="where the prompt is kept, so that later runs need not read it")
    one.add_argument("--out", type=Path, help="folder for the record and a plot")
    given = vars(parser.parse_args())
    if given.pop("way") == "link":
        link(**given)
        return
    files = given["text"] or [Path(__file__), *Path(scout_hf.__file__).parent.glob("*.py")]
    given["text"] = "\n\n".join(path.read_text(encoding="utf-8") for path in files)
    found = equal(**given)
    print(json.dumps(found, indent=1))
    if found["equal"] < found["generations"]:
        raise SystemExit(f"{found['generations'] - found['equal']} generations differ")


if __name__ == "__main__":
    main()
