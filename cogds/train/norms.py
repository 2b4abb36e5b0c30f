"""The norms of the LoRA's weights and of one optimizer step's update, by depth.

They are computed from the float32 master weights. The model's bf16 copies would not show a small update, which changes
only few of them, each by a whole last bit. Each rank measures its own partition of the master weights; the squares are
summed over ranks together with the losses, so nothing is gathered.
"""

import itertools
import re
from typing import Any

import torch

from cogds.distributed.deepspeed_internals import local_master_weight
from cogds.distributed.world import World
from cogds.engine.state import trainable
from cogds.metrics.step_metrics import SquaredNorms

NUM_GROUPS = 4
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
_UP = ".lora_B."  # starts at 0, so its norm is what was learned; lora_A starts large and hardly changes


def depth_groups(num_blocks: int) -> list[range]:
    """Split the blocks into up to NUM_GROUPS groups of about the same size."""
    num = min(NUM_GROUPS, num_blocks)
    edges = [round(group * num_blocks / num) for group in range(num + 1)]
    return [range(start, end) for start, end in itertools.pairwise(edges)]


def group_label(blocks: range) -> str:
    """Return `blocks=00-10`."""
    return f"blocks={blocks.start:02}-{blocks[-1]:02}" if len(blocks) > 1 else f"blocks={blocks.start:02}"


class LoraNorms:
    """Measures the norms of the LoRA's B matrices, and of an optimizer step's update of all its matrices."""

    def __init__(self, engine: Any, world: World, num_blocks: int) -> None:
        groups = depth_groups(num_blocks)
        labels = [group_label(blocks) for blocks in groups]
        self.names = [f"lora/{norm}/{label}" for norm in ("weight_norm", "update_norm") for label in labels]
        self._device, self._rank = world.device, world.rank
        self._parts: list[tuple[int, bool, torch.nn.Parameter]] = []  # group, whether it is a B matrix, parameter
        for name, parameter in trainable(engine).items():
            if match := _BLOCK.search(name):
                group = next(n for n, blocks in enumerate(groups) if int(match[1]) in blocks)
                self._parts.append((group, _UP in name, parameter))
        self._before: list[torch.Tensor] = []

    def snapshot(self) -> None:
        """Copy this rank's master weights before an optimizer step. `measure` frees the copy.

        The activations are already freed then, so peak memory does not rise.
        """
        self._before = [local_master_weight(parameter, self._rank).clone() for _, _, parameter in self._parts]

    def measure(self) -> SquaredNorms:
        """Return this rank's part of the norms, after the step."""
        num = len(self.names) // 2
        squares = torch.zeros(2 * num, dtype=torch.float64, device=self._device)
        for (group, is_up, parameter), before in zip(self._parts, self._before):
            now = local_master_weight(parameter, self._rank)
            if is_up:
                squares[group] += _square(now).to(self._device)
            squares[num + group] += _square(now - before).to(self._device)
        self._before = []
        return SquaredNorms(self.names, squares)


def _square(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float32).double() ** 2
