from types import SimpleNamespace

import pytest
import torch

from cogds.preflight import trial_step
from tests.jobs import ALONE

ALLOC_FAILED = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.fixture
def fail(monkeypatch):
    """`fail(error)`: run the trial step of a job whose execution raises `error`."""
    job = SimpleNamespace(
        cfg=SimpleNamespace(train=SimpleNamespace(precision="bf16")), world=ALONE, model=None, largest_bucket=0,
        batch_sizes=(1,), buckets=("9x32x48",), checkpointing=("full",), estimates=(SimpleNamespace(total_bytes=1),),
    )  # fmt: skip

    def run(error):
        def raise_error(*_):
            raise error

        monkeypatch.setattr(trial_step, "choose_execution", raise_error)
        return trial_step.run_trial_step(job)["trial"]

    return run


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(ALLOC_FAILED)])
def test_memory_that_runs_out_in_any_library_is_a_finding(fail, error):
    assert fail(error)["error"] == str(error)


def test_other_errors_are_raised(fail):
    with pytest.raises(RuntimeError, match="planted"):
        fail(RuntimeError("planted"))
