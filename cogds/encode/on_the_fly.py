"""Batches without a cache, decoded and encoded while earlier ones train, for huge runs that see each clip about once.

Worker processes decode a few clips ahead. One thread encodes a few batches ahead, on a CUDA stream of its own if there
is a GPU. A batch holds exactly what the cache would have given.
"""

import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from cogds.data.loading.dataset import BadClip, Batch, Choice, ClipOrder, Item, collate
from cogds.data.loading.sampler import Draw
from cogds.data.storage.location import display_name
from cogds.data.video.decode_task import DecodedClip, DecodeTask
from cogds.encode.encoder import condition_pixels, decode_pool, encode_pixels
from cogds.job import Job
from cogds.model.load import TextEncoder, load_vae
from cogds.process.worker_pool import TaskFailure

T = TypeVar("T")


@dataclass(frozen=True)
class OnTheFlyModels:
    """The models that encode beside training. vae: not that of the training step, which never encodes in tiles."""

    vae: Any
    text_encoder: TextEncoder


def load_on_the_fly_models(job: Job) -> OnTheFlyModels | None:
    """Load the VAE and T5 onto this rank's device if the run encodes on the fly. Returns None if it does not."""
    if job.cfg.data.encode != "on_the_fly":
        return None
    device = job.world.device
    return OnTheFlyModels(load_vae(job.model, job.dtype, device), TextEncoder(job.model, job.dtype, device))


@torch.no_grad()
def stream_batches(
    draws: Iterable[list[Draw]], order: ClipOrder, job: Job, models: OnTheFlyModels
) -> Generator[Batch, None, None]:
    """Yield this rank's batches, one per micro-step, on its device. draws: those of `BucketBatchSampler`."""
    yield from _BatchEncoder(order, job, models).batches(draws)


class _BatchEncoder:
    """Decodes and encodes batches."""

    def __init__(self, order: ClipOrder, job: Job, models: OnTheFlyModels):
        self._order, self._index, self._models = order, order.index, models
        self._job, self._cfg, self._tiled, self._device = job, job.cfg, job.tiled, job.world.device
        self._known_bad: set[int | Choice] = set()
        self._substitutes = decode_pool(job.cfg)

    def batches(self, draws: Iterable[list[Draw]]) -> Iterator[Batch]:
        """Yield the batch of each list of draws."""
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.default_stream(self._device))  # which loads the models
        batches, decoded_ahead = itertools.tee([(draw, self._likely_row(draw)) for draw in batch] for batch in draws)
        tasks = (self._task(row) for batch in decoded_ahead for _, row in batch)
        with decode_pool(self._cfg) as pool, self._substitutes, torch.cuda.stream(stream):
            decoded = pool.imap(tasks, ahead=self._cfg.data.num_workers)
            for batch in batches:
                items = []
                for draw, row in batch:
                    load = functools.partial(self._load, row, next(decoded))
                    items.append(Item(*self._order.first_good(draw, self._known_bad, load)))
                encoded = collate(items)
                if stream is not None:
                    stream.synchronize()  # the batch may be used at once, on any stream
                yield encoded

    def _likely_row(self, draw: Draw) -> int:
        """The first row of a draw that is not known to be bad. If all are, `first_good` reports it."""
        good = (choice.row for choice in self._order.choices(draw) if choice.row not in self._known_bad)
        return next(good, next(self._order.choices(draw)).row)

    def _task(self, row: int) -> DecodeTask:
        clip, data = self._index[row], self._cfg.data
        return DecodeTask(
            clip.path, clip.kind, clip.image_path, clip.start_s, shape=clip.shape, fps=data.fps, decoder=data.decoder,
            mirrored=clip.mirrored, control_path=clip.control_path,
        )  # fmt: skip

    def _load(
        self, decoded_row: int, decoded: DecodedClip | TaskFailure, choice: Choice
    ) -> dict[str, torch.Tensor] | BadClip:
        """Encode a clip and a caption; decode the clip first if it is not the one that was decoded ahead."""
        row, clip = choice.row, self._index[choice.row]
        pixels = decoded if row == decoded_row else next(self._substitutes.imap([self._task(row)]))
        if isinstance(pixels, TaskFailure):
            return BadClip(row, display_name(clip.path), pixels.reason)
        vae, is_tiled = self._models.vae, clip.shape in self._tiled
        videos = {"moments": pixels.pixels} | ({} if pixels.control is None else {"control_moments": pixels.control})
        frames = condition_pixels(pixels, self._job.condition_frames(clip.shape))
        return {
            **{name: encode_pixels(vae, torch.from_numpy(video), is_tiled) for name, video in videos.items()},
            **{name: tensor.contiguous().to(self._device) for name, tensor in frames.items()},
            "text_states": self._models.text_encoder.encode(clip.captions[choice.caption].text),
        }


def ahead(items: Generator[T, None, None], num: int) -> Iterator[T]:
    """Yield the same items, made by a thread that is up to `num` of them ahead. Its errors are raised here."""
    producer = _Producer(items, num)
    producer.start()
    try:
        while not isinstance(item := producer.queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        producer.is_stopped.set()
        producer.join()


@dataclass(frozen=True)
class _End:
    """Follows the last item. error: what making the next one raised."""

    error: BaseException | None = None


class _Producer(threading.Thread, Generic[T]):
    """Makes items and puts them into a bounded queue, until it is stopped."""

    def __init__(self, items: Generator[T, None, None], num: int):
        super().__init__(name="cogds-ahead", daemon=True)
        self._items = items
        self.queue: queue.Queue[T | _End] = queue.Queue(num)
        self.is_stopped = threading.Event()

    def run(self) -> None:
        try:
            for item in self._items:
                self._put(item)
                if self.is_stopped.is_set():
                    return
            self._put(_End())
        except BaseException as error:  # raised in the thread that takes the items
            self._put(_End(error))
        finally:
            self._items.close()

    def _put(self, item: T | _End) -> None:
        while not self.is_stopped.is_set():
            with contextlib.suppress(queue.Full):
                self.queue.put(item, timeout=0.1)
                return
