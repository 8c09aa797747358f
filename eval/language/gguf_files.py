"""What a GGUF file holds, and the same weights in other formats as another file; without loading a model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scout_hf.errors import ConfigError
from scout_hf.eval.language.gguf import must_be_readable
from scout_hf.files import put_in_place

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_WRITTEN = ("general.architecture", "general.file_type")


class GgufFacts(NamedTuple):
    """Of a file: format of most weights, layers, rows of the embedding, and bytes that a decode step reads."""

    format: str
    layers: int
    vocabulary: int
    step_bytes: int


def facts(file: Path) -> GgufFacts:
    """Read the head of a file; ConfigError where it is broken, or nothing here reads GGUF."""
    reader = _reader(file)
    names = {tensor.name: tensor for tensor in reader.tensors}
    layers = reader.fields.get(f"{_architecture(reader)}.block_count")
    if layers is None or EMBEDDING not in names:
        raise ConfigError(f"{file} is no GGUF file of a language model: it has no layers, or no {EMBEDDING}")
    # An embedding that is not the head too gives one row.
    read = [tensor for name, tensor in names.items() if name != EMBEDDING or HEAD not in names]
    # The format of a file is that of most of its matrices; some are often finer.
    weights: Counter[str] = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            weights[tensor.tensor_type.name] += int(tensor.n_bytes)
    return GgufFacts(
        _file_type(reader) or weights.most_common(1)[0][0],
        int(layers.contents()),
        int(names[EMBEDDING].shape[-1]),
        sum(int(tensor.n_bytes) for tensor in read),
    )


def write_f16(file: Path, out: Path, tell: Callable[[str], object] = print) -> None:
    """Write the same model with its matrices in F16, all of it or nothing."""
    import gguf

    tell(f"writing the weights of {file.name} in F16 to {out}")
    kinds = gguf.GGMLQuantizationType
    # Vectors stay in F32, as other writers of F16 do it.
    _rewrite(file, out, lambda tensor: kinds.F16 if len(tensor.shape) > 1 else kinds.F32, gguf.LlamaFileType.MOSTLY_F16)


def foreign(file: Path, known: Collection[str]) -> set[str]:
    """Formats of weights in a file that are none of the known ones."""
    return {tensor.tensor_type.name for tensor in _reader(file).tensors} - set(known)


def write_known(file: Path, out: Path, known: Collection[str], tell: Callable[[str], object] = print) -> None:
    """Write the same model with weights of other formats than the known ones in Q8_0, which loses next to nothing."""
    import gguf

    tell(f"writing the weights of {file.name} to {out}, in Q8_0 what is not in {', '.join(sorted(known))}")
    finer = gguf.GGMLQuantizationType.Q8_0
    _rewrite(file, out, lambda tensor: tensor.tensor_type if tensor.tensor_type.name in known else finer, None)


def _rewrite(file: Path, out: Path, kind_of: Callable[[Any], Any], file_type: Any | None) -> None:
    """Write a model with each tensor in the format that ``kind_of`` gives it, vectors and plain numbers included."""
    import gguf
    from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

    reader, plain = _reader(file), {"F32": np.float32, "F16": np.float16}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out.parent) as scratch:
        made = Path(scratch, out.name)
        writer = gguf.GGUFWriter(made, _architecture(reader))
        skipped = _WRITTEN if file_type is not None else _WRITTEN[:1]
        for field in reader.fields.values():
            kind, *of = field.types
            if not field.name.startswith("GGUF.") and field.name not in skipped:
                writer.add_key_value(field.name, field.contents(), kind, sub_type=of[-1] if of else None)
        if file_type is not None:
            writer.add_file_type(file_type)
        for tensor in reader.tensors:
            shape, kind = [int(size) for size in reversed(tensor.shape)], kind_of(tensor)
            dtype = np.dtype(plain.get(kind.name, np.uint8))
            stored = shape if kind.name in plain else list(quant_shape_to_byte_shape(shape, kind))
            size = int(np.prod(stored)) * dtype.itemsize
            raw = None if kind.name in plain else kind
            writer.add_tensor_info(tensor.name, stored, dtype, size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            kind = kind_of(tensor)
            if kind == tensor.tensor_type:
                data = tensor.data
            else:
                numbers = dequantize(tensor.data, tensor.tensor_type)
                data = numbers.astype(plain[kind.name]) if kind.name in plain else quantize(numbers, kind)
            writer.write_tensor_data(np.ascontiguousarray(data))
        writer.close()
        put_in_place(made, out)


def _reader(file: Path) -> Any:
    must_be_readable(file.name)
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{file} cannot be read as GGUF: {error}") from error


def _architecture(reader: Any) -> str:
    return str(reader.fields["general.architecture"].contents())


def _file_type(reader: Any) -> str | None:
    import gguf

    field = reader.fields.get("general.file_type")
    try:
        return gguf.LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_") if field else None
    except ValueError:  # newer than the reader
        return None
