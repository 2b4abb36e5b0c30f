"""Attention kernels: which there are, which is the fastest here, and the call itself.

All of them compute the same exact softmax attention; none is approximate.
"""

import contextlib
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn import attention

from cogds.errors import BUGS, UserError, brief

logger = logging.getLogger(__name__)

_aten = torch.ops.aten


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if query.is_cuda:
        return _aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    # Without a mask; with what the backward pass needs.
    return _aten._scaled_dot_product_cudnn_attention(query, key, value, None, torch.is_grad_enabled())[0]


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _aten._scaled_dot_product_efficient_attention(query, key, value, None, torch.is_grad_enabled())[0]


def _math(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _aten._scaled_dot_product_attention_math(query, key, value)[0]


# By our names: the operator, and which implementation of torch's flash operator. Operators and not `sdpa_kernel`, which
# sets flags of the whole process, that another thread (T5 on the fly) would meet.
KERNELS: dict[str, tuple[Callable[..., torch.Tensor], str | None]] = {
    "torch": (F.scaled_dot_product_attention, None),  # torch's own choice
    "flash": (_flash, None),
    "cudnn": (_cudnn, None),
    "efficient": (_efficient, None),
    "flash3": (_flash, "FA3"),
    "flash4": (_flash, "FA4"),
    "math": (_math, None),
}
_PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
# Not tried by `fastest`: it keeps the whole S x S matrix.
_NEVER_CHOSEN = ("math",)
_REPEATS = 3


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str = "torch") -> torch.Tensor:
    """Softmax attention without a mask: query, key, value and result [B, S, H, d]."""
    call = KERNELS[kernel][0]
    return call(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


def installed(device: torch.device) -> Iterator[str]:
    """Kernels whose code is there. Whether they take the model's shapes and this GPU is seen by running them."""
    for name, (_, implementation) in KERNELS.items():
        if device.type == "cpu" and name not in ("torch", "flash", "math"):
            continue
        if implementation is not None and not _has_implementation(implementation):
            continue
        yield name


def _has_implementation(implementation: str) -> bool:
    package = _PACKAGES[implementation]
    if not hasattr(attention, "activate_flash_attention_impl"):
        return False
    with contextlib.suppress(Exception):  # looking for a part of a package imports it: one made for another torch fails
        return importlib.util.find_spec(package) is not None
    return False


def use(kernel: str, device: torch.device) -> None:
    """Make `attend(..., kernel)` possible in this process, whatever was ready before.

    Raises UserError naming what is missing; what a package raises when it is loaded comes through.
    """
    there = list(installed(device))
    if kernel not in there:
        raise UserError(
            f"model.attention={kernel} is not to be had on this {device.type}: there are {', '.join(there)}"
        )
    _leave_packages()
    implementation = KERNELS[kernel][1]
    if implementation is not None:
        attention.activate_flash_attention_impl(implementation)


def _leave_packages() -> None:
    """Back to torch's own flash kernel."""
    if getattr(attention, "current_flash_attention_impl", lambda: None)():
        attention.restore_flash_attention_impl()


def measure(
    kernel: str, num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds of one forward and backward of attention over a clip, the best of a few; or what the kernel raises."""
    try:
        use(kernel, device)
        query, key, value = (
            torch.randn(1, num_tokens, num_heads, head_dim, dtype=dtype, device=device, requires_grad=True)
            for _ in range(3)
        )
        gradient, best = torch.randn_like(query), float("inf")
        for _ in range(_REPEATS):
            _wait(device)
            start = time.perf_counter()
            attend(query, key, value, kernel).backward(gradient)
            _wait(device)
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        _leave_packages()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, dict[str, float], dict[str, str]]:
    """The fastest kernel for clips of so many tokens; the seconds that each took; and, of those that are there and do
    not work, the first line of why. Runs on this device. Raises UserError where none works.

    A kernel that fails because of a bug, here or in its package, is left out too, and its traceback is logged. If no
    kernel works and one has a bug, that is raised.
    """
    times: dict[str, float] = {}
    failures: dict[str, str] = {}
    bug: Exception | None = None
    for name in installed(device):
        if name in _NEVER_CHOSEN:
            continue
        try:
            times[name] = measure(name, num_tokens, num_heads, head_dim, dtype, device)
        except Exception as error:  # a shape, type or GPU that it cannot do, or a package that does not load
            failures[name] = brief(error)
            if isinstance(error, BUGS):
                bug = error
                logger.warning(f"attention kernel {name}: a bug: {brief(error)}", exc_info=error)
    if not times and bug is not None:
        raise bug
    if not times:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError(
            f"no attention kernel works here on clips of {num_tokens} tokens ({reasons}): see that torch fits "
            "the GPU's driver, and that no other process has taken its memory"
        )
    return min(times, key=lambda name: times[name]), times, failures
