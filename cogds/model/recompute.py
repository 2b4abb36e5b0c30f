"""What of a block's activations is kept for the backward pass, and what is computed anew or brought back.

none            everything is kept: the fastest, and by far the largest
attention_kept  a block's input and its attention's output (with its log-sum-exp) are kept, the rest is recomputed:
                attention is most of the work of a long clip and little of the memory
block           a block's input is kept, everything in it is computed twice
block+offload   and that input waits in pinned host memory, copied while the GPU computes
"""

import functools
import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogds.errors import UserError

_ATEN = torch.ops.aten
_ATTENTION = {
    getattr(_ATEN, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(_ATEN, name)
}


# Blocks' inputs that are on the device while they are copied to the host.
NUM_LEAVING = 2


def _keep_attention(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_nothing(*_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def run(level: str, function: Callable[..., torch.Tensor], *args: Any, has_dropout: bool = False) -> torch.Tensor:
    """function(*args), its activations kept as `level` says.

    has_dropout: the random state is kept too, so that the second time drops the same.
    """
    if level == "none" or not torch.is_grad_enabled():
        return function(*args)
    more: dict[str, Any] = {}
    if level == "attention_kept":
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    elif torch.compiler.is_compiling():
        # Without a policy, torch 2.11's compiler loses the marks and keeps most activations. torch 2.13 adds this one
        # by itself (torch/_higher_order_ops/wrap.py).
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_nothing)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=has_dropout, **more)


class Pinned:
    """Pages of host memory that the GPU copies to and from while both compute on, until this object is gone.

    numbers: uint8 [num_bytes]; num_bytes: whole pages.
    """

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        try:
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_DONTFORK)  # loaders are forked, and have no business there
            self.numbers = torch.frombuffer(pages, dtype=torch.uint8)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.numbers.data_ptr(), num_bytes, 0))
        except (OSError, torch.cuda.CudaError) as error:
            raise UserError(
                f"train.recompute=block+offload cannot pin {num_bytes / 1e6:.0f} MB more of this machine's memory "
                f"({error}): take a level that keeps the blocks' inputs on the GPU, fewer ranks a node or a smaller "
                "bucket, or give the job more memory"
            ) from None
        # Memory must not be given back while CUDA counts on it. When the process ends, that is the driver's affair.
        weakref.finalize(self, _unpin, self.numbers.data_ptr()).atexit = False


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # a copy may be under way
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


class HostMemory:
    """Pinned memory in pieces that are used again, step after step.

    torch's own pinned memory comes in powers of two: a block's input of a long clip, 264 MiB, would take 512. These
    pieces are as large as was asked for, in whole pages.

    pin: makes a piece of so many bytes.
    """

    def __init__(self, pin: Callable[[int], Any] = Pinned):
        self.pin = pin
        self.free: list[Any] = []

    def take(self, num_bytes: int) -> Any:
        """A piece that holds so many bytes. Whoever takes it gives it back."""
        fitting = [piece for piece in self.free if piece.num_bytes >= num_bytes]
        if not fitting:
            self.free.clear()  # the clip is longer than any before: what holds it will do for the others too
            return self.pin(-(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        piece = min(fitting, key=lambda one: one.num_bytes)
        self.free.remove(piece)
        return piece

    def give(self, piece: Any) -> None:
        """Back to the others."""
        self.free.append(piece)


class Offload:
    """Blocks' inputs in host memory between forward and backward pass.

    `with offload.keep(x)`: what autograd saves of x inside goes to the host on a stream of its own, while the next
    operations run. In the backward pass each fetch also starts the one that comes next, a block earlier. On a CPU the
    tensors are copied all the same, so that tests see the same paths.

    Memory is taken and given back in the order of the computing stream alone: it waits for a copy before it lets go of
    what was copied, a few blocks later. (`record_stream` would leave that to the host, which runs far ahead.) All
    copies are made in the order of one stream: so the host's memory may be copied to again as soon as the copy back is
    queued.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.memory = HostMemory()
        self._waiting: list[_Parked] = []  # in the order of the forward pass
        self._leaving: list[_Parked] = []  # of these, what is still on the device too

    def begin(self) -> None:
        """Forget what a forward pass without a backward pass has left."""
        self._waiting.clear()
        self._leaving.clear()

    @contextmanager
    def keep(self, x: torch.Tensor) -> Iterator[None]:
        """Inside, what is saved of x's memory waits on the host."""
        # Not x itself: autograd keeps the hook, and with it what the hook refers to.
        storage, num_numbers = x.untyped_storage().data_ptr(), x.numel()

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.untyped_storage().data_ptr() != storage or tensor.numel() != num_numbers:
                return tensor
            parked = _Parked(tensor, self.stream, self.memory)
            self._waiting.append(parked)
            self._leaving.append(parked)
            while len(self._leaving) > NUM_LEAVING:
                self._leaving.pop(0).let_go()
            return parked

        def unpack(packed: Any) -> torch.Tensor:
            return self._bring(packed) if isinstance(packed, _Parked) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _bring(self, parked: "_Parked") -> torch.Tensor:
        tensor = parked.bring(self.stream)
        for parts in (self._waiting, self._leaving):
            if parked in parts:
                del parts[parts.index(parked) :]
        if self._waiting:
            self._waiting[-1].start(self.stream)
        return tensor


class _Parked:
    """One tensor on the host. On a GPU `source` is the tensor itself, until `let_go`, and `back` its copy, on the way.

    Both belong to the computing stream; the other one only copies, between two events that the first waits for. The
    host's memory is its own as long as autograd may ask for it.
    """

    def __init__(self, tensor: torch.Tensor, stream: Any, memory: HostMemory):
        self.device = tensor.device
        self.source: torch.Tensor | None = None
        self.back: torch.Tensor | None = None
        self.copied: Any = None
        self.ready: Any = None
        if stream is None:
            self.host = tensor.detach().clone()
            return
        piece = memory.take(tensor.nbytes)
        weakref.finalize(self, memory.give, piece).atexit = False
        self.host = piece.numbers[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.source = tensor.detach()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(self.source, non_blocking=True)
            self.copied = stream.record_event()

    def let_go(self) -> None:
        """Free the device's memory, as soon as it has been copied."""
        if self.source is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.source = None

    def start(self, stream: Any) -> None:
        """Begin the way back."""
        if stream is None or self.source is not None or self.back is not None:
            return
        self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # for whatever had this memory before
        with torch.cuda.stream(stream):
            self.back.copy_(self.host, non_blocking=True)
            self.ready = stream.record_event()

    def bring(self, stream: Any) -> torch.Tensor:
        """The tensor, on the device."""
        if stream is None:
            return self.host
        tensor = self.source
        self.let_go()
        if tensor is None:
            self.start(stream)
            torch.cuda.current_stream(self.device).wait_event(self.ready)
            tensor, self.back = self.back, None
        assert tensor is not None
        return tensor
