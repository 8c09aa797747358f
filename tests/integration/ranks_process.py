"""Processes for test_tensor_parallel: what every rank finds, and one process alone; all are forks of one.

In float64, where no rounding of sums over ranks decides about a token or a block.
"""

import contextlib
import datetime
import inspect
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed.tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import scout_hf
from scout_hf import CACHE, ScoutCache, auto_budget
from scout_hf.drafting import calls
from scout_hf.sessions import fingerprint
from tests.integration.common import LOSSY, TWO_TIERS, left_padded, llama, prompt, run
from tests.integration.models import UnknownConfig
from tests.patches.tiny import tiny_model

SHAPE = {"num_key_value_heads": 4, "num_hidden_layers": 3}
SPARSE = {"budget": 32, "block_size": 8, "window": 8, "digest": "minmax"}
CODED = SPARSE | {"digest": "auto"}
"""Sign codes of queries are rounded, and the last bit of a query depends on how many heads are computed at once."""
EXACT, PREDICTED = "exact, two tiers", "sparse, two tiers, predicted"
MAIN = {
    "exact": {"budget": None, "block_size": 8},
    EXACT: TWO_TIERS | {"layer_ahead": True, "cpu_query": "real"},
    "sparse": SPARSE,
    PREDICTED: LOSSY | {"digest": "minmax"},
    "coded": CODED,
}
OTHER = {
    "sparse, int8": SPARSE | {"host_dtype": "int8"},
    "coded, mass": CODED | {"mass": 0.6},
    "hgca": {"method": "hgca", "budget": 32, "block_size": 8, "split": "cpu"},
    "infinigen": {"method": "infinigen", "budget": 32, "block_size": 8, "method_options": {"alpha": None}},
    "kvpr": {"method": "kvpr", "block_size": 8, "window": 8, "split": "cpu"},
}
FAMILIES = ("qwen3", "phi3", "deepseek_v2", "unknown")
NEW, FIRST = 8, 160


def save_models(folder):
    """What the ranks load."""
    llama(dtype=torch.float64, **SHAPE).save_pretrained(folder / "llama")
    llama(dtype=torch.float64, num_key_value_heads=2).save_pretrained(folder / "two heads")
    for name in FAMILIES:
        own = {"num_key_value_heads": 8, "first_k_dense_replace": 3} if name == "deepseek_v2" else {}
        model = llama(**SHAPE) if name == "unknown" else tiny_model(name, **SHAPE | own)
        model.double().save_pretrained(folder / name)


def load(path, world):
    """One of them, over as many ranks."""
    options = {"dtype": torch.float64}
    if world > 1 and "tp_plan" in inspect.signature(DistributedConfig).parameters and path.name != "llama":
        options["distributed_config"] = DistributedConfig(tp_plan="auto")
    elif world > 1:
        options["tp_plan"] = "auto"
    if path.name == "unknown":
        return LlamaForCausalLM.from_pretrained(path, config=UnknownConfig.from_pretrained(path), **options).eval()
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def ran(model, inputs, handle=None, new=NEW, **options):
    """Tokens and logits of a generation, and what its cache holds."""
    output = run(model, inputs, new, **options)
    found = {"tokens": output.sequences, "logits": torch.stack(output.logits)}
    if handle is not None:
        found |= {"bytes": output[CACHE].tier_bytes(), "notes": list(handle.stats().notes)}
    return found


def main_ways(folder, rank, world):
    """Exact and sparse, on one tier and on two."""
    model, ids = load(folder / "llama", world), prompt(1, FIRST)
    return {"stock": ran(model, ids)} | by_settings(model, ids, MAIN)


def by_settings(model, ids, ways):
    found = {}
    for name, options in ways.items():
        with scout_hf.patch(model, **options) as handle:
            found[name] = ran(model, ids, handle)
    return found


def other_ways(folder, rank, world):
    """Other methods, padded rows, sampling."""
    model, ids = load(folder / "llama", world), prompt(1, FIRST)
    found = by_settings(model, ids, OTHER)
    with scout_hf.patch(model, **SPARSE) as handle:
        found["sparse, padded rows"] = ran(model, left_padded(0, 37, tokens=FIRST), handle)
        torch.manual_seed(5)
        found["sampled"] = ran(model, ids, handle, do_sample=True)
    return found


def other_families(folder, rank, world):
    """A norm of each head, gathered projections, and a type that nobody has heard of."""
    found = {}
    for name in FAMILIES:
        model, ids = load(folder / name, world), prompt(1, FIRST)
        found[name, "stock"] = ran(model, ids)
        for kind, made in by_settings(model, ids, {kind: MAIN[kind] for kind in (EXACT, PREDICTED)}).items():
            found[name, kind] = made
    return found


def by_measured_times(folder, rank, world):
    """What a rank decides by how long steps take, where each measures something else, the last one as one process."""
    model, ids, share = load(folder / "llama", world), prompt(1, FIRST), (rank + 1) / world
    set_small()
    auto_budget.AutoBudget.took = lambda self: (float(self.tokens_read) * share, 0.0)
    attends_all = auto_budget.AutoBudget.attends_all

    def reading(self, tokens, rates):
        whole = attends_all(self, tokens, rates)
        # Only the slowest rank sees that sparse steps pay: to the others, attention takes next to nothing.
        self.tokens_read = (tokens if whole else 32) if rank == world - 1 else 1e-6 / tokens
        return whole

    auto_budget.AutoBudget.attends_all = reading
    with scout_hf.patch(model, **(SPARSE | {"budget": "auto"})) as handle:
        cache = handle.new_cache()
        found = ran(model, ids, handle, 14, **{CACHE: cache}) | {"from": cache.auto.sparse_from}
    return {"auto": found}


