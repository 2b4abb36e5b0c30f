"""Which files are held out, and which clips are evaluated: by hashes of names, so that neither depends on what else is
there.

A file that is held out stays so when others come or go, and when the data set is moved as a whole: its name counts from
the data set's folder on. A larger share holds out the same files and more.
"""

import os
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


def portable_name(path: str, roots: Sequence[str]) -> str:
    """A file's name without what differs from machine to machine.

    path: absolute; roots: the data sets' folders, absolute. The path below the innermost of the folders that it is in;
    outside of all of them, the file with the folder that it is in.
    """
    parts = path.split(os.sep)
    starts = [root.rstrip(os.sep).split(os.sep) for root in roots]
    within = max((len(start) for start in starts if parts[: len(start)] == start), default=len(parts) - 2)
    # macOS writes letters with accents as two characters, Linux leaves them as they came.
    return unicodedata.normalize("NFC", "/".join(parts[max(0, within) :]))


def name_hash(name: str, part: str = "") -> int:
    """64 uniform bits of a file's name, or of a named part of that file."""
    message = f"{name}\0{part}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(message, digest_size=8, person=b"held out").digest(), "little")


def is_held_out(name: str, share: float) -> bool:
    """Whether a file of this (portable) name is held out, where this share of all names is."""
    return name_hash(name) < share * 2**64


def min_held_out_share(name: str) -> float:
    """The smallest share, in steps of 0.001, that holds this file out."""
    return (name_hash(name) * 1000 // 2**64 + 1) / 1000


def spread(buckets: Sequence[int] | np.ndarray, hashes: Sequence[int] | np.ndarray, num: int) -> np.ndarray:
    """Up to `num` clips, as evenly over the buckets as these have clips: their numbers, ascending.

    buckets, hashes: of every clip. Every bucket gives its clip of the smallest hash, then each its second, and so on;
    in the last turn those of the smallest hashes do.
    """
    hashes = np.asarray(hashes, np.uint64)
    by_hash = np.argsort(hashes, kind="stable")
    turns, taken = np.zeros(len(hashes), np.int64), dict[int, int]()
    for clip in by_hash.tolist():
        bucket = int(buckets[clip])
        turns[clip] = taken[bucket] = taken.get(bucket, -1) + 1
    return np.sort(np.lexsort((hashes, turns))[:num])
