"""Files that are written tensor by tensor are those of safetensors."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cogds.tensor_file import TensorEntry, TensorFile, write_tensors

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).half(),
    "c": torch.randn(0, 2).bfloat16(),
    "d": torch.randn(2, 2).bfloat16(),
}
ENTRIES = [TensorEntry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]


def test_safetensors_reads_what_was_written(tmp_path):
    digest = write_tensors(tmp_path / "a.safetensors", ENTRIES, iter(TENSORS.values()), {"x": "y"})
    content = (tmp_path / "a.safetensors").read_bytes()
    assert digest == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"x": "y"}


def test_any_part_can_be_read(tmp_path):
    write_tensors(tmp_path / "a.safetensors", ENTRIES, iter(TENSORS.values()), {"x": "y"})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"x": "y"}
        assert list(file.entries.values()) == ENTRIES
        assert torch.equal(file.read("a", 5, 9), TENSORS["a"].flatten()[5:9])
        assert torch.equal(file.read("b", 0, 5), TENSORS["b"])
        assert file.read("d", 1, 1).numel() == 0


def test_what_is_not_as_announced_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="'a'"):
        write_tensors(tmp_path / "a", ENTRIES[:1], [torch.zeros(4, 3)], {})
    with pytest.raises(ValueError, match="not sorted"):
        write_tensors(tmp_path / "a", ENTRIES[::-1], reversed(TENSORS.values()), {})
    write_tensors(tmp_path / "b", ENTRIES[:1], [TENSORS["a"]], {})
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:-1])
    with TensorFile(tmp_path / "b") as file, pytest.raises(OSError, match="shorter"):
        file.read("a", 0, 12)
