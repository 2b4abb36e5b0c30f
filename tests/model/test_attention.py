"""Attention kernels: they agree, what is missing is said, and the fastest is taken."""

import pytest
import torch

from cogds.config import ATTENTION_KERNELS
from cogds.errors import UserError
from cogds.model import attention
from cogds.model.attention import KERNELS, attend, fastest, installed, measure, use

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


def test_what_is_not_there_is_refused_by_name():
    with pytest.raises(UserError, match=r"model\.attention=cudnn .* torch, flash, math"):
        use("cudnn", CPU)


def test_one_that_fails_is_no_choice(monkeypatch):
    assert measure("cudnn", 8, 2, 16, torch.float32, CPU) is None

    def fail(*_args):
        raise RuntimeError("no kernel takes this")

    monkeypatch.setattr(attention, "attend", fail)
    assert measure("flash", 8, 2, 16, torch.float32, CPU) is None


def test_the_fastest_is_taken_and_the_one_that_keeps_a_square_never(monkeypatch):
    times = {"torch": 3.0, "flash": 2.0, "math": 1.0}
    monkeypatch.setattr(attention, "measure", lambda kernel, *_: times[kernel])
    assert fastest(8, 2, 16, torch.float32, CPU) == ("flash", {"torch": 3.0, "flash": 2.0})


def test_measuring_really_runs():
    kernel, times = fastest(32, 2, 16, torch.float32, CPU)
    assert kernel in times
    assert set(times) == {"torch", "flash"}
    assert all(seconds > 0 for seconds in times.values())
