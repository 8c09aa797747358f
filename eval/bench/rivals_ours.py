"""The arms of transformers beside other runtimes: stock, stock folded, and scout_hf, on the same weights.

Every arm has a model object of its own over the same memory, so that stock is a model that was never patched. A text is
read once by stock and once by a patched model; what all of them then decode with is what stock read, repeated where a
context is longer than that: speed does not depend on the meaning of keys and values.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from scout_hf import CACHE
from scout_hf.errors import ConfigError
from scout_hf.eval.arms import FOLDED, RIVALS, Arm
from scout_hf.eval.bench import weights
from scout_hf.eval.bench.cpu_decode import read_bytes
from scout_hf.eval.bench.memory import Peak
from scout_hf.eval.bench.models import FOLDED as FOLDED_ATTENTION
from scout_hf.eval.bench.rivals_process import RivalError
from scout_hf.eval.bench.timing import timed
from scout_hf.eval.caches import Caches, kv_bytes
from scout_hf.eval.language.load import load, located

STOCK, EXACT, AUTO = "stock", "scout exact", "scout auto"
READ_AT_ONCE = 4096
WARM_UPS = {AUTO: 14}
"""Steps before the first round of a context: what decides by what it measured needs some."""

FEW_WARM_UPS = 2
LONG_SECONDS = 6.0
FEWEST = 2


def format_of(begin: str) -> str:
    """The one format of weights whose name begins so; ConfigError for none."""
    found = [name for name in weights.FORMATS if name.startswith(begin)]
    if not found:
        raise ConfigError(f"--weights {begin} is not known; there are {', '.join(weights.FORMATS)}")
    return begin if begin in found else found[0]


def loaded(name: str, form: str, ask: Any, tell: Any) -> PreTrainedModel:
    """A model with weights of a format."""
    dtype, config, change = weights.FORMATS[form]
    if not name.endswith(".gguf"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that name their successors
            return weights.load(located(name, ask, tell), form)
    if config is not None:
        raise ConfigError(f"--weights {form} cannot be made of a GGUF file; give a folder, or float32 or bfloat16")
    model, _ = load(name, ask, tell, dtype)
    if change is not None:
        change(model)
    return model


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model object over the same weights."""
    held: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # where torch keeps quantised matrices
        if (packed := getattr(module, "_packed_params", None)) is not None:
            held[id(packed)] = packed
    return copy.deepcopy(model, held)


class Decoder:
    """One arm: a model that decodes its way, and its cache of the context that is measured."""

    def __init__(self, arm: Arm, model: PreTrainedModel, caches: Caches, ids: Sequence[int]):
        self.name, self.model, self.caches, self.handle = arm.name, model, caches, caches.handle
        self.cache: Cache | None = None
        self._folded, self._ids, self._peak, self._most, self._share = arm.folded, ids, 0, FEWEST, 1.0

    def start(self, cache: Cache, most: int) -> None:
        """Decode with this cache from now on, at most so many steps at once; warms up, and looks at the memory."""
        self.cache = cache
        seconds = min(timed(self._step) for _ in range(WARM_UPS.get(self.name, FEW_WARM_UPS)))
        self._most = max(FEWEST, min(most, int(LONG_SECONDS / seconds)))
        with Peak() as peak:
            self._step()
        self._peak = peak.bytes

    def steps(self) -> tuple[list[float], dict[str, Any]]:
        """Seconds of steps behind one that does not count, and what was done in all of them."""
        first = self.length()
        if self.handle:
            self.handle.reset_stats()
        seconds = [timed(self._step) for _ in range(1 + self._most)][1:]
        return seconds, self._done(first)

    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())

    def facts(self) -> dict[str, Any]:
        """Bytes held, at most needed, and read by a step."""
        held, share = sum(kv_bytes(self.cache).values()), self._share
        keys, digests = read_bytes(self.cache)
        size = weights.step_bytes(self.model)
        return {
            "held_bytes": size + held,
            "peak_bytes": size + held + self._peak,
            "kv_bytes": held,
            "kv_share": share,
            "read_bytes": size + share * keys + (digests if share < 1 else 0),
        }

    @torch.no_grad()
    def _step(self) -> Any:
        ids = torch.tensor([[self._ids[self.length() % len(self._ids)]]])
        return self.model(input_ids=ids, **{CACHE: self.cache}, use_cache=True)

    def _done(self, first: int) -> dict[str, Any]:
        last = self.length()
        if last - first != 1 + self._most:
            raise RivalError(f"{1 + self._most} steps made the cache {last - first} tokens longer")
        self._share = 1.0
        if self.handle is None:
            wanted = FOLDED_ATTENTION if self._folded else "sdpa"
            if (used := self.model.config._attn_implementation) != wanted:
                raise RivalError(f"it attends by {used}, and not by {wanted}")
            return {"held_tokens": last, "attended_tokens": last}
        stats = self.handle.stats()
        if stats.steps != 1 + self._most or not first < stats.context_tokens <= last or stats.stock_passes:
            raise RivalError(
                f"{stats.steps} of {1 + self._most} steps, {stats.context_tokens:.0f} tokens of context behind "
                f"{first}, passes of stock attention: {stats.stock_passes or 'none'}"
            )
        self._share = stats.attended_tokens / stats.context_tokens
        if (stats.exact or self.name == EXACT) and (self._share < 1 or not stats.exact):
            raise RivalError(f"it attended {self._share:.3f} of the context, which it calls exact: {stats.exact}")
        return {"held_tokens": last, "attended_tokens": stats.attended_tokens, "exact": stats.exact}


