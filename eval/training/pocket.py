"""Trains a pocket model from nothing on one CPU core: `python -m scout_hf.eval.training.pocket --out DIR --seed 0`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import typer
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from scout_hf.eval.decode_path import answers, prefill, quiz
from scout_hf.eval.pocket import TASKS
from scout_hf.eval.pocket.tasks import exercises
from scout_hf.eval.training.lessons import make_batch
from scout_hf.eval.training.stages import train_stages, write_training
from scout_hf.eval.training.start import ARCHITECTURES, MAX_POSITIONS, build_model
from scout_hf.eval.training.tokenizers import build_pocket_tokenizer

STEP_TOKENS = 2048
WARM_UP_STEPS = 20
# So long the started heads stay as they are, while all else learns to read what they find.
HOLD_TOKENS = 120_000
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
    Stage(128, 600_000, 0.0, 0.0, 1.0),
    Stage(512, 900_000, 0.3, 0.5, 1.0),
    Stage(1024, 900_000, 0.65, 0.5, 0.8),
    Stage(2048, 600_000, 0.65, 0.5, 0.8),
    Stage(4096, 400_000, 0.65, 0.5, 0.8),
)
# Two hops and numbered values take the longest to form.
MIX = {"needle": 0.15, "values": 0.25, "trace": 0.35, "copy": 0.15, "aggregate": 0.1}


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


def train(arch: str, seed: int, stages: tuple[Stage, ...]):
    """A model trained through all `stages`, and the minutes that took."""
    model = build_model(arch, seed)
    attention = [weight for layer in model.model.layers[:-1] for weight in layer.self_attn.parameters()]

    def loss(stage: Stage, sequences: int, rng: random.Random) -> torch.Tensor:
        batch = make_batch(rng, stage.length, sequences, stage.exams, stage.length > 128, stage.jumps, MIX)
        return loss_of(model, *(torch.from_numpy(part) for part in (batch.ids, batch.positions, batch.weights)))

    def rate(stage: Stage, steps: int, read: int) -> float:
        return stage.rate * min(1.0, (steps + 1) / WARM_UP_STEPS, max(0.05, 2 * (1 - read / SCHEDULE_TOKENS)))

    minutes = train_stages(model, stages, f"train-{seed}", STEP_TOKENS, (attention, HOLD_TOKENS), loss, rate)
    return model.eval(), minutes


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, questions: int, seed: int, task: str
) -> float:
    """Share of questions that stock attention answers word for word, about documents of so many tokens."""
    right = 0
    for document in exercises(task, tokens, questions, seed):
        ids, asked, wanted = quiz(tokenizer, document)
        cache = prefill(model, DynamicCache(config=model.config), ids)
        right += answers(model, cache, asked, len(wanted[0]), rows=16).right(wanted)
    return right / questions


def main(
    out: Path = typer.Option(..., help="Folder for the trained model, its tokenizer and training.json."),
    seed: int = typer.Option(0, help="Seed of the start and of all training text."),
    arch: str = typer.Option("llama", help=f"One of {', '.join(ARCHITECTURES)}."),
    questions: int = typer.Option(64, help="Questions per task and length in the final accuracy table."),
) -> None:
    """Train a pocket model and save it with an accuracy table, of fresh documents."""
    # More threads only wait for each other in matrices this small.
    torch.set_num_threads(1)
    model, minutes = train(arch, seed, STAGES)
    tokenizer = build_pocket_tokenizer(MAX_POSITIONS)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
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
