"""Share of a dataset that has been trained at least once, computed without a list of clips."""

from collections.abc import Sequence

from cogds.core.mixture import Mixture


def share_seen(drawn: Sequence[int], mixture: Mixture) -> float:
    """Return the share of all clips that have been drawn at least once.

    Exact for a single dataset with 1 repeat per epoch, and in general at the end of a pass over each bucket. In
    between, it assumes that all datasets have advanced equally far and that no clip was drawn twice in the pass.

    Args:
        drawn: number of positions drawn from each bucket's stream since step 0.
    """
    num_seen = num_clips = 0.0
    for num_drawn, sizes, virtual in zip(drawn, mixture.sizes, mixture.virtual_sets):
        passes = num_drawn / total if (total := sum(virtual)) else 0.0
        num_seen += sum(min(size, passes * num) for size, num in zip(sizes, virtual))
        num_clips += sum(sizes)
    return num_seen / num_clips if num_clips else 0.0
