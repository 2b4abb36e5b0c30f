"""safetensors files that are written and read one tensor at a time.

safetensors' own functions need all tensors of a file in memory at once. The format is simple: the length of the header
(8 bytes), a header in JSON, and the tensors: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cogds.files import apply_umask

# safetensors' names of dtypes.
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Name, shape and dtype of a tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: Path, entries: Sequence[TensorEntry], tensors: Iterable[torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write a file and flush it to the disk. Returns its size and digest, as `checkpoint` records them.

    tensors: those of the entries, in the same order, on any device. Only one of them is needed at a time. All entries
    must have dtypes of the same size, or be sorted by it, the largest first, because readers need aligned tensors.
    """
    sizes = [entry.dtype.itemsize for entry in entries]
    if sizes != sorted(sizes, reverse=True):
        raise ValueError("the tensors are not sorted by the size of their dtypes")
    offsets, end = [], 0
    for entry in entries:
        offsets.append((end, end := end + entry.num_bytes))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} | {
        entry.name: {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offset}
        for entry, offset in zip(entries, offsets)
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in _parts(encoded, entries, tensors):
            file.write(part)
            digest.update(part)
            num_bytes += len(part)
        file.flush()
        os.fsync(file.fileno())
    apply_umask(path)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _parts(header: bytes, entries: Sequence[TensorEntry], tensors: Iterable[torch.Tensor]) -> Iterable[Any]:
    yield len(header).to_bytes(8, "little")
    yield header
    for entry, tensor in zip(entries, tensors, strict=True):
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise RuntimeError(f"'{entry.name}' is {tensor.dtype} {tuple(tensor.shape)}, not as announced: {entry}")
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class TensorFile:
    """An open file, of which parts of tensors can be read. entries: by name; metadata: texts from the header."""

    def __init__(self, path: Path):
        self._file: BinaryIO = path.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries = {
            name: TensorEntry(name, tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in header.items()
        }
        self._starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read the elements [start, stop) of a tensor in flat order."""
        if start == stop:
            return torch.empty(0, dtype=self.entries[name].dtype)
        itemsize = self.entries[name].dtype.itemsize
        content = bytearray((stop - start) * itemsize)
        self._file.seek(self._starts[name] + start * itemsize)
        if self._file.readinto(content) != len(content):  # type: ignore[attr-defined]
            raise OSError(f"{self._file.name} is shorter than its header says")
        return torch.frombuffer(content, dtype=self.entries[name].dtype)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
