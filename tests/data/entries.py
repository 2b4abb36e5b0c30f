"""What the tests of the cache share: entries that follow from a number, and ways to write, read and damage them."""

from pathlib import Path

import torch

from cogds.data.cache.keys import digest
from cogds.data.cache.store import Cache, Writer


def key_of(number):
    return digest({"number": number})


def entry(number, size=64):
    """Other tensors for every number, always the same."""
    generator = torch.Generator().manual_seed(number)
    return {
        "moments": torch.randn(2, size, generator=generator).bfloat16(),
        "first_frame": torch.randint(0, 256, (3, 5), generator=generator, dtype=torch.uint8),
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def write(root, numbers, kind="clips", **options):
    with Cache(root).writer(kind, **options) as writer:
        for number in numbers:
            writer.write(key_of(number), entry(number))


def read(root, number, kind="clips", snapshot=None):
    cache = Cache(root)
    place = (snapshot or cache.snapshot(kind)).place(key_of(number))
    assert place is not None
    return cache.read(kind, key_of(number), place)


def files_in(root):
    return sorted(path for path in Path(root).rglob("*") if path.is_file())


def left_by_the_dead(root, numbers, kind="clips"):
    """What a killed writer leaves: staged entries, nobody's lock, and a temporary."""
    writer = Writer(Path(root) / kind, 1 << 30)
    for number in numbers:
        writer.write(key_of(number), entry(number))
    staging = writer._staging
    (staging.path / f"{key_of(0)}.1234.tmp.safetensors").write_bytes(b"half")
    staging.release()
    return staging.path


def flip(path, at, bit=0):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))
