"""Trains a pocket model from nothing on one CPU core: `python -m scout_hf.eval.training.pocket --out DIR --seed 0`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import typer

from scout_hf.eval.pocket import TASKS
from scout_hf.eval.training.accuracy import accuracy
from scout_hf.eval.training.lessons import TEXT_WEIGHT, make_batch
from scout_hf.eval.training.pocket_tokenizer import build_tokenizer
from scout_hf.eval.training.stages import train_stage, train_stages, write_training
from scout_hf.eval.training.start import ARCHITECTURES, MAX_POSITIONS, build_model

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
    """A model trained through all `stages`, and the minutes that took; see `train_stages` for the `folder`."""
    model = build_model(arch, seed)
    attention = [weight for layer in model.model.layers[:-1] for weight in layer.self_attn.parameters()]

    def run(number: int, stage: Stage, done: int) -> None:
        rng, sequences = random.Random(f"train-{seed}-{number}"), max(1, STEP_TOKENS // stage.length)

        def loss() -> torch.Tensor:
            batch = make_batch(rng, stage.length, sequences, stage.exams, stage.length > 128, stage.jumps, MIX)
            return loss_of(model, *(torch.from_numpy(part) for part in (batch.ids, batch.positions, batch.weights)))

        def rate(steps: int, read: int) -> float:
            fall = max(0.05, 2 * (1 - (done + read) / SCHEDULE_TOKENS))
            return stage.rate * min(1.0, (steps + 1) / WARM_UP_STEPS, fall)

        def progress(read: int) -> str:
            return f"length {stage.length}, {read} tokens: {glance(model, stage.length)}"

        def held(read: int) -> list[torch.nn.Parameter]:
            return attention if done + read < HOLD_TOKENS else []

        train_stage(model, stage, sequences, loss, rate, held, progress, GLANCE_TOKENS)

    minutes = train_stages(model, stages, run, folder)
    return model.eval(), minutes


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
    write_training(out, record, "exact_match")


if __name__ == "__main__":
    typer.run(main)
