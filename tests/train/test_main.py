"""The train verb's own set-up."""

import os

import pytest
import torch

from cogds.cli import call
from cogds.errors import UserError
from cogds.train import main


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_deterministic_kernels_are_chosen_before_anything_runs(tiny_model, tmp_path, monkeypatch, is_deterministic):
    seen = []

    def stop(_job):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        raise UserError("stop here")

    monkeypatch.setattr(main, "check_execution", stop)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    words = [f"model.path={tiny_model}", f"data.path={tmp_path}", f"train.deterministic={is_deterministic}"]
    try:
        with pytest.raises(UserError, match="stop here"):
            call("train", words, starts_ranks=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(True, ":4096:8") if is_deterministic else (False, None)]
