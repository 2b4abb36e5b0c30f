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


def use_deterministic_kernels() -> None:
    """Make torch use deterministic kernels only, and raise RuntimeError if an operator has none."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_global(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators, which layers such as LoRA dropout draw from."""
    torch.manual_seed(keyed_hash("global", seed, step, rank) >> 1)
