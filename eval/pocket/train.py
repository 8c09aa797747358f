"""Trains a pocket model from nothing on one CPU core: `python -m scout_hf.eval.pocket.train --out DIR --seed 0`."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import typer
from tqdm import tqdm

from scout_hf.files import write_text

from .architecture import ARCHITECTURES, MAX_POSITIONS, build_model
from .evaluate import accuracy
from .lessons import TEXT_WEIGHT, make_batch
from .muon import Muon
from .states import load_state, save_state, state_file
from .tasks import TASKS
from .vocabulary import build_tokenizer

STEP_TOKENS = 2048
WARM_UP_STEPS = 20
# So long the started heads stay as they are, while all else learns to read what they find.
HOLD_TOKENS = 120_000
# The rate falls from half of this number on and would reach zero at it, a little after the last stage.
SCHEDULE_TOKENS = 3_600_000
EVALUATION_SEED = 10_000
LENGTHS_TESTED = (1024, 2048, 4096, 8192)
GLANCE_TOKENS = 50_000


class Stage(NamedTuple):
    """One part of training: sequences of `length` tokens, `tokens` in all, shares of exams and jumps, learning rate."""

    length: int
    tokens: int
    exams: float
    jumps: float
    rate: float


STAGES = (
    Stage(128, 600_000, 0.0, 0.0, 1.0),
    Stage(512, 900_000, 0.3, 0.5, 1.0),
    Stage(1024, 900_000, 0.65, 0.5, 0.8),
    Stage(2048, 600_000, 0.65, 0.5, 0.8),
    Stage(4096, 400_000, 0.65, 0.5, 0.8),
)
# Two hops and numbered values take the longest to form.
MIX = {"needle": 0.15, "values": 0.25, "trace": 0.35, "copy": 0.15, "aggregate": 0.1}


def logits_of(model, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (sequences, length - 1, words) of the next tokens; both arguments (sequences, length).

    The layers are called one by one because the model's own forward takes a position jump for the start of another
    packed sequence and masks everything before it.
    """
    hidden = model.model.embed_tokens(ids)
    rope = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rope)
    return model.lm_head(model.model.norm(hidden[:, :-1]))


def loss_of(model, ids: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross entropy of the next token; all arguments (sequences, length)."""
    logits = logits_of(model, ids, positions).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    shares = weights[:, 1:].flatten()
    return (losses * shares).sum() / shares.sum()


@torch.inference_mode()
def glance(model, length: int) -> dict[str, float]:
    """Share of answers right, per task, in exams of `length` tokens with the words before each word given."""
    seen = {}
    for task in TASKS:
        batch = make_batch(random.Random(1), length, max(1, 2 * STEP_TOKENS // length), 1.0, True, 0.0, {task: 1.0})
        ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(batch.positions)
        wrong = logits_of(model, ids, positions).argmax(-1) != ids[:, 1:]
        answers = torch.from_numpy(batch.weights[:, 1:] > TEXT_WEIGHT)
        # Full stops part one answer from the next.
        number = answers.logical_not().cumsum(1) + torch.arange(len(ids))[:, None] * length
        asked, failed = number[answers].unique(), number[answers & wrong].unique()
        seen[task] = round(1 - len(failed) / len(asked), 3)
    return seen


def train(arch: str, seed: int, stages: tuple[Stage, ...], folder: Path | None = None):
    """A model trained through all `stages`, and the minutes that took.

    With a `folder`, the state after each stage is kept there as `stage<number>.safetensors`, and a later call goes on
    after the last one it finds. Each stage draws its own text, and momentum starts anew with each stage, so a run that
    was interrupted ends with the same weights as one that was not.
    """
    model = build_model(arch, seed)
    finished = [number for number in range(len(stages)) if folder and state_file(folder, number).is_file()]
    first = 1 + max(finished, default=-1)
    minutes = load_state(model, state_file(folder, first - 1)) if first else 0.0
    done = sum(stage.tokens for stage in stages[:first])
    for number, stage in enumerate(stages[first:], first):
        began = time.time()
        run_stage(model, stage, random.Random(f"train-{seed}-{number}"), done)
        done += stage.tokens
        minutes += (time.time() - began) / 60
        if folder:
            save_state(model, state_file(folder, number), minutes)
    return model.eval(), minutes


def run_stage(model, stage: Stage, rng: random.Random, done: int) -> None:
    """Train `model` in place for one stage, after `done` tokens of earlier ones."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    optimizers = (Muon(matrices, lr=0.003), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0))
    starts = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    sequences = max(1, STEP_TOKENS // stage.length)
    bar = tqdm(
        total=stage.tokens, desc=f"length {stage.length}", unit="tok", mininterval=10, unit_scale=True, disable=None
    )
    # A bar that nobody sees does not count.
    steps = read = 0
    while read < stage.tokens:
        batch = make_batch(rng, stage.length, sequences, stage.exams, stage.length > 128, stage.jumps, MIX)
        fall = max(0.05, 2 * (1 - (done + read) / SCHEDULE_TOKENS))
        rate = stage.rate * min(1.0, (steps + 1) / WARM_UP_STEPS, fall)
        for optimizer, firsts in zip(optimizers, starts, strict=True):
            for group, first in zip(optimizer.param_groups, firsts, strict=True):
                group["lr"] = rate * first
        loss = loss_of(model, *(torch.from_numpy(part) for part in (batch.ids, batch.positions, batch.weights)))
        loss.backward()
        if done + read < HOLD_TOKENS:
            for layer in model.model.layers[:-1]:
                for weight in layer.self_attn.parameters():
                    weight.grad.zero_()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps += 1
        before, read = read, read + sequences * stage.length
        bar.update(sequences * stage.length)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if read // GLANCE_TOKENS > before // GLANCE_TOKENS:
            bar.write(f"length {stage.length}, {read} tokens: {glance(model, stage.length)}")
    bar.close()


def main(
    out: Path = typer.Option(..., help="Folder for the trained model, its tokenizer and training.json."),
    seed: int = typer.Option(0, help="Seed of the start and of all training text."),
    arch: str = typer.Option("llama", help=f"One of {', '.join(ARCHITECTURES)}."),
    questions: int = typer.Option(64, help="Questions per task and length in the final accuracy table."),
    stages: Path | None = typer.Option(None, help="Folder to keep the state after each stage in, and to go on from."),
) -> None:
    """Train a pocket model and save it with an accuracy table."""
    # More threads only wait for each other in matrices this small.
    torch.set_num_threads(1)
    model, minutes = train(arch, seed, STAGES, stages)
    tokenizer = build_tokenizer(MAX_POSITIONS)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_record(out, model, tokenizer, arch, seed, minutes, questions)


def write_record(out: Path, model, tokenizer, arch: str, seed: int, minutes: float, questions: int) -> None:
    """Measure the model on fresh documents and write, and print, how it was made and what it can do."""
    record = {
        "arch": arch,
        "seed": seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "stages": [stage._asdict() for stage in STAGES],
        "mix": MIX,
        "minutes": round(minutes, 1),
        "questions_per_task_and_length": questions,
        "exact_match": {
            task: {
                str(tokens): round(accuracy(model, tokenizer, tokens, questions, EVALUATION_SEED, task), 4)
                for tokens in LENGTHS_TESTED
            }
            for task in TASKS
        },
    }
    write_text(out / "training.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["exact_match"]))


if __name__ == "__main__":
    typer.run(main)
