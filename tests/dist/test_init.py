"""A run that starts from a LoRA begins with that LoRA, at the stage that partitions it too."""

import pytest
import torch

from tests.dist.conftest import adapter

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize("ds", ["zero2", "zero3"])
def test_a_step_of_no_length_leaves_the_lora_that_the_run_started_from(train_once, run_train, workshop, ds):
    """Without a learning rate nothing moves the weights, not even weight decay: what is exported is what was loaded."""
    source = train_once("zero2", "zero2")
    folder, lora = workshop / f"{ds}-init", source / "lora/step-000006"
    done = run_train(
        "--deepspeed", f"ds_configs/{ds}.json", "--config", source / "run.yaml", f"output_dir={folder}",
        f"lora.init_from={lora}", "optimizer.lr=0", "train.num_steps=1", "seed=1", launcher="warm",
    )  # fmt: skip
    file = lora / "pytorch_lora_weights.safetensors"
    assert f"starting from LoRA {file}: 8 layers, rank 4, strength 2 (alpha from the file)" in done.stdout
    expected, tensors = adapter(source), adapter(folder, 1)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
