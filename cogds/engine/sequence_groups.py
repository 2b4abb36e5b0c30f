"""The ranks that share a clip (`parallel.sequence_size`): neighbors, so that their exchange stays within a node."""

from datetime import timedelta

import torch.distributed as dist

from cogds.distributed.world import World
from cogds.model.transformer.forward import Transformer
from cogds.model.transformer.sequence_parallel import SequenceGroup


def share_clips(transformer: Transformer, world: World, timeout_s: float) -> None:
    """Let every `world.sequence_size` ranks share their clips from now on; nothing where that is 1. Collective.

    Raises in all of them where one does not answer for `timeout_s`.
    """
    if world.sequence_size == 1:
        return
    firsts = range(0, world.size, world.sequence_size)
    groups = [
        dist.new_group(range(first, first + world.sequence_size), timeout=timedelta(seconds=timeout_s))
        for first in firsts
    ]
    name = groups[world.data_rank].group_name
    transformer.share_sequence(SequenceGroup(name, world.sequence_size, world.sequence_rank))
