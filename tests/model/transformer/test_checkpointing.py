"""Blocks' inputs in host memory: its pieces, and the GPU's way there and back with copies that are late."""

import mmap
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogds.errors import UserError
from cogds.model.transformer.checkpointing import HostMemory, Offload, Pinned
from tests.model.transformer.test_forward import ATTENTION, V15, inputs, outcome, pair

PAGE = mmap.PAGESIZE


class Piece:
    """Ordinary memory in place of pinned."""

    made: list[int]

    def __init__(self, num_bytes):
        self.num_bytes, self.numbers = num_bytes, torch.zeros(num_bytes, dtype=torch.uint8)
        self.made.append(num_bytes)


@pytest.fixture
def made(monkeypatch):
    """The sizes of the pieces that were made."""
    monkeypatch.setattr(Piece, "made", [], raising=False)
    return Piece.made


def test_pieces_are_as_large_as_asked_for_in_pages(made):
    memory = HostMemory(Piece)
    of_a_full_clip = 45_106 * 3072 * 2
    assert memory.take(of_a_full_clip).num_bytes - of_a_full_clip < PAGE
    assert HostMemory(Piece).take(1).num_bytes == PAGE
    assert len(made) == 2


def test_pieces_are_used_again_the_smallest_that_fits(made):
    memory = HostMemory(Piece)
    large, small = memory.take(3 * PAGE), memory.take(PAGE)
    assert made == [3 * PAGE, PAGE]
    memory.give(large)
    memory.give(small)
    assert memory.take(PAGE) is small
    assert memory.take(PAGE) is large
    assert made == [3 * PAGE, PAGE]


def test_pieces_that_have_become_too_small_are_given_back_first(made):
    memory = HostMemory(Piece)
    for piece in [memory.take(PAGE) for _ in range(3)]:
        memory.give(piece)
    memory.take(2 * PAGE)
    assert memory.free == []
    assert made == [PAGE] * 3 + [2 * PAGE]


class LateStream(TorchDispatchMode):
    """A stream whose copies are made when the computing stream waits for them, and not before.

    What a real one may do wrong, it does: a copy that was not told to wait for the computing stream comes before the
    numbers that it is to read, or before the last use of the memory that it writes to; and what was let go of before it
    was copied is another's by then. Whatever arrives in its place is no number.
    """

    def __init__(self):
        super().__init__()
        self.queued, self.num_done, self.in_time = [], 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            to, source = args[:2]
            self.queued.append((to, weakref.ref(source), self.in_time))
            self.in_time = False  # what is computed from now on is waited for anew
            return to
        return function(*args, **(kwargs or {}))

    def record_event(self):
        return len(self.queued)

    def wait_stream(self, stream):
        assert isinstance(stream, ComputingStream)
        self.in_time = True

    def make(self, num_copies):
        for to, source_of, in_time in self.queued[self.num_done : num_copies]:
            source = source_of()
            if in_time and source is not None:
                to.copy_(source)
            else:
                to.fill_(torch.nan)
        self.num_done = max(self.num_done, num_copies)


class ComputingStream:
    """The other one, which is never late."""

    def __init__(self, late):
        self.late = late

    def wait_event(self, event):
        self.late.make(event)


@pytest.fixture
def late(monkeypatch):
    """torch's streams, of which the second one is late."""
    stream = LateStream()
    computing = ComputingStream(stream)

    @contextmanager
    def on(one):
        with one:
            yield

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: computing)
    return stream


def offloaded(late):
    """A transformer whose blocks' inputs go to the host as on a GPU."""
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing("full+offload")
    offload = ours.transformer_blocks[0].offload
    offload.stream, offload.memory = late, HostMemory(Piece)
    return ours, offload


# Three pages a block, six, and three again.
CLIPS = [(4, 4, 6), (4, 8, 10), (4, 4, 6)]


def test_on_a_gpu_too_no_bit_changes_and_memory_stays_what_it_is(made, late):
    ours, offload = offloaded(late)
    torch.manual_seed(1)
    batches = [inputs(V15, 2, latents) for latents in CLIPS]
    found = [outcome(ours, batch) for batch in batches]
    assert made == [3 * PAGE] * 3 + [6 * PAGE] * 3
    assert [piece.num_bytes for piece in offload.memory.free] == [6 * PAGE] * 3
    assert late.num_done == len(late.queued) >= 3 * (3 + 1)  # blocks of three clips go, and come unless they are here
    ours.set_checkpointing("none")
    for batch, (output, gradients) in zip(batches, found):
        expected = outcome(ours, batch)
        assert torch.equal(output, expected[0])
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())


def test_memory_is_free_when_the_backward_pass_is_over_and_not_before(made, late):
    """Two forward passes before the first backward pass: the second takes memory of its own."""
    ours, offload = offloaded(late)
    torch.manual_seed(1)
    one, other = (ours(**inputs(V15))[0].square().mean() for _ in range(2))
    assert len(made) == 6
    assert offload.memory.free == []
    other.backward()
    assert len(offload.memory.free) == 3
    one.backward()
    assert len(offload.memory.free) == 6  # `one` and `other` are still there


def test_what_cannot_be_pinned_is_said(monkeypatch):
    class Refusing:
        def cudaHostRegister(self, *_):
            return 2

    def check(code):
        if code:
            raise torch.cuda.CudaError(code)

    class CudaError(RuntimeError):
        pass

    monkeypatch.setattr(torch.cuda, "CudaError", CudaError)
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    with pytest.raises(UserError, match=r"full\+offload cannot pin 0 MB"):
        Pinned(PAGE)


def test_a_cpu_copies_without_a_stream():
    offload = Offload(torch.device("cpu"))
    assert offload.stream is None
