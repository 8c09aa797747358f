"""Read a book once and ask it as often as you like: what was read is on disk, and the next process finds it there."""

import sys
import time

import torch

import scout_hf
from scout_hf import CACHE
from scout_hf.eval.pocket import load_pocket, make_document

book = make_document(tokens=8192, facts=8, seed=5)
store = scout_hf.PrefixStore("kv-store", limit="2GiB")


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt").input_ids


def read():
    """The first process: reads the book ahead. An interrupted reading goes on where it was."""
    model, tokenizer = load_pocket()
    start = time.perf_counter()
    with scout_hf.patch(model, budget=512, block_size=16, store=store) as handle:
        reading = handle.read(ids_of(tokenizer, book.text))
    print(f"found {reading.found} tokens, read the other {reading.tokens - reading.found}", end=" ")
    print(f"in {time.perf_counter() - start:.2f} s; {reading.kept} are kept, {reading.size / 1e6:.0f} MB")


def ask():
    """Any later process: every prompt that begins with the book begins on disk, in whatever way it is generated."""
    model, tokenizer = load_pocket()
    answers, start = [], time.perf_counter()
    with scout_hf.patch(model, budget=512, block_size=16, store=store) as handle:
        cache = handle.read(ids_of(tokenizer, book.text)).cache
        for fact in book.facts:
            ids = ids_of(tokenizer, f"{book.text} {fact.question}")
            # Without a cache, generate() looks the prompt up by itself, and keeps what it read of the question, too.
            tokens = model.generate(ids, max_new_tokens=3, do_sample=False, **{CACHE: cache.fork()})
            answers.append(tokenizer.decode(tokens[0, ids.shape[1] :]))
        stats = handle.stats()
    seconds = time.perf_counter() - start
    print(f"found {stats.found_tokens} tokens, read {stats.prefill_tokens}", end=" ")
    print(f"and answered {len(answers)} questions in {seconds:.2f} s")
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)  # for a model of one million parameters
    read()
    answers = ask()
    for fact, answer in zip(book.facts, answers):
        print(f"{fact.question}? {answer!r}, expected {fact.answer!r}")
    right = sum(fact.answer == answer for fact, answer in zip(book.facts, answers))
    if right < 6:
        sys.exit(f"only {right} of {len(answers)} answers are right")
    print("ok")
