import pytest
import torch

from cogds.errors import UserError
from cogds.model.cudnn import check_cudnn, find_cudnn_problem
from cogds.model.load import find_model, load_vae


@pytest.mark.parametrize(
    "version, dtype, is_wrong",
    [
        (None, torch.bfloat16, False),
        (90701, torch.bfloat16, False),
        (90800, torch.bfloat16, True),
        (91400, torch.bfloat16, True),
        (91500, torch.bfloat16, False),
        (91500, torch.float32, True),
        (91600, torch.float32, False),
        (92100, torch.bfloat16, False),
    ],
)
def test_wrong_versions(version, dtype, is_wrong):
    assert bool(find_cudnn_problem(version, dtype)) == is_wrong


def test_float32_without_tf32_is_right(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert find_cudnn_problem(91002, torch.float32) == ""
    assert find_cudnn_problem(91002, torch.bfloat16)


def test_a_vae_is_not_loaded_for_a_gpu_that_computes_it_wrongly(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(UserError, match=r"9\.10\.2.*nvidia-cudnn-cu.*>=9\.15"):
        load_vae(find_model(str(tiny_model)), torch.bfloat16, torch.device("cuda"))
    check_cudnn(torch.device("cpu"), torch.bfloat16)