def set_small():
    """Small enough for a prompt of these tests."""
    auto_budget.SPARSE_TOKENS = auto_budget.LEAST = 32
    scout_hf.config.SPARSE_TOKENS = 32


def drafted(folder, rank, world):
    """Drafts whose number goes by how long passes take."""
    model, ids = load(folder / "llama", world), prompt(1, FIRST)
    with scout_hf.patch(model, draft=4, **CODED) as handle:
        calls.time = Jumpy(rank)
        calls.wait = lambda outputs: calls.time.perf_counter()
        try:
            found = ran(model, ids, handle, 24)
        finally:
            calls.time = time
        stats = handle.stats()
    return {
        "drafts": found | {"counts": (stats.draft_checks, stats.drafted_tokens, stats.accepted_tokens, stats.steps)}
    }


class Jumpy:
    """A clock of its own on every rank."""

    def __init__(self, rank):
        self._draw, self._now = torch.Generator().manual_seed(rank), 0.0

    def perf_counter(self):
        self._now += float(torch.rand((), generator=self._draw))
        return self._now


def sessions(folder, rank, world):
    """Saving and loading parts."""
    model, ids = load(folder / "llama", world), prompt(1, FIRST)
    home, mine = folder / f"kept by {world}", f"rank-{rank}-of-{world}"
    with scout_hf.patch(model, **SPARSE) as handle:
        first = run(model, ids)
        first[CACHE].save(home)
        meet(world)
        again = prompt(1, FIRST + 30)
        again[:, : first.sequences.shape[1]] = first.sequences
        found = {"session": ran(model, again, handle, **{CACHE: ScoutCache.load(home, model)})}
        found["folder"] = sorted(path.name for path in home.iterdir())
        if world > 1:
            moved = folder / f"moved {world}.{rank}"
            shutil.copytree(home / f"rank-{(rank + 1) % world}-of-{world}", moved / mine)
            found["of another rank"] = refused(ScoutCache.load, moved, model)
            found["of one process"] = refused(ScoutCache.load, folder / "kept by 1", model)
            found["over one process"] = refused(first[CACHE].save, folder / "kept by 1")
    made = fingerprint(model)
    found["fingerprint"] = made.key, made.key == fingerprint(load(folder / "llama", world)).key
    with torch.no_grad():
        own = model.get_input_embeddings().weight
        own = own.to_local() if hasattr(own, "to_local") else own
        own[-1] += 1.0
    found["changed"] = fingerprint(model).key
    return found


def refusals(folder, rank, world):
    """What ranks would have to decide together, and KV heads that nobody can divide."""
    model = load(folder / "llama", world)
    found = {
        "store": refused(scout_hf.patch, model, store=folder / "store"),
        "infinigen, refused": refused(scout_hf.patch, model, method="infinigen", budget=32),
        "graph": refused(scout_hf.patch, model, hand_over="graph"),
    }
    with scout_hf.patch(model, **SPARSE) as handle:
        cache = handle.new_cache(method="infinigen", digest="auto")
        found["infinigen in a pass"] = refused(run, model, prompt(1, 20), **{CACHE: cache})
        found["after it"] = ran(model, prompt(1, FIRST), handle)
    model = load(folder / "two heads", world)
    found["two heads, stock"] = refused(run, model, prompt(1, 20))
    found["two heads"] = refused(scout_hf.patch, model)
    return found


def refused(call, *args, **kwargs):
    """The error as text; None without one."""
    try:
        made = call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(made, scout_hf.Handle):
        made.remove()
    return None


def meet(world):
    """Wait for all ranks."""
    if world > 1:
        torch.distributed.barrier()


PARTS = {
    "main ways": main_ways,
    "other ways": other_ways,
    "other families": other_families,
    "by measured times": by_measured_times,
    "drafts": drafted,
    "sessions": sessions,
    "refusals": refusals,
}


def as_rank(folder, parts, rank, world):
    """All parts on one rank; what it found is written down."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting of {world}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=60),
        )
    found = {}
    for name in parts:
        with restored():
            found |= PARTS[name](folder, rank, world)
        meet(world)
    torch.save(found, folder / f"found by {rank} of {world}")
    if world > 1:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def restored():
    """Afterwards what was replaced for a part is as before."""
    before = {(held, name): getattr(held, name) for held, name in REPLACED}
    try:
        yield
    finally:
        for (held, name), value in before.items():
            setattr(held, name, value)


REPLACED = (
    (auto_budget, "SPARSE_TOKENS"),
    (auto_budget, "LEAST"),
    (scout_hf.config, "SPARSE_TOKENS"),
    (auto_budget.AutoBudget, "took"),
    (auto_budget.AutoBudget, "attends_all"),
    (calls, "time"),
    (calls, "wait"),
)


def start(folder, parts, rank, world):
    """A fork for one rank; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        as_rank(folder, parts, rank, world)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder, worlds):
    """Save the models, and run one world after the other: ``worlds`` is JSON, the parts of each."""
    folder = Path(folder)
    save_models(folder)
    for world, parts in json.loads(worlds).items():
        world = int(world)
        children = [start(folder, parts, rank, world) for rank in range(world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"ranks of {world} ended with {codes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
