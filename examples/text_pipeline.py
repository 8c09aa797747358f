"""transformers.pipeline("text-generation") over a patched model: nothing in the call changes."""

import sys

from transformers import pipeline

import scout_hf
from scout_hf.eval.pocket import load_pocket, make_document, questions

model, tokenizer = load_pocket()
asked = questions(make_document(tokens=1024, facts=8, seed=4))[:4]
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)

with scout_hf.patch(model, budget=512, block_size=16) as handle:
    outputs = generate([prompt for prompt, _ in asked], max_new_tokens=3, do_sample=False, return_full_text=False)
    stats = handle.stats()

right = 0
for (prompt, expected), output in zip(asked, outputs):
    answer = output[0]["generated_text"].strip()
    right += answer == expected
    print(f"{' '.join(prompt.split()[-7:])} -> {answer} (expected {expected})")
print(f"attended {stats.attended_tokens:.0f} of {stats.context_tokens:.0f} tokens per step")
if right < 3 or not stats.steps:
    sys.exit(f"only {right} of {len(asked)} answers are right, in {stats.steps} patched decode steps")
print("ok")
