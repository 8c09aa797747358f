"""What batches are tested with: a toy tokenizer, models by name for other processes, and files of prompts."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.patches.tiny import tiny_model

SPECIAL = ("<pad>", "<s>", "</s>")
LETTERS = [chr(code) for code in range(32, 127)]
BLOCK = 8
EXACT = {"budget": None, "block_size": BLOCK}


def toy_tokenizer():
    """One token per letter."""
    words = {word: number for number, word in enumerate((*SPECIAL, *LETTERS))}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", name_or_path="toy"
    )


def toy_model(name="llama"):
    model = tiny_model(name, vocab_size=len(SPECIAL) + len(LETTERS))
    # Its end would come by chance.
    model.generation_config.eos_token_id = None
    return model


class Doomed:
    """Loads the toy model, which ends its own process, or fails, at prompts that end so; written down in a folder.

    times : int
        How often; -1 for always.
    """

    def __init__(self, folder, end, times=1, fail=False):
        self.folder, self.end, self.times, self.fail = Path(folder), end, times, fail

    def __call__(self):
        model = toy_model()
        generate, tokenizer = model.generate, toy_tokenizer()

        def ending(ids, **options):
            text = tokenizer.decode(ids[0])
            if text.endswith(self.end):
                before = (self.folder / "ends").read_text().count("\n") if (self.folder / "ends").exists() else 0
                if self.times < 0 or before < self.times:
                    note(self.folder / "ends", str(os.getpid()))
                    if self.fail:
                        raise RuntimeError("no memory for this one")
                    os.kill(os.getpid(), signal.SIGKILL)
            note(self.folder / "asked", f"{os.getpid()} {text}")
            return generate(ids, **options)

        model.generate = ending
        return model


def documents(count, letters=200, seed=0):
    """Random texts, all of which begin with the same few letters."""
    draw = random.Random(seed)
    return ["You answer. " + "".join(draw.choices(LETTERS, k=letters)) for _ in range(count)]


def questions(texts, each, seed=1):
    """Rows about texts, shuffled; the end of each prompt says which it is."""
    draw = random.Random(seed)
    rows = [
        {"id": f"{number}-{one}", "prompt": f"{text} Tell me {number}-{one} {''.join(draw.choices(LETTERS, k=20))}"}
        for number, text in enumerate(texts)
        for one in range(each)
    ]
    draw.shuffle(rows)
    return rows


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def stock_answers(rows, new_tokens, name="llama"):
    """What the model, not patched, says to each prompt."""
    model, tokenizer, said = toy_model(name), toy_tokenizer(), {}
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        said[row["id"]] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return said


def note(path, line):
    with path.open("a") as file:
        file.write(line + "\n")
