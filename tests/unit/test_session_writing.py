"""Tensors of a session are written piece by piece, and read by safetensors as they were."""

import pytest
import safetensors.torch
import torch
import xxhash

from scout_hf.errors import SavingError
from scout_hf.sessions import writing
from scout_hf.sessions.writing import DTYPES, write_tensors


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_every_dtype_and_shape_comes_back(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(writing, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(writing, "WORTH_BEGINNING", 1)
    numbers = torch.arange(24).view(4, 6)
    tensors = {str(dtype): (numbers % 2 if dtype == torch.bool else numbers).to(dtype) for dtype in DTYPES}
    tensors |= {"one": torch.tensor(7.5), "none": torch.empty(3, 0), "turned": numbers.t(), "part": numbers[1:3, ::2]}
    tensors |= {"again": numbers, "and again": numbers}
    size, seen = write_tensors(tmp_path / "file", tensors)
    data = (tmp_path / "file").read_bytes()
    assert (size, seen) == (len(data), xxhash.xxh3_128_hexdigest(data))
    found = safetensors.torch.load(data)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_a_dtype_without_a_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SavingError, match="complex64"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "file").exists()


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file", {"a": torch.zeros(2)})
    assert (tmp_path / "file").read_bytes() == b"kept"