class Ours:
    """All arms of transformers with weights of one format."""

    def __init__(self, name: str, form: str, stack: ExitStack, ids: Sequence[int], chosen: Sequence[str], **scout: Any):
        """``scout``: options of ``patch``, and ``ask`` and ``tell`` as ``load`` takes them."""
        ask, tell = scout.pop("ask"), scout.pop("tell")
        self.model, self.form, self._ids = loaded(name, form, ask, tell), form, ids
        self.decoders: dict[str, Decoder] = {}
        for arm in RIVALS.values():
            mine = twin(self.model)
            caches = stack.enter_context(arm.caches(mine, **scout))
            self.decoders[arm.name] = Decoder(arm, mine, caches, ids)
        self._reading: dict[str, Cache] = {}
        self._read = dict.fromkeys((STOCK, EXACT), 0.0)
        self.chosen = [name for name in self.decoders if name in chosen]

    @torch.no_grad()
    def likeliest(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """For each prompt, the tokens that stock finds likeliest to follow."""
        model = self.decoders[STOCK].model
        rows = (model(input_ids=torch.tensor([list(ids)])).logits[0, -1] for ids in prompts)
        return [row.topk(count).indices.tolist() for row in rows]

    def read(self, tokens: int) -> dict[str, float]:
        """Read the text up to a context; seconds from its beginning, for stock and for a patched model."""
        for name in self._read:
            if name != STOCK and not any(one != STOCK for one in self.chosen):
                continue
            cache = self._reading.get(name)
            if cache is None:
                cache = self._reading[name] = self.decoders[name].caches.new()
                self._warm(name)
            first = int(cache.get_seq_length())
            begin = time.perf_counter()
            for place in range(first, tokens, READ_AT_ONCE):
                self._pass(name, cache, self._ids[place : min(tokens, place + READ_AT_ONCE)])
            self._read[name] += time.perf_counter() - begin
            if (held := int(cache.get_seq_length())) != tokens:
                raise RivalError(f"{name} read {tokens} tokens, and {held} are in its cache")
        return {name: seconds for name, seconds in self._read.items() if name in self._reading}

    def length(self) -> int:
        """Tokens that were read."""
        return int(self._reading[STOCK].get_seq_length()) if STOCK in self._reading else 0

    def start(self, tokens: int, steps: int) -> None:
        """Give the chosen arms caches of that context; those before it are let go."""
        for decoder in self.decoders.values():
            decoder.cache = None
        stock = None
        for name in self.chosen:
            decoder = self.decoders[name]
            if name == FOLDED and stock is not None:
                cache = stock  # it decodes with the same
            else:
                cache = self._filled(decoder, tokens)
            stock = cache if name == STOCK else stock
            decoder.start(cache, steps)

    def drop(self, decoder: Decoder) -> None:
        """Go on without an arm."""
        self.chosen = [name for name in self.chosen if self.decoders[name] is not decoder]

    def kv_numbers(self, tokens: int) -> int:
        """Keys and values of a context, as numbers: what an exact step reads."""
        config = self._reading[STOCK].layers
        rows = [(part.shape[1] * part.shape[3], layer) for layer in config for part in (layer.keys, layer.values)]
        return sum(size * min(tokens, getattr(layer, "sliding_window", None) or tokens) for size, layer in rows)

    def _filled(self, decoder: Decoder, tokens: int) -> Cache:
        cache = decoder.caches.new()
        for index, layer in enumerate(self._reading[STOCK].layers):
            cache.update(*(_repeated(part, tokens) for part in (layer.keys, layer.values)), index)
        if (held := int(cache.get_seq_length())) != tokens:
            raise RivalError(f"a cache of {tokens} tokens says that it holds {held}")
        return cache

    def _warm(self, name: str) -> None:
        self._pass(name, self.decoders[name].caches.new(), self._ids[:256])

    @torch.no_grad()
    def _pass(self, name: str, cache: Cache, ids: Sequence[int]) -> None:
        given = torch.tensor([list(ids)])
        self.decoders[name].model(input_ids=given, **{CACHE: cache}, use_cache=True, logits_to_keep=1)


def _repeated(part: torch.Tensor, tokens: int) -> torch.Tensor:
    """Keys or values of a layer, over and over, for so many tokens."""
    times = -(-tokens // part.shape[2])
    return part.repeat(1, 1, times, 1)[:, :, :tokens].contiguous()
