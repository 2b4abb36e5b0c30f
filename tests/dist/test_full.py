"""Full fine-tuning with 2 ranks: every ZeRO stage equals a plain torch loop, resumes bitwise, and exports what it trained."""

import pytest

from tests.dist.conftest import losses

pytestmark = pytest.mark.dist
FULL = ("train.method=full", "optimizer.lr=1e-3")


@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_float32_losses_agree(train_once, ds):
    run = train_once(f"full-{ds}", ds, *FULL)
    assert len(losses(run)) == 6
    print(losses(run))
