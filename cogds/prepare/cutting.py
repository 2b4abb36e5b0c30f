"""A rank's share of cutting and scoring: its sources go to worker processes, and the results into the work folder."""

from dataclasses import asdict
from functools import partial

from cogds.data.video.media import DecodeError
from cogds.prepare.find_scenes import find_scenes
from cogds.prepare.scene import CutOptions, Source
from cogds.prepare.state import SCENES, ResultWriter, WorkFolder, read_share
from cogds.prepare.workers import Workers
from cogds.process.progress import progress_bar
from cogds.process.worker_pool import TaskFailure, WorkerPool


def cut_share(folder: WorkFolder, rank: int, options: CutOptions, workers: Workers) -> dict[bytes, str]:
    """Cut and score this rank's sources.

    Returns the failures that may not come again, such as a timeout: source key -> reason.
    """
    rows = read_share(folder.sources, rank)
    tasks = (Source(row["path"], row["kind"], row["start_s"], row["end_s"]) for row in rows)
    failures = {}
    with (
        progress_bar("cutting scenes", "file", len(rows), rank == 0) as bar,
        WorkerPool(partial(find_scenes, options=options), *workers.limits(len(rows)), (DecodeError,)) as pool,
        ResultWriter(folder, SCENES, rank) as writer,
    ):
        for row, result in zip(rows, pool.imap(tasks)):
            if not isinstance(result, TaskFailure):
                writer.add([{"key": row["key"], **asdict(result)}])
            elif result.is_permanent:
                writer.add([{"key": row["key"], "scenes": [], "num_short": 0, "reason": result.reason}])
            else:
                failures[row["key"]] = result.reason
            bar.update()
    return failures
