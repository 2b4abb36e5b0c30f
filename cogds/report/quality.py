"""How much the clips move, and how many of them are duplicates."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

# Mean speed of the picture below which a clip hardly moves, in shares of its longer side per second. A still picture
# with strong noise has less than half of it.
HARDLY_MOVES = 0.005


@dataclass(frozen=True)
class ClipQuality:
    """Motion and duplicates of the trained clips.

    Attributes:
        num_scored: clips with a motion score, which `cogds prepare` writes.
        median_motion: of these; 0 without any.
        num_still: those that hardly move.
        num_copies: clips with the same bytes and range as an earlier one.
        num_near_duplicates: clips with a duplicate_of, which `cogds prepare` writes.
    """

    num_scored: int = 0
    median_motion: float = 0.0
    num_still: int = 0
    num_copies: int = 0
    num_near_duplicates: int = 0


def clip_quality(table: pa.Table, is_trained: pa.Array) -> ClipQuality:
    """The quality of the trained clips of a manifest. table: columns motion, duplicate_of, digest, start_s, end_s."""
    names = ["motion", "duplicate_of", "digest", "start_s", "end_s"]
    trained = table.select(names).filter(is_trained)
    motion = trained.column("motion").drop_null()
    known = trained.select(names[2:]).filter(pc.is_valid(trained.column("digest")))
    return ClipQuality(
        num_scored=len(motion),
        median_motion=pc.approximate_median(motion).as_py() if len(motion) else 0.0,
        num_still=pc.sum(pc.less(motion, HARDLY_MOVES)).as_py() or 0,
        num_copies=len(known) - known.group_by(names[2:]).aggregate([]).num_rows,
        num_near_duplicates=pc.sum(pc.is_valid(trained.column("duplicate_of"))).as_py() or 0,
    )
