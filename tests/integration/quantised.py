"""A tiny model with weights in every quantised format that a CPU serves, loaded and quantised as users do it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from scout_hf.patches import family_of
from tests.integration.models import silence
from tests.patches.tiny import VOCAB, tiny_config

WIDE = {"hidden_size": 256, "intermediate_size": 256}
"""bitsandbytes packs rows of 32, quanto and torchao groups of at least as many columns."""


@dataclass(frozen=True)
class Format:
    """How one format comes to a model.

    library : module that it needs; rounded : whether activations lose bits; config : what ``from_pretrained`` gets as
    quantization_config, or None for a model that is quantised in place by ``change``.
    """

    library: str
    config: Callable[[], Any] | None = None
    change: Callable[[nn.Module], Any] | None = None
    dtype: torch.dtype = torch.float32
    rounded: bool = False

    @property
    def tolerance(self) -> float:
        """Of logits as large as 4: where activations are rounded to 8 bits or bf16, one last bit is a step of these."""
        return 0.2 if self.rounded or self.dtype == torch.bfloat16 else 2e-5


def _torchao(name: str, **options):
    def config():
        import torchao.quantization as known
        from transformers import TorchAoConfig

        if "weight_granularity" in options:
            options["weight_granularity"] = known.PerGroup(32)
        return TorchAoConfig(getattr(known, name)(**options))

    return config


def _torchao_int4():
    from transformers import TorchAoConfig

    opaque = pytest.importorskip("torchao.prototype.quantization.int4", reason="an older torchao")
    return TorchAoConfig(opaque.PrototypeInt4WeightOnlyConfig(group_size=32))


def _quanto(weights: str):
    def config():
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)

    return config


def _bitsandbytes(**options):
    def config():
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    return config


def _dynamic(model):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no 8-bit kernels in this torch")
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS = {
    "torchao int8": Format("torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao int8, dynamic": Format("torchao", _torchao("Int8DynamicActivationInt8WeightConfig"), rounded=True),
    "torchao int4, bf16": Format("torchao", _torchao_int4, dtype=torch.bfloat16),
    "torchao int4, dynamic": Format(
        "torchao",
        _torchao("Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4, weight_granularity=None),
        rounded=True,
    ),
    "quanto int8": Format("optimum.quanto", _quanto("int8")),
    "quanto int4": Format("optimum.quanto", _quanto("int4")),
    "quanto int4, bf16": Format("optimum.quanto", _quanto("int4"), dtype=torch.bfloat16),
    "bitsandbytes int8": Format("bitsandbytes", _bitsandbytes(load_in_8bit=True), rounded=True),
    "bitsandbytes nf4": Format("bitsandbytes", _bitsandbytes(**_NF4), rounded=True),
    "bitsandbytes nf4, bf16": Format("bitsandbytes", _bitsandbytes(**_NF4), dtype=torch.bfloat16),
    "bitsandbytes nf4, twice": Format(
        "bitsandbytes", _bitsandbytes(**_NF4, bnb_4bit_use_double_quant=True), rounded=True
    ),
    "torch int8, dynamic": Format("torch", change=_dynamic, rounded=True),
    "GGUF": Format("gguf"),
}


KINDS = ("torchao int8", "quanto int4", "bitsandbytes nf4", "torch int8, dynamic")
"""One of each way in which weights are kept."""


def is_there(name: str) -> bool:
    """Whether the format's library is installed."""
    needed = {FORMATS[name].library, "accelerate"}
    return all(importlib.util.find_spec(one.partition(".")[0]) for one in needed)


def quantised(name: str, folder: Path, family: str = "llama", seed: int = 0, silent: bool = False, turned=False):
    """A new model with weights of that format, from a checkpoint that is written to ``folder`` once.

    silent : no layer but the last writes; turned : one projection of the first layer is its negative.
    """
    if not is_there(name):
        pytest.skip(f"{FORMATS[name].library} is not installed")
    made, family = FORMATS[name], "qwen2" if name == "GGUF" else family
    path = folder / f"{family}-{seed}{'-silent' * silent}{'-turned' * turned}{'.gguf' * (name == 'GGUF')}"
    with _quietly():
        if not path.exists():
            model = checkpoint(family, seed)
            _change(model, silent, turned)
            write_gguf(path, model) if name == "GGUF" else model.save_pretrained(path)
        if name == "GGUF":
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=made.dtype)
        elif made.config:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=made.dtype, quantization_config=made.config())
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=made.dtype)
            made.change(model)
    return model.eval()


def checkpoint(family: str, seed: int = 0):
    """What is quantised."""
    config = tiny_config(family, **{"initializer_range": 0.05, "num_hidden_layers": 3} | WIDE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def _change(model, silent: bool, turned: bool) -> None:
    family = family_of(model)
    if silent:
        silence(model, family)
    if turned:
        attention = family.attention(family.layers(family.decoder(model))[0])
        next(weight for weight in attention.parameters() if weight.dim() == 2).neg_()


def write_gguf(path: Path, model) -> None:
    """Write a Qwen2, whose rows keep their order in such a file, in 8-bit blocks."""
    import gguf
    from gguf.quants import quantize

    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    for name, weight in model.state_dict().items():
        stem, _, part = name.rpartition(".")
        blocks, kind = weight.numpy().astype(np.float32), None
        if weight.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            blocks = quantize(blocks, kind)
        writer.add_tensor(f"{names.get_name(stem)}.{part}", blocks, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


@contextmanager
def _quietly():
    """Libraries tell about every matrix."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
