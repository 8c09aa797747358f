"""kvpress on questions about documents; a script for a separate process, perhaps with another Python.

kvpress changes attention for a whole process, and its releases need other versions of transformers than scout_hf: this
file imports nothing of scout_hf. ``python kvpress_apart.py REQUEST ANSWER``, both files of JSON; see
:mod:`scout_hf.eval.methods.score`.
"""

import copy
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main(request: str, answer: str) -> None:
    """Answer a request; the answer says ``absent`` where kvpress cannot be imported."""
    asked = json.loads(Path(request).read_text())
    try:
        import kvpress
        import torch
        import transformers
    except ImportError as error:
        Path(answer).write_text(json.dumps({"absent": f"{type(error).__name__}: {error}"}))
        return
    torch.set_num_threads(asked["threads"])
    # Of the presses that need no question, the one that leaves these models' answers whole the longest.
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()
    found = {"ids": [], "prefill_s": 0.0, "seconds": 0.0, "steps": 0}
    with torch.no_grad():
        for quiz in asked["quizzes"]:
            document, cache = torch.tensor([quiz["document"]]), transformers.DynamicCache(config=model.config)
            begin = time.perf_counter()
            with kvpress.KeyDiffPress(compression_ratio=1.0 - asked["share"])(model):
                model(document, past_key_values=cache, logits_to_keep=1)
            found["prefill_s"] += (time.perf_counter() - begin) / len(asked["quizzes"])
            found["kept"] = cache.layers[0].keys.shape[2]
            found["device_bytes"] = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
            for first in range(0, len(quiz["questions"]), asked["rows"]):
                ids = torch.tensor(quiz["questions"][first : first + asked["rows"]])
                twin = copy.deepcopy(cache)
                twin.batch_repeat_interleave(len(ids))
                begin = time.perf_counter()
                found["ids"] += _decode(model, twin, ids, asked["length"], document.shape[1])
                found["seconds"] += time.perf_counter() - begin
                found["steps"] += len(ids) * (ids.shape[1] + asked["length"] - 1)
    found["versions"] = {
        "press": "KeyDiffPress",
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    Path(answer).write_text(json.dumps(found))


def _decode(model, cache, ids, length: int, first: int) -> list[list[int]]:
    """Token by token; the cache is shorter than the text, so positions must be passed."""
    token, given = ids[:, :1], []
    for place in range(ids.shape[1] + length - 1):
        places = ids.new_full((len(ids), 1), first + place)
        logits = model(token, past_key_values=cache, position_ids=places, logits_to_keep=1).logits[:, -1]
        if place + 1 < ids.shape[1]:
            token = ids[:, place + 1 : place + 2]
        else:
            token = logits.argmax(-1, keepdim=True)
            given.append(token[:, 0].tolist())
    return [list(row) for row in zip(*given)]


if __name__ == "__main__":
    main(*sys.argv[1:])
