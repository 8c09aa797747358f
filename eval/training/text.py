"""Trains the text model from nothing on one CPU core: `python -m scout_hf.eval.training.text --out DIR --seed 0`."""

from __future__ import annotations

import math
import platform
import random
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scout_hf.eval.text import corpus
from scout_hf.eval.training.stages import train_stages, write_training
from scout_hf.eval.training.start import fresh_model, start_for_text
from scout_hf.eval.training.tokenizers import VOCABULARY, build_text_tokenizer

STEP_TOKENS = 1024
WARM_UP_STEPS = 40
# So long the started heads stay as they are. MLPs that learn three times as fast write over what those heads leave in
# the hidden state, and the model then uses no more than the last 16 tokens.
HOLD_TOKENS = 200_000
# Share of windows with repeated passages: so few tokens of plain source do not teach a model to look far back.
REPEATS = 0.5
CONTEXTS_TESTED = (256, 1024, 2048, 4096)
WINDOWS_TESTED = 24
TARGETS = 128


class Stage(NamedTuple):
    """One part of training: windows of `length` tokens, `tokens` in all."""

    length: int
    tokens: int


STAGES = (Stage(512, 500_000), Stage(1024, 350_000), Stage(2048, 250_000), Stage(4096, 200_000))


def build_model(end: int, seed: int) -> PreTrainedModel:
    """A freshly started model of 2.3 million parameters; `end` is the id of the end-of-text token."""
    ids = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end}
    # Source repeats itself, so heads that find an earlier occurrence pay here as they do in the pocket models.
    return fresh_model(
        "llama", seed, ids, start_for_text, vocab_size=VOCABULARY, hidden_size=192, intermediate_size=320
    )


def stream_of(tokenizer: PreTrainedTokenizerBase, texts: list[str], rng: random.Random) -> torch.Tensor:
    """All texts, each ended by the end-of-text token, in a random order: ids (tokens,), int64."""
    ids: list[int] = []
    for text in rng.sample(texts, len(texts)):
        ids += tokenizer(text).input_ids + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def train(model: PreTrainedModel, stream: torch.Tensor, stages: tuple[Stage, ...], seed: int) -> float:
    """Train `model` in place on random windows of `stream` (tokens,) through all `stages`; the minutes it took."""
    if (longest := max(stage.length for stage in stages)) >= len(stream):
        raise ValueError(f"windows of {longest} tokens do not fit a text of {len(stream)}")
    total = sum(stage.tokens for stage in stages)
    attention = [weight for layer in model.model.layers for weight in layer.self_attn.parameters()]

    def loss(stage: Stage, sequences: int, rng: random.Random) -> torch.Tensor:
        begins = [rng.randrange(len(stream) - stage.length) for _ in range(sequences)]
        ids = torch.stack([stream[begin : begin + stage.length + 1] for begin in begins])
        for window in ids:
            if rng.random() < REPEATS:
                repeat_passages(window, rng)
        logits = model(ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def rate(stage: Stage, steps: int, read: int) -> float:
        return min(1.0, (steps + 1) / WARM_UP_STEPS, max(0.03, 1.5 * (1 - read / total)))

    return train_stages(model, stages, f"text-{seed}", STEP_TOKENS, (attention, HOLD_TOKENS), loss, rate)


def repeat_passages(window: torch.Tensor, rng: random.Random) -> None:
    """Overwrite about a quarter of `window` (tokens,), in place, with passages from earlier in it."""
    for _ in range(len(window) // 128):
        size = rng.randint(16, 48)
        source = rng.randrange(len(window) - 2 * size)
        target = rng.randrange(source + size, len(window) - size)
        window[target : target + size] = window[source : source + size].clone()


@torch.inference_mode()
def perplexity_by_context(
    model: PreTrainedModel, stream: torch.Tensor, contexts: tuple[int, ...], windows: int
) -> dict[str, float]:
    """Perplexity of the same `TARGETS` tokens of each window, given the last 256, 1024, ... tokens before them."""
    longest = max(contexts)
    losses = dict.fromkeys(contexts, 0.0)
    for window in range(windows):
        end = longest + TARGETS + window * (len(stream) - longest - TARGETS) // max(1, windows - 1)
        for context in contexts:
            ids = stream[end - TARGETS - context : end][None]
            logits = model(ids[:, :-1], use_cache=False, logits_to_keep=TARGETS).logits[0]
            losses[context] += torch.nn.functional.cross_entropy(logits.float(), ids[0, -TARGETS:]).item() / windows
    return {str(context): round(math.exp(loss), 3) for context, loss in losses.items()}


def main(
    out: Path = typer.Option(..., help="Folder for the trained model, its tokenizer and training.json."),
    seed: int = typer.Option(0, help="Seed of the start and of the order of all text."),
) -> None:
    """Train the text model on this Python's standard library and save it as bfloat16 with its perplexities."""
    # More threads only wait for each other in matrices this small.
    torch.set_num_threads(1)
    texts = corpus.training_files()
    tokenizer = build_text_tokenizer(texts)
    stream = stream_of(tokenizer, texts, random.Random(f"text-{seed}"))
    model = build_model(tokenizer.eos_token_id, seed)
    minutes = train(model, stream, STAGES, seed)
    model.eval().bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Measured as it is loaded again: the values that bfloat16 kept, computed in float32.
    held_out = stream_of(tokenizer, list(corpus.held_out_files(seed)), random.Random(seed))
    record = {
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "stages": [stage._asdict() for stage in STAGES],
        "minutes": round(minutes, 1),
        "text_tokens": {"training": len(stream), "held_out": len(held_out)},
        "held_out_perplexity_by_context": perplexity_by_context(
            model.float(), held_out, CONTEXTS_TESTED, WINDOWS_TESTED
        ),
    }
    write_training(out, record, "held_out_perplexity_by_context")


if __name__ == "__main__":
    typer.run(main)
