"""A rank's share of captioning: worker processes read the frames, and threads wait for the endpoint."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from cogds.data.video.media import DecodeError
from cogds.errors import UserError
from cogds.prepare.captions import Captioner, CaptionError, CaptionOptions, CaptionTask, read_pictures
from cogds.prepare.clip_table import PreparedScene, collect
from cogds.prepare.scene import evenly_spaced
from cogds.prepare.state import CAPTIONS, TASK_SCHEMA, ResultWriter, WorkFolder, read_share, write_table
from cogds.prepare.workers import Workers
from cogds.process.progress import progress_bar
from cogds.process.worker_pool import TaskFailure, WorkerPool

# Scenes that fail one after the other until a rank gives up, because the endpoint is gone.
MAX_FAILURES = 8


def write_tasks(folder: WorkFolder, options: CaptionOptions, num_ranks: int) -> None:
    """Deal the scenes that have no caption yet to the ranks."""
    scenes = collect(folder).scenes
    folder.merge_results(CAPTIONS)
    known = folder.known_keys(CAPTIONS)
    todo = {key: scene for scene in scenes if (key := caption_key(scene, options)) not in known}
    rows = [
        {"key": key, "path": scene.path, "times_s": _times_s(scene, options), "rank": number % num_ranks}
        for number, (key, scene) in enumerate(todo.items())
    ]
    write_table(folder.tasks, TASK_SCHEMA, rows)


def caption_key(scene: PreparedScene, options: CaptionOptions) -> bytes:
    """A digest of a scene and of how it is captioned. The endpoint may move."""
    parts = (scene.file_key, scene.start_s, scene.end_s, options.model, options.prompt, options.num_frames)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _times_s(scene: PreparedScene, options: CaptionOptions) -> list[float]:
    if scene.start_s is None or scene.end_s is None:
        return []
    return evenly_spaced(scene.start_s, scene.end_s, options.num_frames)


@dataclass
class CaptionOutcome:
    """What a rank's captioning came to.

    Attributes:
        num_failures: scenes without a caption.
        reason: why the last of them failed.
        error: why no scene can be captioned, "" if that is not so.
    """

    num_captions: int = 0
    num_failures: int = 0
    reason: str = ""
    error: str = ""


class _Captioning:
    """The requests of a rank."""

    def __init__(self, captioner: Captioner, num_requests: int, writer: ResultWriter) -> None:
        self.outcome = CaptionOutcome()
        self._captioner, self._num_requests, self._writer = captioner, num_requests, writer
        self._threads = ThreadPoolExecutor(num_requests)
        self._running: dict[Future[str], bytes] = {}
        self._num_in_a_row = 0

    @property
    def has_given_up(self) -> bool:
        return bool(self.outcome.error) or self._num_in_a_row >= MAX_FAILURES

    def request(self, key: bytes, pictures: Sequence[str]) -> None:
        """Start a request, after others have finished if there are too many."""
        while len(self._running) >= self._num_requests and not self.has_given_up:
            self._collect()
        self._running[self._threads.submit(self._captioner.caption, pictures)] = key

    def fail(self, reason: str) -> None:
        """Count a scene that cannot be captioned."""
        self.outcome.num_failures += 1
        self.outcome.reason = reason

    def finish(self) -> None:
        """Wait for the requests. If the endpoint is gone, abort them."""
        while self._running and not self.has_given_up:
            self._collect()
        self._captioner.close()
        self._threads.shutdown(cancel_futures=True)

    def _collect(self) -> None:
        """Take the replies that have arrived, and wait for one if there is none."""
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            key = self._running.pop(future)
            try:
                caption = future.result()
            except CaptionError as error:
                self._num_in_a_row += 1
                self.fail(str(error))
            except UserError as error:
                self.outcome.error = str(error)
            else:
                self._num_in_a_row = 0
                self.outcome.num_captions += 1
                self._writer.add([{"key": key, "caption": caption}])


def caption_share(folder: WorkFolder, rank: int, options: CaptionOptions, workers: Workers) -> CaptionOutcome:
    """Caption this rank's scenes. Those that fail are left to the next run."""
    rows = read_share(folder.tasks, rank)
    tasks = (CaptionTask(row["path"], tuple(row["times_s"])) for row in rows)
    with (
        progress_bar("captioning", "scene", len(rows), rank == 0) as bar,
        WorkerPool(read_pictures, *workers.limits(len(rows)), (DecodeError,)) as pool,
        ResultWriter(folder, CAPTIONS, rank) as writer,
    ):
        captioning = _Captioning(Captioner(options), options.num_requests, writer)
        try:
            for row, pictures in zip(rows, pool.imap(tasks)):
                if isinstance(pictures, TaskFailure):
                    captioning.fail(pictures.reason)
                else:
                    captioning.request(row["key"], pictures)
                if captioning.has_given_up:
                    break
                bar.update()
        finally:
            captioning.finish()
    outcome = captioning.outcome
    outcome.num_failures = len(rows) - outcome.num_captions
    return outcome
