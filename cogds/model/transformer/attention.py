"""Attention kernels: the call, and the choice of the fastest kernel on this device.

All kernels compute exact softmax attention. None is approximate.
"""

import contextlib
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn import attention

from cogds.errors import BUGS, UserError, brief
from cogds.model.transformer import flash4

logger = logging.getLogger(__name__)

_aten = torch.ops.aten


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if query.is_cuda:
        return _aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    # None: no mask. The flag asks for the log-sum-exp, which the backward pass needs.
    return _aten._scaled_dot_product_cudnn_attention(query, key, value, None, torch.is_grad_enabled())[0]


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _aten._scaled_dot_product_efficient_attention(query, key, value, None, torch.is_grad_enabled())[0]


def _math(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _aten._scaled_dot_product_attention_math(query, key, value)[0]


# For each value of model.attention, the operator and the implementation that torch's flash operator must use. cogds
# calls operators instead of `sdpa_kernel`, whose process-wide flags would affect other threads (T5, on the fly).
KERNELS: dict[str, tuple[Callable[..., torch.Tensor], str | None]] = {
    "torch": (F.scaled_dot_product_attention, None),  # torch chooses
    "flash": (_flash, None),
    "cudnn": (_cudnn, None),
    "efficient": (_efficient, None),
    "flash3": (_flash, "FA3"),
    "flash4": (_flash, "FA4"),
    "math": (_math, None),
}
_PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
# Not tried by `find_fastest_kernel`, because it stores the whole attention matrix.
_NEVER_CHOSEN = ("math",)
_NUM_REPEATS = 3
# The relative error of a kernel's result against float32. bf16 has 8 bits, and a sound kernel is at about 0.005.
_MAX_ERROR = {torch.bfloat16: 0.02, torch.float32: 0.001}
_NUM_SAMPLED_QUERIES = 16


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str = "torch") -> torch.Tensor:
    """Softmax attention without a mask. query, key, value and the result are [B, S, H, d]."""
    call = KERNELS[kernel][0]
    return call(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


def installed_kernels(device: torch.device) -> Iterator[str]:
    """Kernels that are installed. Only a trial run shows if they support the model's shapes and this GPU."""
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
    # find_spec imports the parent package, which fails if it was built for another version of torch.
    with contextlib.suppress(Exception):
        return importlib.util.find_spec(package) is not None
    return False


def activate_kernel(kernel: str, device: torch.device) -> None:
    """Prepare this process for `attend(..., kernel)`, replacing any kernel that was active before.

    Raises UserError if the kernel is not available, and the package's own error if it cannot be loaded.
    """
    available = list(installed_kernels(device))
    if kernel not in available:
        raise UserError(
            f"model.attention={kernel} is not available on {device.type}. Use one of the available kernels: "
            f"{', '.join(available)}."
        )
    _restore_torch_kernel()
    implementation = KERNELS[kernel][1]
    if implementation is not None:
        if implementation == "FA4":
            flash4.register()
        attention.activate_flash_attention_impl(implementation)


def require_kernel(kernel: str, device: torch.device) -> None:
    """`activate_kernel` for the kernel of a run. Raises UserError also if its package cannot be loaded."""
    try:
        activate_kernel(kernel, device)
    except UserError:
        raise
    except Exception as error:  # the package was built for another version of torch, for example
        raise UserError(
            f"model.attention={kernel}: its package does not work here: {brief(error)}. Install it for this version of "
            "torch on every node, or use model.attention=auto."
        ) from error


def _restore_torch_kernel() -> None:
    """Switch back to torch's own flash kernel."""
    if getattr(attention, "current_flash_attention_impl", lambda: None)():
        attention.restore_flash_attention_impl()


def time_kernel(
    kernel: str, num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Measure a forward and backward pass of attention over one clip in seconds: the fastest of several runs.

    Raises whatever the kernel raises.
    """
    try:
        activate_kernel(kernel, device)
        query, key, value = (
            torch.randn(1, num_tokens, num_heads, head_dim, dtype=dtype, device=device, requires_grad=True)
            for _ in range(3)
        )
        gradient, best_s = torch.randn_like(query), float("inf")
        for _ in range(_NUM_REPEATS):
            _synchronize(device)
            start = time.perf_counter()
            attend(query, key, value, kernel).backward(gradient)
            _synchronize(device)
            best_s = min(best_s, time.perf_counter() - start)
        return best_s
    finally:
        _restore_torch_kernel()


@dataclass(frozen=True)
class KernelErrors:
    """How far a kernel's result is from attention in float32.

    is_finite: whether the output and all gradients are. relative: L2 distances, by name, such as "key gradient".
    """

    is_finite: bool
    relative: dict[str, float]

    def problem(self, dtype: torch.dtype) -> str:
        """Return what is wrong for this dtype, such as "its output differs by 0.31 from float32", or ""."""
        if not self.is_finite:
            return "its output or a gradient is not finite"
        for name, error in self.relative.items():
            if not error <= _MAX_ERROR[dtype]:
                return f"its {name} differs by {error:.2g} from float32"
        return ""


def measure_errors(
    kernel: str, num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> KernelErrors:
    """Compare an active kernel with attention in float32, forward and backward, over one clip.

    The loss reads a sample of the queries, so the reference needs only their rows of the attention matrix. Raises
    whatever the kernel raises.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(num: int) -> torch.Tensor:
        return torch.randn(1, num, num_heads, head_dim, dtype=dtype, device=device, generator=generator)

    inputs = query, key, value = [draw(num_tokens).requires_grad_() for _ in range(3)]
    output = attend(query, key, value, kernel)
    dense = torch.autograd.grad(output, inputs, draw(num_tokens), retain_graph=True)
    rows = torch.linspace(0, num_tokens - 1, min(num_tokens, _NUM_SAMPLED_QUERIES), device=device).round().long()
    gradient = draw(len(rows))
    sparse = torch.autograd.grad(output[:, rows], inputs, gradient)

    exact = [tensor.detach().float().requires_grad_() for tensor in (query[:, rows], key, value)]
    expected = attend(exact[0], exact[1], exact[2], "math")
    expected_gradients = torch.autograd.grad(expected, exact, gradient.float())
    results = {
        "output": (output[:, rows], expected),
        "query gradient": (sparse[0][:, rows], expected_gradients[0]),
        "key gradient": (sparse[1], expected_gradients[1]),
        "value gradient": (sparse[2], expected_gradients[2]),
    }
    return KernelErrors(
        all(bool(tensor.isfinite().all()) for tensor in (output, *dense)),
        {
            name: ((result.float() - reference).norm() / reference.norm()).item()
            for name, (result, reference) in results.items()
        },
    )


def find_wrong_result(
    kernel: str, num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str:
    """Return what is wrong with the results of an active kernel, or "". Raises whatever the kernel raises."""
    return measure_errors(kernel, num_tokens, num_heads, head_dim, dtype, device).problem(dtype)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def find_fastest_kernel(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, dict[str, float], dict[str, str]]:
    """Time the installed kernels on this device with clips of `num_tokens` tokens.

    The fastest kernel must also give the right result (`find_wrong_result`), or the next one is chosen. A kernel that
    fails because of a bug, in cogds or in its package, is skipped too, and its traceback is logged. If no kernel works
    and one of them has a bug, that error is raised.

    Returns:
        The name of the fastest kernel, the seconds of each kernel, and the error of each kernel that failed.

    Raises:
        UserError: no kernel works.
    """
    times: dict[str, float] = {}
    failures: dict[str, str] = {}
    bug: Exception | None = None
    for name in installed_kernels(device):
        if name in _NEVER_CHOSEN:
            continue
        try:
            times[name] = time_kernel(name, num_tokens, num_heads, head_dim, dtype, device)
        except Exception as error:  # an unsupported shape, type or GPU, or a package that does not load
            failures[name] = brief(error)
            if isinstance(error, BUGS):
                bug = error
                logger.warning(f"attention kernel {name} failed because of a bug: {brief(error)}", exc_info=error)
    for name in sorted(times, key=lambda name: times[name]):
        try:
            activate_kernel(name, device)
            problem = find_wrong_result(name, num_tokens, num_heads, head_dim, dtype, device)
        except Exception as error:  # too little memory for the comparison, for example
            problem = brief(error)
        finally:
            _restore_torch_kernel()
        if not problem:
            return name, times, failures
        del times[name]
        failures[name] = problem
        logger.warning(f"attention kernel {name} is not used: {problem}")
    if bug is not None:
        raise bug
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    raise UserError(
        f"model.attention=auto: no attention kernel works for clips of {num_tokens} tokens ({reasons}). Check that "
        "torch supports this GPU and its driver, and that no other process uses the GPU's memory."
    )


def check_kernel(
    kernel: str, num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str:
    """Return why a kernel cannot be used for clips of `num_tokens` tokens on this device, or "".

    On CPUs, kernels are only activated: they are torch's own, and a trial of a long clip would take minutes.
    """
    try:
        activate_kernel(kernel, device)
        if device.type == "cpu":
            return ""
        return find_wrong_result(kernel, num_tokens, num_heads, head_dim, dtype, device)
    except UserError:
        raise
    except Exception as error:  # an unsupported shape, type or GPU, or a package that does not fit torch
        return brief(error)
    finally:
        _restore_torch_kernel()
