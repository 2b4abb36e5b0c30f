"""Offload of block inputs: the pool of pinned buffers, and copies on a stream that runs as late as possible."""

import mmap
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogds.errors import UserError
from cogds.model.transformer.checkpointing import PinnedBuffer, PinnedPool
from cogds.process.host_memory import HostBuffer
from tests.model.transformer.test_forward import ATTENTION, V15, inputs, outcome, pair

PAGE = mmap.PAGESIZE


class Buffer(HostBuffer):
    """Unpinned memory in place of `PinnedBuffer`."""

    sizes: list[int]

    def __init__(self, num_bytes):
        super().__init__(num_bytes)
        self.sizes.append(self.num_bytes)


@pytest.fixture
def sizes(monkeypatch):
    """The sizes of the allocated buffers."""
    monkeypatch.setattr(Buffer, "sizes", [], raising=False)
    return Buffer.sizes


def test_buffers_are_rounded_up_to_whole_pages(sizes):
    pool = PinnedPool(Buffer)
    num_bytes = 45_106 * 3072 * 2  # of a block's input for a long clip
    assert pool.acquire(num_bytes).num_bytes - num_bytes < PAGE
    assert PinnedPool(Buffer).acquire(1).num_bytes == PAGE
    assert len(sizes) == 2


def test_the_smallest_fitting_buffer_is_reused(sizes):
    pool = PinnedPool(Buffer)
    large, small = pool.acquire(3 * PAGE), pool.acquire(PAGE)
    assert sizes == [3 * PAGE, PAGE]
    pool.release(large)
    pool.release(small)
    assert pool.acquire(PAGE) is small
    assert pool.acquire(PAGE) is large
    assert sizes == [3 * PAGE, PAGE]


def test_buffers_that_are_too_small_are_freed_first(sizes):
    pool = PinnedPool(Buffer)
    for buffer in [pool.acquire(PAGE) for _ in range(3)]:
        pool.release(buffer)
    pool.acquire(2 * PAGE)
    assert pool.free == []
    assert sizes == [PAGE] * 3 + [2 * PAGE]


class LateStream(TorchDispatchMode):
    """A stream that performs its copies only when the compute stream waits for them.

    This is the worst that a real stream may do. The result of a copy is NaN if it does not wait for the compute stream,
    which may not have computed the source yet or may still use the memory to overwrite, or if the source is freed.
    """

    def __init__(self):
        super().__init__()
        self.queued, self.num_done, self.has_waited = [], 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            to, source = args[:2]
            self.queued.append((to, weakref.ref(source), self.has_waited))
            self.has_waited = False  # later computations need another wait
            return to
        return function(*args, **(kwargs or {}))

    def record_event(self):
        return len(self.queued)

    def wait_stream(self, stream):
        assert isinstance(stream, ComputingStream)
        self.has_waited = True

    def perform(self, num_copies):
        for to, source_ref, has_waited in self.queued[self.num_done : num_copies]:
            source = source_ref()
            if has_waited and source is not None:
                to.copy_(source)
            else:
                to.fill_(torch.nan)
        self.num_done = max(self.num_done, num_copies)


class ComputingStream:
    """The compute stream, which runs immediately."""

    def __init__(self, late):
        self.late = late

    def wait_event(self, event):
        self.late.perform(event)


@pytest.fixture
def late(monkeypatch):
    """Replace torch's streams, with a late copy stream."""
    stream = LateStream()
    computing = ComputingStream(stream)

    @contextmanager
    def on(stream):
        with stream:
            yield

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: computing)
    return stream


def offloading_transformer(late):
    """A transformer that offloads block inputs as on a GPU, and its `Offload`."""
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing("full+offload")
    offload = ours.transformer_blocks[0].offload
    offload.stream, offload.pool = late, PinnedPool(Buffer)
    return ours, offload


# Three pages per block, then six, then three again.
CLIPS = [(4, 4, 6), (4, 8, 10), (4, 4, 6)]


def test_offload_on_a_stream_is_exact_and_reuses_its_memory(sizes, late):
    ours, offload = offloading_transformer(late)
    torch.manual_seed(1)
    batches = [inputs(V15, 2, latents) for latents in CLIPS]
    outcomes = [outcome(ours, batch) for batch in batches]
    assert sizes == [3 * PAGE] * 3 + [6 * PAGE] * 3
    assert [buffer.num_bytes for buffer in offload.pool.free] == [6 * PAGE] * 3
    # Three block inputs per clip are copied to the host, and back unless they are still on the device.
    assert late.num_done == len(late.queued) >= 3 * (3 + 1)
    ours.set_checkpointing("none")
    for batch, (output, gradients) in zip(batches, outcomes):
        expected = outcome(ours, batch)
        assert torch.equal(output, expected[0])
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())


def test_buffers_are_released_after_the_backward_pass(sizes, late):
    """Two forward passes before the first backward pass: the second uses its own buffers."""
    ours, offload = offloading_transformer(late)
    torch.manual_seed(1)
    first, second = (ours(**inputs(V15))[0].square().mean() for _ in range(2))
    assert len(sizes) == 6
    assert offload.pool.free == []
    second.backward()
    assert len(offload.pool.free) == 3
    first.backward()
    assert len(offload.pool.free) == 6  # although `first` and `second` still exist


def test_a_failure_to_pin_memory_is_a_user_error(monkeypatch):
    class CudaRuntime:
        def cudaHostRegister(self, *_):
            return 2

    def check(code):
        if code:
            raise torch.cuda.CudaError(code)

    class CudaError(RuntimeError):
        pass

    monkeypatch.setattr(torch.cuda, "CudaError", CudaError)
    monkeypatch.setattr(torch.cuda, "cudart", CudaRuntime)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    with pytest.raises(UserError, match=r"train\.activation_checkpointing=full\+offload: .* 0 MB"):
        PinnedBuffer(PAGE)
