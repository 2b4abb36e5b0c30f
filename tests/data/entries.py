"""Cache entries that are made from a number, and functions that write, read and damage them."""

from pathlib import Path

import torch

from cogds.data.cache.keys import cache_key
from cogds.data.cache.store import Cache


def key_of(number):
    return cache_key({"number": number})


def entry(number, size=64):
    """Tensors that differ for every number, and are the same for the same number."""
    generator = torch.Generator().manual_seed(number)
    return {
        "moments": torch.randn(2, size, generator=generator).bfloat16(),
        "first_frame": torch.randint(0, 256, (3, 5), generator=generator, dtype=torch.uint8),
    }


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def write(root, numbers, kind="clips", **options):
    with Cache(root).writer(kind, **options) as writer:
        for number in numbers:
            writer.write(key_of(number), entry(number))


def fail(root, number, reason="no frames", kind="clips"):
    with Cache(root).writer(kind) as writer:
        writer.fail(key_of(number), reason)


def read(root, number, kind="clips", snapshot=None):
    cache = Cache(root)
    place = (snapshot or cache.snapshot(kind)).place(key_of(number))
    assert place is not None
    return cache.read(kind, key_of(number), place)


def files_in(root):
    return sorted(path for path in Path(root).rglob("*") if path.is_file())


def stage(root, numbers, kind="clips"):
    """Leave what a killed run of cogds 0.1 leaves: a folder with a lock, a file per entry, and a temporary file."""
    staging = Path(root) / kind / f"staging-{'ab' * 16}"
    for number in numbers:
        write(root, [number], kind)
        (file,) = (path for path in files_in(Path(root) / kind) if path.parent != staging)
        staging.mkdir(exist_ok=True)
        file.rename(staging / f"{key_of(number)}.safetensors")
    (staging / "lock").touch()
    (staging / f"{key_of(0)}.1234abcd.tmp.safetensors").write_bytes(b"half")
    return staging


def flip(path, at, bit=0):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))
