"""A method of one's own: attention sinks and the newest tokens (StreamingLLM, arXiv 2309.17453), in one small class."""

import sys

import scout_hf
from scout_hf.eval.pocket import load_pocket, make_document, questions
from scout_hf.fusion import fuse
from scout_hf.kernels.attend import attend
from scout_hf.methods import Method, register_method
from scout_hf.stores import PagedKV


@register_method
class SinksAndWindow(Method):
    """A decode step attends to the first and the newest tokens; prompts and next turns to everything."""

    name = "sinks-and-window"
    options = {"recent": 512}

    def __init__(self, config, layer_idx, keys):
        super().__init__(config, layer_idx, keys)
        batch, heads, _, head_dim = keys.shape
        # Appended to, cropped, reordered and copied by the base class.
        self.kv = PagedKV(batch, heads, head_dim, config.block_size, keys.dtype, keys.device)

    def attend(self, step, query):
        length = self.kv.length
        recent = max(0, length - self.settings["recent"])
        parts, attended = [], 0
        for start, stop in ((0, min(self.config.sinks, recent)), (recent, length)):
            keys, values = self.kv.read(start, stop)
            real = None if step.mask is None else step.padding(query.device)[:, None, None, start:stop]
            parts.append(attend(query, keys, values, *self.scoring, real))
            attended += stop - start
        step.counters.attended(self.layer_idx, length, attended)
        return fuse(parts)

    def tier_bytes(self):
        return {"device": self.kv.used_bytes}


model, tokenizer = load_pocket()
prompt, expected = questions(make_document(tokens=2048, facts=8, seed=1))[3]
inputs = tokenizer(prompt, return_tensors="pt")


def answer():
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


stock = answer()
for recent in (256, 4096):
    with scout_hf.patch(model, method="sinks-and-window", method_options={"recent": recent}) as handle:
        got = answer()
        print(f"newest {recent}: {got!r}, {handle.stats().attended_tokens:.0f} tokens per step, exact: {handle.exact}")
print(f"expected {expected!r}, stock {stock!r}")
if got != stock:
    sys.exit("a window above the length of the prompt must give the answer of the stock model")
print("ok")
