"""Encoded clips and captions on disk, content-addressed: what made an entry is its name.

A key is the digest of everything the tensors depend on (file content, bucket, frame rate, model weights, dtype, code
version). Change any of them and the name changes, so nothing stale is ever read, and nothing is encoded twice.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cogds.errors import UserError
from cogds.files import whole_file

# Raised whenever the same inputs would encode to other tensors: resampling, cropping, or what an entry holds.
ENCODING_VERSION = 1


def digest(fields: Mapping[str, Any]) -> str:
    """The key of an entry: 32 hex digits of everything that made it, plus ENCODING_VERSION."""
    text = json.dumps({**fields, "encoding_version": ENCODING_VERSION}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_file(path: str) -> str:
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def digest_files(paths: Sequence[str], memo_file: Path) -> dict[str, str]:
    """Content digest of each file. Known ones (same path, size and time of change) are not read again.

    Files that cannot be read are left out of the answer.
    """
    try:
        memo = json.loads(memo_file.read_text())
    except (FileNotFoundError, ValueError):
        memo = {}
    stamps = {}
    for path in dict.fromkeys(paths):
        try:
            stat = os.stat(path)
            stamps[path] = [stat.st_size, stat.st_mtime_ns]
        except OSError:
            continue

    def known(path: str) -> list[Any]:
        if path in memo and memo[path][:2] == stamps[path]:
            return memo[path]
        try:
            return [*stamps[path], _digest_file(path)]
        except OSError:
            return []

    with ThreadPoolExecutor(8) as pool:  # hashing and reading both release the GIL
        found = {path: entry for path, entry in zip(stamps, pool.map(known, stamps)) if entry}
    if any(memo.get(path) != entry for path, entry in found.items()):
        with whole_file(memo_file) as partial:
            partial.write_text(json.dumps({**memo, **found}))
    return {path: entry[2] for path, entry in found.items()}


class Cache:
    """Entries of tensors under a root folder, one safetensors file each; `kind` is a subfolder, such as `clips`."""

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        return self.path(kind, key).is_file()

    def write(self, kind: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Complete or absent."""
        with whole_file(self.path(kind, key)) as partial:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)

    def read(self, kind: str, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry. Raises UserError, naming the file to delete, where it is damaged or gone."""
        path = self.path(kind, key)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"cache entry {path} cannot be read ({error}): delete it and start again, it will be encoded anew"
            ) from None
