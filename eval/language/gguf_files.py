"""What a GGUF file holds, and the same weights in F16 as another file; without loading a model."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scout_hf.errors import ConfigError
from scout_hf.eval.language.gguf import must_be_readable

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
    from gguf.quants import dequantize

    reader = _reader(file)
    tell(f"writing the weights of {file.name} in F16 to {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".f16-", dir=out.parent) as scratch:
        made = Path(scratch, out.name)
        writer = gguf.GGUFWriter(made, _architecture(reader))
        for field in reader.fields.values():
            kind, *of = field.types
            if not field.name.startswith("GGUF.") and field.name not in _WRITTEN:
                writer.add_key_value(field.name, field.contents(), kind, sub_type=of[-1] if of else None)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        for tensor in reader.tensors:
            shape, dtype = [int(size) for size in reversed(tensor.shape)], np.dtype(_kind(tensor))
            writer.add_tensor_info(tensor.name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(dequantize(tensor.data, tensor.tensor_type).astype(_kind(tensor)))
        writer.close()
        os.replace(made, out)


def _kind(tensor: Any) -> type[np.floating[Any]]:
    """Vectors stay in F32, as other writers of F16 do it."""
    return np.float16 if len(tensor.shape) > 1 else np.float32


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
