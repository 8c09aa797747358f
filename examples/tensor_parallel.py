"""A model over several processes, each with its part of the KV heads. Started by python alone it runs in one process:

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import scout_hf
from scout_hf.eval.pocket import WEIGHTS, make_document, questions

ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
spread = {"tp_plan": "auto"} if ranks > 1 else {}
model = AutoModelForCausalLM.from_pretrained(WEIGHTS / "llama", **spread).eval()
tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "llama")

prompt, expected = questions(make_document(tokens=2048, facts=8, seed=1))[3]
inputs = tokenizer(prompt, return_tensors="pt")
with scout_hf.patch(model, budget=512, block_size=16) as handle:
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    held = handle.stats().kv_bytes["host"]

# Every rank has the whole answer, and a part of the keys and values.
answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
print(f"rank {rank} of {ranks}: {answer!r}, {held / 1e6:.1f} MB of keys and values")
if ranks > 1:
    torch.distributed.destroy_process_group()
if expected not in answer:
    sys.exit(f"expected {expected!r}")
print("ok")
