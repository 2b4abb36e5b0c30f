"""How much of a dataset has been trained at least once: arithmetic, no list of clips."""

from collections.abc import Sequence

from cogds.core.mixture import Mixture


def share_seen(drawn: Sequence[int], mixture: Mixture) -> float:
    """The share of all clips that have been drawn at least once.

    drawn: positions of each bucket's stream, since step 0.

    Exact for one data set whose clips are trained once an epoch, and for any at the end of a pass over the bucket.
    Within a pass of others it takes every set to have come as far as the pass has, without a clip drawn twice.
    """
    num_seen = num_clips = 0.0
    for num_drawn, sizes, virtual in zip(drawn, mixture.sizes, mixture.virtual_sets):
        passes = num_drawn / total if (total := sum(virtual)) else 0.0
        num_seen += sum(min(size, passes * num) for size, num in zip(sizes, virtual))
        num_clips += sum(sizes)
    return num_seen / num_clips if num_clips else 0.0
