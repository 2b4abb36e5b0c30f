"""Batches without a cache: decoded and encoded while earlier ones train. For huge runs that see each clip about once.

Guarded processes decode a few clips ahead; one thread encodes a few batches ahead, on a stream of its own where there
is a GPU. A batch holds just what the cache would have given, so a run is the same either way; T5 stays in memory.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from cogds.config.schema import RunConfig
from cogds.data.loading.dataset import BadClip, Batch, ClipOrder, Item, collate
from cogds.data.loading.sampler import Draw
from cogds.data.video.decode_task import DecodedClip, DecodeTask
from cogds.distributed.world import World
from cogds.encode.cache_keys import is_tiled
from cogds.encode.encoder import decode_pool, decode_task, encode_pixels
from cogds.model.load import DTYPES, ModelFolder, TextEncoder, load_vae
from cogds.process.worker_pool import TaskFailure

T = TypeVar("T")

# Batches that wait for the step: one is enough where encoding keeps up, the second covers a slow clip.
BATCHES_AHEAD = 2


@torch.no_grad()
def stream_batches(
    draws: Iterable[list[Draw]],
    order: ClipOrder,
    cfg: RunConfig,
    model: ModelFolder,
    world: World,
) -> Iterator[Batch]:
    """This rank's batches, one per micro-step, on its device; `ahead` makes them ahead of time.

    draws: what `BucketBatchSampler` yields.
    """
    dtype, index = DTYPES[cfg.train.precision], order.index
    # A VAE of its own: tiling is a switch on the module, and the step uses another one at the same time.
    vae, text = load_vae(model, dtype, world.device), TextEncoder(model, dtype, world.device)
    stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
    for_pool, for_us = itertools.tee(draws)
    submitted: deque[int] = deque()
    known_bad: set[int] = set()

    def task(row: int) -> DecodeTask:
        clip = index[row]
        return decode_task(cfg, clip.path, clip.kind, clip.image_path, clip.start_s, clip.shape)

    def encode(row: int, clip: DecodedClip) -> dict[str, torch.Tensor]:
        tiled = is_tiled(cfg, model, index[row].shape)
        return {
            "moments": encode_pixels(vae, torch.from_numpy(clip.pixels), tiled),
            "first_frame": torch.from_numpy(clip.first_frame).permute(2, 0, 1).contiguous().to(world.device),
            "text_states": text.encode(index[row].caption),
        }

    def tasks() -> Iterator[DecodeTask]:
        for batch in for_pool:
            for draw in batch:
                # What is known to be bad is not tried again. Where all are bad, `first_good` says so.
                row = next((row for row in order.rows(draw) if row not in known_bad), next(order.rows(draw)))
                submitted.append(row)
                yield task(row)

    with decode_pool(cfg) as pool, decode_pool(cfg) as spare, torch.cuda.stream(stream):
        decoded = pool.imap(tasks(), ahead=cfg.data.num_workers)
        for batch in for_us:
            items = []
            for draw in batch:
                clip = next(decoded)
                first = submitted.popleft()

                def load(row: int, first: int = first, clip: DecodedClip | TaskFailure = clip) -> Any:
                    found = clip if row == first else next(spare.imap([task(row)]))
                    return (
                        BadClip(row, index[row].path, found.reason)
                        if isinstance(found, TaskFailure)
                        else encode(row, found)
                    )

                items.append(Item(*order.first_good(draw, known_bad, load)))
            made = collate(items)
            if stream is not None:
                stream.synchronize()  # whoever takes the batch may use it at once, on any stream
            yield made


class _Failed:
    def __init__(self, error: BaseException):
        self.error = error


def ahead(items: Iterator[T], num: int) -> Iterator[T]:
    """The same items, made by a thread that is up to `num` of them ahead. What it raises is raised here."""
    waiting: queue.Queue = queue.Queue(num)
    stopped, end = threading.Event(), object()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    break
            put(end)
        except BaseException as error:  # carried to whoever waits
            put(_Failed(error))
        finally:
            items.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=work, name="cogds-ahead", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not end:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()
