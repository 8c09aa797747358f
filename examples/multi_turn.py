"""One long prefix, many continuations: the cache that generate() returns starts the next turn, and can be forked."""

import sys

import torch

import scout_hf
from scout_hf import CACHE  # "cache", or "past_key_values" before transformers 5.24
from scout_hf.eval.pocket import load_pocket, make_document

model, tokenizer = load_pocket()
document = make_document(tokens=2048, facts=8, seed=3)
handle = scout_hf.patch(model, budget=512, block_size=16)


def turn(ids, question, cache):
    """Append a question to the conversation; returns the new conversation, its cache and the answer."""
    asked = torch.cat([ids, tokenizer(question, return_tensors="pt").input_ids], dim=1)
    out = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        **{CACHE: cache},
    )
    return out.sequences, out[CACHE], tokenizer.decode(out.sequences[0, asked.shape[1] :])


start = tokenizer(document.text, return_tensors="pt").input_ids
with torch.no_grad():
    prefix = model(start, logits_to_keep=1, **{CACHE: handle.new_cache()})[CACHE]

# Every fork shares the pages of the prefix and copies only what it writes to.
alone = [turn(start, fact.question, prefix.fork())[2] for fact in document.facts[:4]]

# One conversation: each turn continues from the cache of the one before, so nothing is prefilled twice.
ids, cache, talked = start, prefix.fork(), []
for fact in document.facts[:4]:
    ids, cache, answer = turn(ids, fact.question, cache)
    ids = torch.cat([ids, tokenizer(".", return_tensors="pt").input_ids], dim=1)
    talked.append(answer)

for fact, *answers in zip(document.facts, alone, talked):
    print(f"{fact.question}: expected {fact.answer!r}; from a fork and in one conversation: {answers}")
print(f"prefilled {handle.stats().prefill_tokens} tokens, of which the document {document.tokens}")
right = sum(fact.answer == answer for fact, answer in zip(document.facts, alone))
if prefix.get_seq_length() != document.tokens or right < 3:
    sys.exit(f"a fork changed the prefix, or only {right} of 4 answers are right")
print("ok")
