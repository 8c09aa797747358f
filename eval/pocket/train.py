"""Trains a pocket model from nothing on one CPU core: `python -m scout_hf.eval.pocket.train --out DIR --seed 0`."""

import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import typer
from tqdm import tqdm

from .architecture import ARCHITECTURES, MAX_POSITIONS, build_model
from .evaluate import accuracy
from .lessons import make_batch
from .muon import Muon
from .vocabulary import build_tokenizer

STEP_TOKENS = 2048
WARM_UP_STEPS = 20
# The rate falls from half of this number on and would reach zero at it, a little after the last stage.
SCHEDULE_TOKENS = 3_600_000
EVALUATION_SEED = 10_000
LENGTHS_TESTED = (1024, 2048, 4096, 8192)


class Stage(NamedTuple):
    """One part of training: sequences of `length` tokens, `tokens` in all, shares of exams and jumps, learning rate."""

    length: int
    tokens: int
    exams: float
    jumps: float
    rate: float


STAGES = (
    Stage(128, 300_000, 0.0, 0.0, 1.0),
    Stage(512, 800_000, 0.3, 0.5, 1.0),
    Stage(1024, 1_000_000, 0.65, 0.5, 0.8),
    Stage(2048, 800_000, 0.65, 0.5, 0.8),
    Stage(4096, 500_000, 0.65, 0.5, 0.8),
)


def loss_of(model, ids: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross entropy of the next token; all arguments (sequences, length).

    The layers are called one by one because the model's own forward takes a position jump for the start of another
    packed sequence and masks everything before it.
    """
    hidden = model.model.embed_tokens(ids)
    rope = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rope)
    logits = model.lm_head(model.model.norm(hidden[:, :-1])).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    shares = weights[:, 1:].flatten()
    return (losses * shares).sum() / shares.sum()


def train(arch: str, seed: int, stages: tuple[Stage, ...], folder: Path | None = None):
    """A model trained through all `stages`; with a `folder`, the state after each stage is saved there."""
    model = build_model(arch, seed)
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    optimizers = (Muon(matrices, lr=0.006), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0))
    starts = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    rng = random.Random(f"train-{seed}")
    done = steps = 0
    for number, stage in enumerate(stages):
        bar = tqdm(total=stage.tokens, desc=f"length {stage.length}", unit="tok", mininterval=10, unit_scale=True)
        while bar.n < stage.tokens:
            sequences = max(1, STEP_TOKENS // stage.length)
            batch = make_batch(rng, stage.length, sequences, stage.exams, stage.length > 128, stage.jumps)
            rate = stage.rate * min(1.0, (steps + 1) / WARM_UP_STEPS, max(0.05, 2 * (1 - done / SCHEDULE_TOKENS)))
            for optimizer, firsts in zip(optimizers, starts, strict=True):
                for group, first in zip(optimizer.param_groups, firsts, strict=True):
                    group["lr"] = rate * first
            loss = loss_of(model, *(torch.from_numpy(part) for part in (batch.ids, batch.positions, batch.weights)))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            steps += 1
            done += sequences * stage.length
            bar.update(sequences * stage.length)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.close()
        if folder:
            model.save_pretrained(folder / f"stage{number}")
    return model.eval()


def main(
    out: Path = typer.Option(..., help="Folder for the trained model, its tokenizer and training.json."),
    seed: int = typer.Option(0, help="Seed of the start and of all training text."),
    arch: str = typer.Option("llama", help=f"One of {', '.join(ARCHITECTURES)}."),
    questions: int = typer.Option(128, help="Questions per length in the final accuracy table."),
    keep_stages: bool = typer.Option(False, help="Also save the model after each stage."),
) -> None:
    """Train a pocket model and save it with an accuracy table."""
    began = time.time()
    model = train(arch, seed, STAGES, out if keep_stages else None)
    minutes = (time.time() - began) / 60
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
        "minutes": round(minutes, 1),
        "questions_per_length": questions,
        "exact_match": {
            str(tokens): round(accuracy(model, tokenizer, tokens, questions, EVALUATION_SEED), 4)
            for tokens in LENGTHS_TESTED
        },
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["exact_match"]))


if __name__ == "__main__":
    typer.run(main)
