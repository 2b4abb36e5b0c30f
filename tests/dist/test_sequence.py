"""Sequence parallelism with DeepSpeed gives the losses and gradients of a single rank."""

import json
import shutil

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from tests.conftest import ROOT
from tests.dist.conftest import metrics
from tests.model.transformer.test_forward import V15

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def four_heads(tiny_model, tmp_path_factory):
    """The tiny model with a transformer of 4 heads and 5 text tokens."""
    path = tmp_path_factory.mktemp("four") / "model"
    shutil.copytree(tiny_model, path)
    shutil.rmtree(path / "transformer")
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(**V15 | {"in_channels": 16, "out_channels": 8})
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    transformer.save_pretrained(path / "transformer")
    return path


def test_loss_and_gradients_equal_those_of_one_rank(four_heads, tmp_path, warm):
    done = warm(ROOT / "tests/dist/sequence_script.py", [ROOT, four_heads, tmp_path], ranks=4)
    assert done.returncode == 0, done.stdout[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == 2 * 3 * 2
    for case in report:
        assert case["num_tensors"] > 2 * 3 * 10, case
        assert case["loss"] < 1e-6, case
        assert case["spread"] == 0, case
        assert case["norm"] < 1e-5, case
        assert case["gradient"] < 1e-5, case


def test_a_run_is_the_same_with_sequence_parallelism_and_across_resumes(tiny_model, workshop, run_train):
    def train(name, ranks, sequence, num_steps):
        return run_train(
            "--deepspeed", "ds_configs/zero2.json",
            f"model.path={tiny_model}", f"data.path={workshop / 'clips'}", f"data.cache_dir={workshop / 'cache'}",
            "data.buckets=[17x64x96, 9x96x64, 9x64x64, 1x64x64]", f"output_dir={workshop / name}",
            f"train.num_steps={num_steps}", "train.gradient_accumulation_steps=2", "train.precision=fp32",
            "eval.every=null", "data.num_workers=1", "lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2",
            "optimizer.warmup_steps=2", "train.batch_size=2", f"parallel.sequence_size={sequence}",
            ranks=ranks, launcher="warm",
        )  # fmt: skip

    train("alone", 1, 1, 6)
    output = train("shared", 2, 2, 2).stdout
    assert "2 ranks on CPUs, 2 per clip" in output
    train("shared", 1, 1, 4)
    output = train("shared", 2, 2, 6).stdout
    assert "new layout" not in output  # the plan knows data-parallel ranks only
    expected, actual = metrics(workshop / "alone"), metrics(workshop / "shared")
    assert [line["step"] for line in actual] == [1, 2, 3, 4, 5, 6]
    for line, expected_line in zip(actual, expected):
        names = [name for name in expected_line if name.startswith("train/")]
        assert {name: line[name] for name in names} == pytest.approx(
            {name: expected_line[name] for name in names}, rel=1e-5
        )
