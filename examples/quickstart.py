"""Patch a model, generate, look at what was attended, and take the patch off again."""

import sys

import scout_hf
from scout_hf.eval.pocket import load_pocket, make_document, questions

model, tokenizer = load_pocket()
prompt, expected = questions(make_document(tokens=2048, facts=8, seed=1))[3]
inputs = tokenizer(prompt, return_tensors="pt")
options = {"max_new_tokens": 3, "do_sample": False}


def new_text(output):
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


before = new_text(model.generate(**inputs, **options))
handle = scout_hf.patch(model, budget=512, block_size=16)
patched = new_text(model.generate(**inputs, **options))
print(handle.stats())
handle.remove()
after = new_text(model.generate(**inputs, **options))

print(f"...{prompt[-120:]}\nexpected: {expected}\nstock:    {before}\npatched:  {patched}")
if not before == after == patched:
    sys.exit("the patched model answered differently, or the patch left something behind")
print("ok")
