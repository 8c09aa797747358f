"""A stock cache and a ScoutCache that go through the same operations, on a tiny Llama."""

from __future__ import annotations

import copy
import functools

import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import scout_hf
from scout_hf import ScoutCache

VOCAB, LAYERS, KV_HEADS, HEAD_DIM = 61, 2, 2, 8
TOLERANCE = {torch.float32: 3e-6, torch.float64: 2e-14}
CROP_TAKES_LENGTH = Version(transformers.__version__) < Version("5.14")
TWO_TIERS = {"split": "cpu", "window": 8, "resident": 16, "recall": 2}
SETTINGS = {
    "one tier": {"split": "off", "layer_ahead": False},
    "two tiers": {**TWO_TIERS, "layer_ahead": False},
    "two tiers, no window": {**TWO_TIERS, "window": 0, "recall": 1, "layer_ahead": False},
    "selected ahead": {**TWO_TIERS, "layer_ahead": True, "cpu_query": "real"},
    "one tier, budget large enough": {"split": "off", "budget": 4096, "window": 8, "digest": "minmax"},
    "two tiers, budget large enough": {**TWO_TIERS, "budget": 4096, "layer_ahead": False, "digest": "minmax"},
    "one tier, sign codes": {"split": "off", "budget": 4096, "window": 8, "digest": "sign"},
    "two tiers, sign codes": {**TWO_TIERS, "budget": 4096, "layer_ahead": False, "digest": "sign"},
    "one tier, sign codes of two bits": {"split": "off", "budget": 4096, "window": 8, "digest": "sign2"},
    "one tier, budget 1.0": {"split": "off", "budget": 1.0, "window": 8},
    "two tiers, budget 1.0": {**TWO_TIERS, "budget": 1.0, "window": 16, "layer_ahead": False},
    "dense": {"method": "dense", "window": 8},
    "dense, head by head": {"method": "dense", "window": 0, "method_options": {"heads": 1}},
    "kvpr": {"method": "kvpr", "window": 8, "method_options": {"share": 0.5}},
    "infinigen": {"method": "infinigen", "window": 8},
    "infinigen, budget large enough": {
        **{"method": "infinigen", "window": 0, "budget": 4096, "layer_ahead": False},
        "method_options": {"alpha": 1e9},
    },
    "infinigen, kept": {
        **{"method": "infinigen", "window": 8, "budget": 4096},
        "method_options": {"alpha": 1e9, "keep": True},
    },
    "hgca": {"method": "hgca", "resident": 16, "method_options": {"threshold": 0}},
}


@functools.cache
def stock_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        initializer_range=0.25,  # attention that is far from uniform, or an error in it would not reach the logits
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight *= 0.1  # logits of about 1 at most, the size that the tolerance is meant for
    use_norms_of_their_dtype(model)
    return model.to(dtype)


def use_norms_of_their_dtype(model):
    """Llama's own norms round to float32: in float64 they hide errors, and now and then make 1e-15 into 1e-12."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)


@functools.cache
def patched_model(dtype=torch.float32):
    model = copy.deepcopy(stock_model(dtype))
    scout_hf.patch(model)
    return model


def new_cache(name, **options):
    return ScoutCache(stock_model().config, **{"budget": None, "block_size": 8, **SETTINGS[name], **options})


def forward(model, cache, ids, mask, mask_given=True):
    """Logits of the new tokens; positions count real tokens, so that padding shifts nothing."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    given = mask.long() if mask_given or not mask.all() else None
    return model(input_ids=ids, attention_mask=given, position_ids=positions, past_key_values=cache).logits


class World:
    """A stock cache and a scout cache that went through the same, and which of their tokens are padding."""

    def __init__(self, name, batch, padding=None, dtype=torch.float32):
        self.dtype = dtype
        self.stock, self.scout = DynamicCache(config=stock_model().config), new_cache(name)
        self.mask = torch.zeros(batch, 0, dtype=torch.bool)
        self.padding = padding or [0] * batch

    def run(self, tokens, seed, mask_given):
        batch, held = self.mask.shape
        generator = torch.Generator().manual_seed(seed)
        new = torch.ones(batch, tokens, dtype=torch.bool)
        for row, pad in zip(range(batch), self.padding):
            new[row, : max(0, pad - held)] = False  # possibly all of them: padding may be longer than a chunk
        self.mask = torch.cat([self.mask, new], 1)
        ids = torch.randint(VOCAB, (batch, tokens), generator=generator)
        expected = forward(stock_model(self.dtype), self.stock, ids, self.mask, mask_given)
        got = forward(patched_model(self.dtype), self.scout, ids, self.mask, mask_given)
        return (got - expected)[new].abs().max().item() if new.any() else 0.0

    def check(self, *args):
        assert self.run(*args) <= TOLERANCE[self.dtype]

    def fill(self, tokens, seed):
        """Update both caches without a model, and compare what they hand back."""
        batch, held = self.mask.shape
        generator = torch.Generator().manual_seed(seed)
        self.mask = torch.cat([self.mask, torch.ones(batch, tokens, dtype=torch.bool)], 1)
        for layer in range(LAYERS):
            new = [
                torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, generator=generator, dtype=self.dtype) for _ in range(2)
            ]
            expected, got = self.stock.update(*new, layer), self.scout.update(*new, layer)
            for one, other in zip(got, expected):
                # What a forward pass stored differs by rounding, what came from outside does not at all.
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
                assert torch.equal(one[:, :, held:], other[:, :, held:])

    def crop(self, drop, by_length=False):
        left = self.mask.shape[1] - drop
        amount = left if by_length and CROP_TAKES_LENGTH and left else -drop
        self.stock.crop(amount)
        self.scout.crop(amount)
        self.mask = self.mask[:, :left]

    def twin(self):
        other = copy.copy(self)
        other.stock, other.scout = copy.deepcopy(self.stock), copy.deepcopy(self.scout)
        return other
