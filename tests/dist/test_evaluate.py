"""Evaluation in real runs does not change training, and all ZeRO stages and the evaluate command agree."""

import json

import pytest
import torch

from tests.conftest import ROOT
from tests.dist.conftest import adapter, losses, notes

pytestmark = [pytest.mark.dist, pytest.mark.slow]

# Dropout, so that random states matter. Every bucket has batches of one and of two.
OVERRIDES = (
    "eval.held_out=0.3", "eval.num_timesteps=3", "eval.num_clips=3", "lora.dropout=0.2", "train.memory_check=off",
    "train.num_steps=4", "train.gradient_accumulation_steps=1", "checkpoint.every=2", "train.batch_size=2",
)  # fmt: skip


def evaluated(run):
    """Return the evaluation losses by step."""
    evaluations = {}
    for line in notes(run):
        if "eval/train_loss" in line:
            evaluations[line["step"]] = {
                name: value for name, value in line.items() if name.startswith(("eval/loss", "eval/train"))
            }
    return evaluations


@pytest.mark.parametrize("ds", ["zero2", "zero3"])
def test_training_is_bitwise_the_same(train_once, ds):
    plain = train_once(f"{ds}-plain", ds, *OVERRIDES, "eval.every=null")
    run = train_once(f"{ds}-evaluated", ds, *OVERRIDES, "eval.every=2")
    assert evaluated(plain) == {}
    assert list(evaluated(run)) == [0, 2, 4]
    assert losses(run) == losses(plain)
    for step in (2, 4):
        expected = adapter(plain, step)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(run, step).items())
    first, last = (evaluated(run)[step]["eval/loss"] for step in (0, 4))
    assert first != last


def test_the_stages_and_the_evaluate_command_agree(train_once, warm):
    two, three = (train_once(f"{ds}-evaluated", ds, *OVERRIDES, "eval.every=2") for ds in ("zero2", "zero3"))
    for step, scalars in evaluated(two).items():
        assert evaluated(three)[step] == pytest.approx(scalars, rel=1e-4)
    # The evaluate command uses no ZeRO.
    for step, lora in ((0, []), (4, ["--lora", two / "lora/step-000004"])):
        done = warm(
            ROOT / "launch/evaluate.py", ["--config", two / "run.yaml", "--json", *lora], ranks=1 if lora else 2
        )
        assert done.returncode == 0, done.stdout[-4000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
        losses = json.loads(line)
        # The base model is the run before its first step.
        assert losses["base"] == pytest.approx(evaluated(two)[0], rel=1e-5)
        assert list(losses.values())[-1] == pytest.approx(evaluated(two)[step], rel=1e-5)
        assert len(losses) == 1 + bool(lora)
