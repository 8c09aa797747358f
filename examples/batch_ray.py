"""Many prompts about a few documents, each document read once: on two Ray workers, or without Ray in this process."""

import importlib.util
import json
import sys
from pathlib import Path

from transformers.utils import logging

from scout_hf.batch import RayWorkers, Settings, run
from scout_hf.eval.pocket import load_pocket, make_document

SOURCE, TARGET = Path("prompts.jsonl"), Path("answers.jsonl")


def load():
    """Called once in each worker."""
    return load_pocket()[0]


def main():
    rows, expected = [], []
    for seed in range(4):
        document = make_document(tokens=1024, facts=4, seed=seed)
        for fact in document.facts:
            rows.append({"id": f"{seed}: {fact.question}", "prompt": f"{document.text} {fact.question}"})
            expected.append(fact.answer)
    SOURCE.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    logging.disable_progress_bar()
    tokenizer = load_pocket()[1]

    pool = RayWorkers(workers=2) if importlib.util.find_spec("ray") else None
    settings = Settings(max_new_tokens=3, patch={"budget": 256, "block_size": 16})
    done = run(SOURCE, TARGET, tokenizer, load, settings, store="batch-store", ray=pool)
    print(
        f"{done.rows} rows {'on two workers' if pool else 'without Ray'}: of {done.prompt_tokens} tokens in prompts",
        end=" ",
    )
    print(f"{done.read_tokens} were read and {done.found_tokens} found; {done.groups} groups shared the rest")

    # The same call again, as after a kill: nothing is left to do.
    again = run(SOURCE, TARGET, tokenizer, load, settings, store="batch-store", ray=pool)
    answers = [json.loads(line)["answer"] for line in TARGET.read_text(encoding="utf-8").splitlines()]
    right = sum(answer == wanted for answer, wanted in zip(answers, expected))
    print(f"{right} of {len(rows)} answers are right")
    if right < 12 or again.answered or done.failed:
        sys.exit("too few of them, or rows failed, or were answered twice")
    print("ok")


if __name__ == "__main__":
    main()
