"""One random generator per (seed, step, slot, purpose).

There is no generator state to save: resuming at step N creates the generators that the uninterrupted run would have
used. Purposes (noise, dropout, posterior) never share a stream, so an additional draw for one does not affect the
others.
"""

import torch

from cogds.core.permutation import keyed_hash


def generator(seed: int, step: int, slot: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator for one purpose (at most 16 bytes) and one sample, which is a slot of an optimizer step."""
    return torch.Generator(device).manual_seed(keyed_hash(purpose, seed, step, slot) >> 1)


def seed_global(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators, which layers such as LoRA dropout draw from."""
    torch.manual_seed(keyed_hash("global", seed, step, rank) >> 1)
