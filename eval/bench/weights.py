"""``python -m scout_hf.eval.bench.weights MODEL``: steps of a real model by the format of its weights, as a table.

Stock attention beside exact and automatic steps of scout_hf, with the same weights, at a short and a long context, all
interleaved. Keys and values are random and in the model's dtype: speed does not depend on their meaning.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from typer import Argument, Option

import scout_hf
from scout_hf import CACHE
from scout_hf.eval.bench import machine
from scout_hf.eval.bench.timing import interleave, timed
from scout_hf.eval.caches import kv_bytes_per_token, random_kv
from scout_hf.eval.language.load import located
from scout_hf.eval.markdown import to_markdown
from scout_hf.eval.tables import Grid

BF16, F32 = torch.bfloat16, torch.float32
ARMS: dict[str, dict[str, Any] | None] = {"stock": None, "exact": {"budget": None}, "auto": {"budget": "auto"}}
FIRST_TOKENS, WARM_UPS = 8, 4
SPARE_BYTES = 2 << 30


def _torchao(name: str, **options: Any) -> Any:
    import torchao.quantization as known
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(known, name)(**options))


def _torchao_int4() -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32))


def _quanto(weights: str) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


def _bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def _dynamic(model: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def _nf4() -> Any:
    return _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")


FORMATS: dict[str, tuple[torch.dtype, Callable[[], Any] | None, Callable[[nn.Module], Any] | None]] = {
    "float32": (F32, None, None),
    "bfloat16": (BF16, None, None),
    "torch int8, dynamic (float32)": (F32, None, _dynamic),
    "bitsandbytes nf4 (float32)": (F32, _nf4, None),
    "bitsandbytes nf4 (bfloat16)": (BF16, _nf4, None),
    "bitsandbytes int8 (bfloat16)": (BF16, lambda: _bitsandbytes(load_in_8bit=True), None),
    "torchao int4 (bfloat16)": (BF16, _torchao_int4, None),
    "torchao int8 (bfloat16)": (BF16, lambda: _torchao("Int8WeightOnlyConfig"), None),
    "torchao int8, dynamic (bfloat16)": (BF16, lambda: _torchao("Int8DynamicActivationInt8WeightConfig"), None),
    "quanto int8 (bfloat16)": (BF16, lambda: _quanto("int8"), None),
    "quanto int4 (bfloat16)": (BF16, lambda: _quanto("int4"), None),
}
"""By name: dtype, quantization_config of ``from_pretrained``, and what quantises in place."""


def step_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: an embedding that is not the head too gives one row."""
    head = model.get_output_embeddings()
    tied = getattr(head, "weight", None) is model.get_input_embeddings().weight
    seen: set[int] = set()
    size = 0
    for module in model.modules():
        if module is model.get_input_embeddings() and not tied:
            continue
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic."):
            size += module.out_features * (module.in_features + 4)
        for weight in module.parameters(recurse=False):
            if id(weight) not in seen:
                seen.add(id(weight))
                size += sum(part.nbytes for part in _plain(weight))
    return size


def _plain(weight: Any) -> Iterator[torch.Tensor]:
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _plain(getattr(weight, name))
        return
    yield weight.data
    if (state := getattr(weight, "quant_state", None)) is not None:
        yield state.absmax


def load(path: str, name: str) -> Any:
    """A model with weights of that format."""
    dtype, config, change = FORMATS[name]
    options = {"quantization_config": config()} if config else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()
    if change:
        change(model)
    return model


def main(
    model: Annotated[str, Argument(help="A folder, a name of the hub, or a packaged model.")] = "qwen2.5-coder-0.5b",
    context: Annotated[list[int] | None, Option(help="Tokens in the cache; 0 and 4096.")] = None,
    formats: Annotated[list[str] | None, Option("--format", help="Whose name begins so; all.")] = None,
    threads: Annotated[int | None, Option(min=1, help="CPUs to use.")] = None,
    repeat: Annotated[int, Option(min=3, help="Timed steps of each kind, in random order.")] = 7,
) -> None:
    """Print the table; all models are in memory together."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    contexts, path = context or [0, 4096], located(model)
    chosen = [name for name in FORMATS if not formats or name.startswith(tuple(formats))]
    try:
        machine.check_memory(_kv_bytes(path, chosen, contexts) + SPARE_BYTES, "give fewer --context or --format")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    count = threads or min(torch.get_num_threads(), len(machine.usable_cpus()))
    with machine.measuring(count, typer.echo) as company, ExitStack() as stack:
        steps, sizes = {}, {}
        for name in chosen:
            typer.echo(f"loading {name}", err=True)
            try:
                sizes[name] = _prepare(path, name, contexts, steps, stack)
            except MemoryError:
                raise
            except Exception as error:  # of a library that this machine has no kernels of
                typer.echo(f"{name}: cannot run here: {error}".partition("\n")[0])
        times = interleave({key: lambda step=step: step for key, step in steps.items()}, repeat)
        others = company.record()["cpus_used_by_others"]
    places = [(tokens, arm) for tokens in contexts for arm in ARMS]
    rows = [
        (
            name,
            f"{size / 1e6:.0f}",
            *(f"{(ms := 1e3 * times[(name, *place)].median):.0f} ({1e3 / ms:.1f})" for place in places),
        )
        for name, size in sizes.items()
    ]
    heads = ("weights", "MB a step", *(f"{arm}, {tokens}" for tokens, arm in places))
    about = machine.describe()
    isa = about["isa"] or "no native library"
    typer.echo(f"{model}, {about['cpu']}, {isa}, {count} threads, others used {others:.1f} CPUs")
    typer.echo(f"ms per step (tokens/s), medians of {repeat}\n\n{to_markdown([Grid('', heads, rows=rows)])}")


def _kv_bytes(path: str, formats: list[str], contexts: list[int]) -> int:
    """Of all caches together, with the room that they take to grow; weights not counted."""
    text = AutoConfig.from_pretrained(path).get_text_config(decoder=True)
    numbers = kv_bytes_per_token(text) // BF16.itemsize * sum(tokens or FIRST_TOKENS for tokens in contexts) * len(ARMS)
    return int(1.3 * numbers * sum(FORMATS[name][0].itemsize for name in formats))


def _prepare(path: str, name: str, contexts: list[int], steps: dict[Any, Callable[[], Any]], stack: ExitStack) -> int:
    model = load(path, name)
    size, mine = step_bytes(model), {}
    handle = stack.enter_context(scout_hf.patch(model))
    for arm, options in ARMS.items():
        for tokens in contexts:
            # Given a cache of transformers, a patched model attends as the stock model.
            cache = DynamicCache(config=model.config) if options is None else handle.new_cache(**options)
            for layer in range(model.config.num_hidden_layers):
                keys, values = (part.to(model.dtype) for part in random_kv(model.config, tokens or FIRST_TOKENS))
                cache.update(keys, values, layer)
            mine[name, tokens, arm] = _stepper(model, cache)
    for step in mine.values():
        for _ in range(WARM_UPS):
            timed(step)
    steps |= mine
    return size


def _stepper(model: Any, cache: Any) -> Callable[[], Any]:
    ids = torch.ones((1, 1), dtype=torch.long, device="cpu")

    @torch.no_grad()
    def step():
        return model(input_ids=ids, **{CACHE: cache}, use_cache=True)

    return step


if __name__ == "__main__":
    typer.run(main)
