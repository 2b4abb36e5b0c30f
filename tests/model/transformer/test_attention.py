"""Attention kernels: they agree, what is missing is said, and the fastest is taken."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogds.config.schema import ATTENTION_KERNELS
from cogds.errors import UserError
from cogds.model.transformer import attention
from cogds.model.transformer.attention import KERNELS, attend, fastest, installed, use

CPU = torch.device("cpu")


def plain(query, key, value):
    """Softmax attention written out, [B, S, H, d]."""
    scores = torch.einsum("bshd,bthd->bhst", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), value)


def test_the_config_names_them():
    assert set(KERNELS) == set(ATTENTION_KERNELS)


@pytest.mark.parametrize("kernel", [*installed(CPU)])
def test_each_is_exact(kernel):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 7, 4, 16, dtype=torch.float64).unbind()
    out = attend(query, key, value, kernel)
    assert torch.allclose(out, plain(query, key, value), atol=1e-12)


class Seen(TorchDispatchMode):
    """Attention operators that ran, and the flags of the process meanwhile."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.name():
            flags = torch.backends.cuda
            self.calls.append((func.name(), flags.flash_sdp_enabled() and flags.math_sdp_enabled()))
        return func(*args, **(kwargs or {}))


def test_a_kernel_is_called_by_its_name_and_no_other_thread_meets_a_flag():
    one = torch.randn(1, 7, 4, 16)
    with Seen() as seen:
        attend(one, one, one, "flash")
    assert seen.calls == [("aten::_scaled_dot_product_flash_attention_for_cpu", True)]
    with Seen() as seen:
        attend(one, one, one, "math")
    assert all("flash" not in name and free for name, free in seen.calls)


@pytest.mark.parametrize("error", [ImportError("undefined symbol: _ZN3c10"), OSError("libcudart.so.12: no such file")])
def test_a_package_made_for_another_torch_is_none(monkeypatch, error):
    def find(name):
        raise type(error)(f"{name}: {error}")

    monkeypatch.setattr(attention.importlib.util, "find_spec", find)
    assert {"flash3", "flash4"}.isdisjoint(installed(torch.device("cuda")))


def test_what_is_not_there_is_refused_by_name():
    with pytest.raises(UserError, match=r"model\.attention=cudnn .* torch, flash, math"):
        use("cudnn", CPU)


def broken(monkeypatch, *kernels):
    """These kernels fail as torch's do."""

    def call(query, key, value, kernel):
        if kernel in kernels:
            raise RuntimeError(f"{kernel} takes no such head dim\nand a lot of hints")
        return attend(query, key, value, kernel)

    monkeypatch.setattr(attention, "attend", call)


def test_one_that_fails_is_no_choice_and_says_why(monkeypatch):
    broken(monkeypatch, "flash")
    kernel, times, failures = fastest(8, 2, 16, torch.float32, CPU)
    assert kernel == "torch"
    assert set(times) == {"torch"}
    assert failures == {"flash": "RuntimeError: flash takes no such head dim"}


def test_a_bug_in_one_keeps_its_traceback_and_in_all_is_raised(monkeypatch, caplog):
    def plant(*kernels):
        def call(query, key, value, kernel):
            if kernel in kernels:
                raise TypeError("planted")
            return attend(query, key, value, kernel)

        monkeypatch.setattr(attention, "attend", call)

    plant("flash")
    kernel, _, failures = fastest(8, 2, 16, torch.float32, CPU)
    assert (kernel, failures) == ("torch", {"flash": "TypeError: planted"})
    assert "in measure\n" in caplog.text
    plant("torch", "flash")
    with pytest.raises(TypeError, match="planted"):
        fastest(8, 2, 16, torch.float32, CPU)


def test_where_none_works_that_is_the_users_to_mend(monkeypatch):
    broken(monkeypatch, "torch", "flash")
    with pytest.raises(UserError, match=r"torch: RuntimeError: torch takes .*flash: RuntimeError: flash takes"):
        fastest(8, 2, 16, torch.float32, CPU)


def test_what_is_not_installed_is_no_failure_and_what_does_not_load_is_one(monkeypatch):
    monkeypatch.setitem(attention._PACKAGES, "FA3", "json")  # "installed"

    def load(name):
        raise OSError(f"libcudart of {name} is missing")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", load, raising=False)
    _, times, failures = fastest(8, 2, 16, torch.float32, CPU)
    assert not failures  # packages' kernels are for GPUs
    monkeypatch.setattr(attention, "installed", lambda _: iter(("torch", "flash3")))
    _, times, failures = fastest(8, 2, 16, torch.float32, CPU)
    assert set(times) == {"torch"}
    assert failures == {"flash3": "OSError: libcudart of FA3 is missing"}


def test_the_fastest_is_taken_and_the_one_that_keeps_a_square_never(monkeypatch):
    times = {"torch": 3.0, "flash": 2.0, "math": 1.0}
    monkeypatch.setattr(attention, "measure", lambda kernel, *_: times[kernel])
    assert fastest(8, 2, 16, torch.float32, CPU) == ("flash", {"torch": 3.0, "flash": 2.0}, {})


def test_measuring_really_runs():
    kernel, times, failures = fastest(32, 2, 16, torch.float32, CPU)
    assert kernel in times
    assert set(times) == {"torch", "flash"}
    assert all(seconds > 0 for seconds in times.values())
    assert not failures
