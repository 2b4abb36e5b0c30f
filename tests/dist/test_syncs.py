"""A step waits for the GPU only when DeepSpeed checks whether the gradients are finite."""

import json
from collections import Counter

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.dist, pytest.mark.slow]
NUM_STEPS = 4
# The monitor reads the metrics of all steps at once. The data loader draws a seed.
READS = {"cogds:monitor.py:<dictcomp>": NUM_STEPS, "cogds:batches.py:load_batches": 1}


def test_only_deepspeed_and_the_monitor_read_values_from_the_device(workshop, tiny_model, warm, tmp_path):
    reads = tmp_path / "reads.json"
    done = warm(
        ROOT / "tests/dist/syncs_script.py",
        [
            f"model.path={tiny_model}", f"data.path={workshop / 'clips'}", f"data.cache_dir={workshop / 'cache'}",
            "data.buckets=[17x64x96, 1x64x64]", f"output_dir={tmp_path / 'run'}", f"train.num_steps={NUM_STEPS}",
            "train.gradient_accumulation_steps=3", "data.num_workers=0", "lora.rank=4", f"metrics.every={NUM_STEPS}",
            "train.activation_checkpointing=selective",
        ],
        env={"READS": str(reads)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    recorded = json.loads(reads.read_text())
    steps = recorded["reads"]
    assert recorded["waits"] == []  # DeepSpeed's throughput timer would wait twice per micro-step
    places = Counter(place for step in steps for place in step)
    assert {place: num for place, num in places.items() if not place.startswith("deepspeed:")} == READS
    # DeepSpeed reads once per step and not per micro-step, and the monitor only in the last step.
    assert all(len(step) <= 4 for step in steps[1:-1]), steps
    assert not any("monitor" in place for step in steps[:-1] for place in step)
