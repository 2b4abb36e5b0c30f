"""Activation checkpointing of the transformer blocks.

none            keep all activations: the fastest, with by far the most memory
selective       keep a block's input and its attention's output (with its log-sum-exp), recompute the rest: for long
                clips, attention is most of the compute and little of the memory
full            keep a block's input, recompute everything else
full+offload    like full, with the input in pinned host memory, copied while the GPU computes
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogds.errors import UserError
from cogds.process.host_memory import HostBuffer

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
# Number of block inputs that stay on the device while they are copied to the host.
MAX_COPYING = 2


def _keep_attention(_context: object, operation: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_nothing(*_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def run_checkpointed(
    checkpointing: str, function: Callable[..., torch.Tensor], *args: Any, has_dropout: bool = False
) -> torch.Tensor:
    """Call function(*args) with a mode of activation checkpointing.

    has_dropout: save the random state as well, so that recomputation applies the same dropout.
    """
    if checkpointing == "none" or not torch.is_grad_enabled():
        return function(*args)
    kwargs: dict[str, Any] = {}
    if checkpointing == "selective":
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    elif torch.compiler.is_compiling():
        # Without a policy, torch 2.11's compiler does not mark what to recompute and keeps most activations. torch 2.13
        # sets the same policy itself (torch/_higher_order_ops/wrap.py).
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_nothing)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=has_dropout, **kwargs)


class PinnedBuffer(HostBuffer):
    """Pinned host memory for activations."""

    def __init__(self, num_bytes: int):
        try:
            super().__init__(num_bytes)
            self.pin()
        except (OSError, torch.cuda.CudaError) as error:
            raise UserError(
                f"train.activation_checkpointing=full+offload: cannot pin another {num_bytes / 1e6:.0f} MB of host "
                f"memory ({error}). Use another mode, fewer ranks per node or a smaller bucket, or give the job more "
                "memory."
            ) from None


class PinnedPool:
    """A pool of pinned buffers that are reused from step to step.

    torch's pinned allocator rounds up to powers of two: a block's input of a long clip, 264 MiB, would take 512 MiB.

    allocate: creates a buffer of at least this number of bytes.
    """

    def __init__(self, allocate: Callable[[int], PinnedBuffer] = PinnedBuffer):
        self.allocate = allocate
        self.free: list[PinnedBuffer] = []

    def acquire(self, num_bytes: int) -> PinnedBuffer:
        """Return a buffer of at least this size. The caller must release it."""
        fitting = [buffer for buffer in self.free if buffer.num_bytes >= num_bytes]
        if not fitting:
            self.free.clear()  # this clip is longer than all before, so its buffers will fit every clip
            return self.allocate(num_bytes)
        buffer = min(fitting, key=lambda buffer: buffer.num_bytes)
        self.free.remove(buffer)
        return buffer

    def release(self, buffer: PinnedBuffer) -> None:
        """Return a buffer to the pool."""
        self.free.append(buffer)


class Offload:
    """Moves block inputs to host memory between the forward and the backward pass.

    Inside `with offload.save_on_host(x)`, what autograd saves of x is copied to the host on a separate stream, while
    the next operations run. In the backward pass, each fetch also starts fetching the input of the preceding block.
    On a CPU, tensors are copied as well, so that tests take the same path.

    Device memory is allocated and freed in the order of the compute stream only: the stream waits for a copy before it
    frees the source, a few blocks later. (`record_stream` would leave freeing to the host, which runs far ahead.) All
    copies run in the order of one stream, so a host buffer can be reused as soon as the copy back is queued.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = PinnedPool()
        self._on_host: list[_OffloadedTensor] = []  # in the order of the forward pass
        self._copying: list[_OffloadedTensor] = []  # those of them that are still on the device too

    def reset(self) -> None:
        """Drop tensors left by a forward pass without a backward pass."""
        self._on_host.clear()
        self._copying.clear()

    @contextmanager
    def save_on_host(self, x: torch.Tensor) -> Iterator[None]:
        """Context manager in which tensors that autograd saves and that share x's memory are kept on the host."""
        # The hook must not refer to x itself, because autograd keeps the hook alive.
        pack = functools.partial(self._pack, x.untyped_storage().data_ptr(), x.numel())
        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def _pack(self, storage: int, num_elements: int, tensor: torch.Tensor) -> "torch.Tensor | _OffloadedTensor":
        if tensor.untyped_storage().data_ptr() != storage or tensor.numel() != num_elements:
            return tensor
        offloaded = _OffloadedTensor(tensor, self.stream, self.pool)
        self._on_host.append(offloaded)
        self._copying.append(offloaded)
        while len(self._copying) > MAX_COPYING:
            self._copying.pop(0).release_source()
        return offloaded

    def _unpack(self, packed: "torch.Tensor | _OffloadedTensor") -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        tensor = packed.fetch(self.stream)
        for tensors in (self._on_host, self._copying):
            if packed in tensors:
                del tensors[tensors.index(packed) :]
        if self._on_host:
            self._on_host[-1].prefetch(self.stream)
        return tensor


class _OffloadedTensor:
    """A tensor on the host. On a GPU, `source` is the original until `release_source`, `fetched` the copy back.

    Both belong to the compute stream. The other stream only copies, between two events that the compute stream waits
    for. The host buffer is released when autograd drops this object.
    """

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream | None, pool: PinnedPool):
        self.device = tensor.device
        self.source: torch.Tensor | None = None
        self.fetched: torch.Tensor | None = None
        self.copied_event: torch.cuda.Event  # of the copies to the host and back
        self.fetched_event: torch.cuda.Event
        if stream is None:
            self.host = tensor.detach().clone()
            return
        buffer = pool.acquire(tensor.nbytes)
        weakref.finalize(self, pool.release, buffer).atexit = False
        self.host = buffer.bytes[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.source = tensor.detach()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(self.source, non_blocking=True)
            self.copied_event = stream.record_event()

    def release_source(self) -> None:
        """Free the device memory once the copy to the host is complete."""
        if self.source is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied_event)
            self.source = None

    def prefetch(self, stream: torch.cuda.Stream | None) -> None:
        """Start copying back to the device."""
        if stream is None or self.source is not None or self.fetched is not None:
            return
        self.fetched = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # earlier work may still use this memory
        with torch.cuda.stream(stream):
            self.fetched.copy_(self.host, non_blocking=True)
            self.fetched_event = stream.record_event()

    def fetch(self, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """Return the tensor on the device."""
        if stream is None:
            return self.host
        tensor = self.source
        self.release_source()
        if tensor is None:
            self.prefetch(stream)
            torch.cuda.current_stream(self.device).wait_event(self.fetched_event)
            tensor, self.fetched = self.fetched, None
        assert tensor is not None
        return tensor
