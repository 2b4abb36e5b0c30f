"""The memory check does not change a run, at ZeRO stages 2 and 3 on 2 ranks."""

import json

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_a_run_is_bitwise_the_same(tiny_model, tmp_path, warm):
    done = warm(ROOT / "tests/dist/memory_check_script.py", [ROOT, tiny_model, tmp_path / "report.json"], ranks=2)
    assert done.returncode == 0, done.stdout[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"2", "3"}
    for case in report.values():
        plain, checked = case["losses"]
        assert plain == checked
        assert len(set(plain)) == len(plain) == 6  # the weights change
        assert case["different"] == []
        assert case["num_tensors"] == 3 * 2 * 4 * 2  # weights and moments of 4 layers in 2 blocks
        assert case["random state kept"]
        assert case["texts"][0] == "None"
        assert all(text in case["texts"][1] for text in ("17x96x128", "batch 1", "activation checkpointing full"))
    two, three = (case["norms"] for case in report.values())
    assert three == pytest.approx(two, rel=1e-3)
