"""What each file of a dataset holds, found out in child processes: a decoder that crashes or hangs costs one file."""

import multiprocessing
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from cogds.data import video
from cogds.data.manifest import Clip, Entry, Rejected

# A probe reads the file once and decodes one frame: seconds, even for gigabytes on a network disk.
PROBE_TIMEOUT_S = 120.0


def probe_entries(
    entries: Sequence[Entry], num_workers: int, timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[list[Clip], list[Rejected]]:
    """Open every file once; usable clips and rejected entries, each in the order of `entries`.

    num_workers: child processes; 0 probes in this process, where a crash of the decoder is a crash of the run.
    A file whose probe takes more than timeout_s is rejected, and so is one that kills its process.
    """
    if num_workers <= 0:
        outcomes: Iterable[Clip | Rejected] = map(_probe, entries)
    else:
        outcomes = _probe_in_children(entries, min(num_workers, len(entries)), timeout_s)
    clips, rejected = [], []
    for outcome in outcomes:
        if isinstance(outcome, Clip):
            clips.append(outcome)
        else:
            rejected.append(outcome)
    return clips, rejected


def _probe(entry: Entry) -> Clip | Rejected:
    if entry.caption_error:
        return Rejected(entry.path, entry.caption_error)
    if entry.caption is None:
        return Rejected(
            entry.path, "caption missing: add a same-named .txt file, or fill its line in the list of captions"
        )
    try:
        info = video.probe_image(entry.path) if entry.kind == "image" else video.probe_video(entry.path)
    except video.DecodeError as error:
        return Rejected(entry.path, str(error))
    except Exception as error:  # one file never stops the run
        return Rejected(entry.path, f"probing failed: {type(error).__name__}: {error}")
    if entry.image_path is not None:
        try:
            video.probe_image(entry.image_path)
        except video.DecodeError as error:
            return Rejected(entry.path, f"its conditioning image {entry.image_path}: {error}")
    return Clip(
        entry.path, entry.caption, entry.kind, entry.image_path,
        info.num_frames, info.fps, info.width, info.height, info.duration_s,
    )  # fmt: skip


class _Child:
    """One probing process. At most one entry is in flight in it, so that a death or a hang names its file.

    ProcessPoolExecutor cannot: one death breaks the pool and every file in flight, and a hung worker cannot be ended.
    """

    def __init__(self, context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # ours must be the only other end: then a death reads as the end of the file
        self.index: int | None = None
        self.deadline = float("inf")

    def send(self, index: int, entry: Entry, timeout_s: float) -> None:
        self.index, self.deadline = index, time.monotonic() + timeout_s
        self.connection.send(entry)

    def end(self) -> int | None:
        self.connection.close()
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def _serve(connection: Connection) -> None:
    """A child's life: probe what arrives until the other end closes."""
    connection.send(None)  # loaded: the time of imports is not the first file's
    while True:
        try:
            entry = connection.recv()
        except EOFError:
            return
        connection.send(_probe(entry))


def _probe_in_children(entries: Sequence[Entry], num_children: int, timeout_s: float) -> list[Clip | Rejected]:
    # Spawn: a fork would copy the locks of whatever decoder or torch thread runs here.
    context = multiprocessing.get_context("spawn")
    outcomes: dict[int, Clip | Rejected] = {}
    todo = iter(range(len(entries)))
    children = [_Child(context) for _ in range(num_children)]

    def next_entry(child: _Child) -> None:
        index = next(todo, None)
        if index is None:
            child.end()
            children.remove(child)
        else:
            child.send(index, entries[index], timeout_s)

    def replace(child: _Child, reason: str) -> None:
        if child.index is None:
            raise RuntimeError(f"a probing process died before its first file ({reason})")
        outcomes[child.index] = Rejected(entries[child.index].path, reason)
        children[children.index(child)] = _Child(context)

    try:
        while children:
            first = min(child.deadline for child in children)
            ready = wait(
                [child.connection for child in children],
                None if first == float("inf") else max(0.0, first - time.monotonic()),
            )
            for child in list(children):
                if child.connection in ready:
                    try:
                        outcome = child.connection.recv()
                    except (EOFError, OSError):
                        child.process.join()
                        replace(child, f"the decoder crashed on it (its process ended with code {child.end()})")
                        continue
                    if child.index is not None:
                        outcomes[child.index] = outcome
                    next_entry(child)
                elif child.deadline <= time.monotonic():
                    child.end()
                    replace(child, f"probing it took more than {timeout_s:g} s")
    finally:
        for child in children:
            child.end()
    return [outcomes[index] for index in range(len(entries))]
