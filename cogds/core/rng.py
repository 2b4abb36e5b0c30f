"""One generator per (seed, step, slot, purpose): every random draw of a run follows from its place in the run.

There is no generator state to save: resuming at step N makes the same generators that step N would have had, and two
purposes (noise, dropout, posterior) never share a stream, so adding a draw to one leaves the others as they were.
"""

import torch

from cogds.core.permutation import keyed_hash


def generator(seed: int, step: int, slot: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator for one purpose (at most 16 bytes) of one sample: a slot of one optimizer step."""
    return torch.Generator(device).manual_seed(keyed_hash(purpose, seed, step, slot) >> 1)


def seed_global(seed: int, step: int, rank: int) -> None:
    """Torch's global generators, which layers such as LoRA's dropout draw from, likewise."""
    torch.manual_seed(keyed_hash("global", seed, step, rank) >> 1)
