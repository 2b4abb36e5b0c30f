"""Process groups of ranks that share a clip. They are neighbors, so that their traffic stays within a node."""

from datetime import timedelta

import torch.distributed as dist

from cogds.distributed.world import World
from cogds.model.transformer.forward import Transformer
from cogds.model.transformer.sequence_parallel import SequenceGroup


def share_clips(transformer: Transformer, world: World, timeout_s: float) -> None:
    """Make groups of `world.sequence_size` neighboring ranks share their clips. No effect if it is 1. Collective.

    timeout_s: time that a group's collectives wait for a rank before they fail on the others.
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
