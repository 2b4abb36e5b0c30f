"""Attention kernels: exactness, availability, and the choice of the fastest."""

import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogds.config.schema import ATTENTION_KERNELS
from cogds.errors import UserError
from cogds.model.transformer import attention, flash4
from cogds.model.transformer.attention import (
    KERNELS,
    activate_kernel,
    attend,
    check_kernel,
    find_fastest_kernel,
    installed_kernels,
    require_kernel,
)

CPU = torch.device("cpu")


def reference(query, key, value):
    """Compute softmax attention step by step, [B, S, H, d]."""
    scores = torch.einsum("bshd,bthd->bhst", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), value)


def test_the_config_lists_all_kernels():
    assert set(KERNELS) == set(ATTENTION_KERNELS)


@pytest.mark.parametrize("kernel", list(installed_kernels(CPU)))
def test_every_kernel_is_exact(kernel):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 7, 4, 16, dtype=torch.float64).unbind()
    out = attend(query, key, value, kernel)
    assert torch.allclose(out, reference(query, key, value), atol=1e-12)


class AttentionCalls(TorchDispatchMode):
    """Records the attention operators that run, and whether all process-wide flags are set then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.name():
            flags = torch.backends.cuda
            self.calls.append((func.name(), flags.flash_sdp_enabled() and flags.math_sdp_enabled()))
        return func(*args, **(kwargs or {}))


def test_a_kernel_is_called_directly_without_process_wide_flags():
    x = torch.randn(1, 7, 4, 16)
    with AttentionCalls() as flash:
        attend(x, x, x, "flash")
    assert flash.calls == [("aten::_scaled_dot_product_flash_attention_for_cpu", True)]
    with AttentionCalls() as math:
        attend(x, x, x, "math")
    assert all("flash" not in name and all_enabled for name, all_enabled in math.calls)


@pytest.mark.parametrize("error", [ImportError("undefined symbol: _ZN3c10"), OSError("libcudart.so.12: no such file")])
def test_a_package_built_for_another_torch_is_not_available(monkeypatch, error):
    def find(name):
        raise type(error)(f"{name}: {error}")

    monkeypatch.setattr(attention.importlib.util, "find_spec", find)
    assert {"flash3", "flash4"}.isdisjoint(installed_kernels(torch.device("cuda")))


def test_an_unavailable_kernel_is_refused():
    with pytest.raises(UserError, match=r"model\.attention=cudnn .* torch, flash, math"):
        activate_kernel("cudnn", CPU)


def break_kernels(monkeypatch, error, *kernels):
    """Make these kernels raise an error."""

    def call(query, key, value, kernel):
        if kernel in kernels:
            raise error
        return attend(query, key, value, kernel)

    monkeypatch.setattr(attention, "attend", call)


UNSUPPORTED = RuntimeError("no such head dim\nand a lot of hints")


def test_a_failing_kernel_is_skipped_with_its_error(monkeypatch):
    break_kernels(monkeypatch, UNSUPPORTED, "flash")
    kernel, times, failures = find_fastest_kernel(8, 2, 16, torch.float32, CPU)
    assert kernel == "torch"
    assert set(times) == {"torch"}
    assert failures == {"flash": "RuntimeError: no such head dim"}


def test_a_bug_is_logged_and_raised_if_no_kernel_works(monkeypatch, caplog):
    break_kernels(monkeypatch, TypeError("planted"), "flash")
    kernel, _, failures = find_fastest_kernel(8, 2, 16, torch.float32, CPU)
    assert (kernel, failures) == ("torch", {"flash": "TypeError: planted"})
    assert "in time_kernel\n" in caplog.text
    break_kernels(monkeypatch, TypeError("planted"), "torch", "flash")
    with pytest.raises(TypeError, match="planted"):
        find_fastest_kernel(8, 2, 16, torch.float32, CPU)


def test_no_working_kernel_is_a_user_error(monkeypatch):
    break_kernels(monkeypatch, UNSUPPORTED, "torch", "flash")
    with pytest.raises(UserError, match=r"torch: RuntimeError: no such .*flash: RuntimeError: no such"):
        find_fastest_kernel(8, 2, 16, torch.float32, CPU)


def test_a_package_that_does_not_load_is_a_failure(monkeypatch):
    monkeypatch.setitem(attention._PACKAGES, "FA3", "json")  # "installed"

    def load(name):
        raise OSError(f"libcudart of {name} is missing")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", load, raising=False)
    assert not find_fastest_kernel(8, 2, 16, torch.float32, CPU)[2]  # kernels of packages are tried on GPUs only
    monkeypatch.setattr(attention, "installed_kernels", lambda _: iter(("torch", "flash3")))
    _, times, failures = find_fastest_kernel(8, 2, 16, torch.float32, CPU)
    assert set(times) == {"torch"}
    assert failures == {"flash3": "OSError: libcudart of FA3 is missing"}


def test_the_fastest_kernel_is_chosen_but_never_math(monkeypatch):
    times = {"torch": 3.0, "flash": 2.0, "math": 1.0}
    monkeypatch.setattr(attention, "time_kernel", lambda kernel, *_: times[kernel])
    assert find_fastest_kernel(8, 2, 16, torch.float32, CPU) == ("flash", {"torch": 3.0, "flash": 2.0}, {})


class Wrong(torch.autograd.Function):
    """Attention with a wrong result: `fault` of "nan", "query", "key" or "output"."""

    @staticmethod
    def forward(ctx, query, key, value, fault):
        ctx.save_for_backward(query, key, value)
        ctx.fault = fault
        output = attend(query, key, value)
        return output * 1.05 if fault == "output" else output

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            gradients = list(torch.autograd.grad(attend(*inputs), inputs, gradient))
        if ctx.fault == "nan":
            gradients[2][0, -1] = float("nan")
        elif ctx.fault in ("query", "key"):
            gradients[ctx.fault == "key"] *= 1.05
        return *gradients, None


@pytest.mark.parametrize(
    "fault, words", [("nan", "not finite"), ("query", "query gradient"), ("key", "key gradient"), ("output", "output")]
)
def test_a_fast_kernel_with_a_wrong_result_is_not_chosen(monkeypatch, fault, words):
    def call(query, key, value, kernel):
        if kernel != "flash":
            return attend(query, key, value, kernel)
        return Wrong.apply(query, key, value, fault)

    monkeypatch.setattr(attention, "attend", call)
    monkeypatch.setattr(attention, "time_kernel", lambda kernel, *_: {"torch": 3.0, "flash": 2.0}[kernel])
    kernel, times, failures = find_fastest_kernel(40, 2, 16, torch.float32, CPU)
    assert (kernel, set(times), set(failures)) == ("torch", {"torch"}, {"flash"})
    assert words in failures["flash"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [*installed_kernels(CPU)])
def test_the_kernels_of_torch_are_right(kernel, dtype):
    assert attention.find_wrong_result(kernel, 300, 4, 64, dtype, CPU) == ""


def test_a_kernel_that_does_not_work_is_reported_without_a_traceback(monkeypatch):
    monkeypatch.setattr(attention, "installed_kernels", lambda _: iter(("torch", "flash4")))
    assert "flash_attn" in check_kernel("flash4", 8, 2, 16, torch.bfloat16, CPU)
    assert check_kernel("torch", 8, 2, 16, torch.bfloat16, CPU) == ""
    with pytest.raises(UserError, match=r"^model\.attention=flash4: .*flash_attn"):
        require_kernel("flash4", CPU)


def test_a_kernel_that_cannot_be_compared_is_not_chosen(monkeypatch):
    def compare(kernel, *_):
        if kernel == "flash":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ""

    monkeypatch.setattr(attention, "find_wrong_result", compare)
    monkeypatch.setattr(attention, "time_kernel", lambda kernel, *_: {"torch": 3.0, "flash": 2.0}[kernel])
    kernel, times, failures = find_fastest_kernel(8, 2, 16, torch.float32, CPU)
    assert (kernel, times) == ("torch", {"torch": 3.0})
    assert "out of memory" in failures["flash"]


@pytest.mark.parametrize("num_results", [2, 3, 5])
def test_flash4_takes_any_number_of_results(monkeypatch, num_results):
    calls = []

    def forward(_query, _key, _value, softmax_scale=None, return_lse=False):
        calls.append((softmax_scale, return_lse))
        return tuple(range(num_results))

    package = types.SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=lambda *_: tuple(range(num_results + 1)))
    monkeypatch.setitem(sys.modules, flash4.PACKAGE, package)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
    assert flash4._flash_attn_fwd(1, 2, 3, softmax_scale=0.1, return_lse=True, page_table=None, num_splits=1) == (0, 1)
    assert flash4._flash_attn_bwd(1, 2, 3) == (0, 1, 2)
    assert calls == [(0.1, True)]
    with pytest.raises(TypeError, match="page_table"):
        flash4._flash_attn_fwd(1, 2, 3, page_table=4)


def test_every_installed_kernel_is_timed():
    kernel, times, failures = find_fastest_kernel(32, 2, 16, torch.float32, CPU)
    assert kernel in times
    assert set(times) == {"torch", "flash"}
    assert all(seconds > 0 for seconds in times.values())
    assert not failures
