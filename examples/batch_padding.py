"""A left-padded batch of unequal rows: padding is neither attended nor counted, each row gets its own answer."""

import sys

import scout_hf
from scout_hf.eval.pocket import load_pocket, make_document, questions

model, tokenizer = load_pocket()
lengths = (512, 1024, 2048)
asked = [questions(make_document(tokens, facts=8, seed=tokens))[2] for tokens in lengths]
prompts = [prompt for prompt, _ in asked]


def generate(texts):
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :])


alone = [generate([prompt])[0] for prompt in prompts]
# A share budget goes by each row's own length.
with scout_hf.patch(model, budget=0.5, block_size=16) as handle:
    sparse = generate(prompts)
    print(handle.stats())
with scout_hf.patch(model, budget=None):
    exact = generate(prompts)

for tokens, (_, expected), *answers in zip(lengths, asked, alone, exact, sparse):
    print(f"{tokens:>5} tokens: expected {expected!r}; alone, exact and sparse: {answers}")
if exact != alone:
    sys.exit("a row of the padded batch was answered differently from the same row alone")
print("ok")
