"""Names of encodings: the digest of everything that made one.

Change any of it and the name changes, so nothing stale is ever read, and nothing is encoded twice.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cogds.files import whole_file

# Raised whenever the same inputs would encode to other tensors: resampling, cropping, or what an entry holds.
ENCODING_VERSION = 2


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
