"""How large the LoRA has become, and how far one step moves it, by depth.

Of the float32 master weights, which the optimizer changes: in bf16 the model computes with copies of them, and a small
step changes few of these, by a whole last bit. Each rank looks at its own share of the masters, and what it finds is
summed with the losses; nothing is gathered.
"""

import itertools
import re
from typing import Any

import torch

from cogds.distributed.world import World
from cogds.engine.deepspeed_internals import local_master_weight
from cogds.engine.state import trainable
from cogds.metrics.step_metrics import Norms

NUM_GROUPS = 4
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
_UP = ".lora_B."  # begins at 0, so its norm is what was learned; lora_A begins large and hardly moves


def depth_groups(num_blocks: int) -> list[range]:
    """Up to NUM_GROUPS groups of neighbouring blocks, of about the same number."""
    num = min(NUM_GROUPS, num_blocks)
    edges = [round(group * num_blocks / num) for group in range(num + 1)]
    return [range(start, end) for start, end in itertools.pairwise(edges)]


def group_label(blocks: range) -> str:
    """`blocks=00-10`."""
    return f"blocks={blocks.start:02}-{blocks[-1]:02}" if len(blocks) > 1 else f"blocks={blocks.start:02}"


class LoraNorms:
    """Norms of the adapters' weights (of their B matrices) and of one optimizer step's change to all of them."""

    def __init__(self, engine: Any, world: World, num_blocks: int) -> None:
        groups = depth_groups(num_blocks)
        labels = [group_label(blocks) for blocks in groups]
        self.names = [f"lora/{what}/{label}" for what in ("weight_norm", "update_norm") for label in labels]
        self._device, self._rank = world.device, world.rank
        self._parts: list[tuple[int, bool, torch.nn.Parameter]] = []  # group, whether it is a B, parameter
        for name, parameter in trainable(engine).items():
            if found := _BLOCK.search(name):
                group = next(n for n, blocks in enumerate(groups) if int(found[1]) in blocks)
                self._parts.append((group, _UP in name, parameter))
        self._before: list[torch.Tensor] = []

    def before(self) -> None:
        """Keep the masters as they are before an optimizer step: as large as this rank's share of them, until `after`.
        The activations are gone by then, so the peak of memory does not rise."""
        self._before = [local_master_weight(parameter, self._rank).clone() for _, _, parameter in self._parts]

    def after(self) -> Norms:
        """This rank's part of the norms, after the step."""
        num = len(self.names) // 2
        squares = torch.zeros(2 * num, dtype=torch.float64, device=self._device)
        for (group, is_up, parameter), before in zip(self._parts, self._before):
            now = local_master_weight(parameter, self._rank)
            if is_up:
                squares[group] += _square(now).to(self._device)
            squares[num + group] += _square(now - before).to(self._device)
        self._before = []
        return Norms(self.names, squares)


def _square(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float32).double() ** 2
