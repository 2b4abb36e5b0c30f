"""The train verb learns: real clips in several buckets, and two clips until it overfits."""

import json
import os

import pytest

from tests.conftest import ROOT
from tests.dist.conftest import metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CAPTIONS = {
    "bigbuckbunny.mp4": "a white rabbit in a green field",
    "bikes.mp4": "people ride bikes down a street",
    "carphone_pristine.mp4": "a man talks in a car",
}


def test_real_clips_train_in_several_buckets(real_clips, tiny_model, run_train, tmp_path):
    clips, run = tmp_path / "clips", tmp_path / "run"
    clips.mkdir()
    for name, caption in CAPTIONS.items():
        os.symlink(real_clips / name, clips / name)
        (clips / name).with_suffix(".txt").write_text(caption)
    run_train(
        "--deepspeed", "ds_configs/zero2.json",
        f"model.path={tiny_model}", f"data.path={clips}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.buckets=[17x96x160, 25x64x80, 9x64x160]", f"output_dir={run}",
        "train.num_steps=6", "lora.rank=4", "lora.alpha=8", "eval.every=null", launcher="warm",
    )  # fmt: skip
    assert (run / "unusable.jsonl").read_text() == ""
    trained = [name for line in metrics(run) for name in line if name.startswith("train/loss/bucket=")]
    # 1280x720 goes to 17x96x160, 640x272 to 9x64x160, and 176x144 (its pixels are not square) to 25x64x80. In six steps
    # every clip is trained twice.
    assert sorted(trained) == sorted(f"train/loss/bucket={b}" for b in ("17x96x160", "25x64x80", "9x64x160") * 2)


def evaluation_loss(warm, *arguments):
    done = warm(ROOT / "launch/evaluate.py", [*arguments, "--json"])
    assert done.returncode == 0, done.stdout[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return list(json.loads(line).values())[-1]["eval/train_loss"]


def test_overfitting_two_clips_halves_the_evaluation_loss(real_clips, tiny_model, run_train, warm, tmp_path):
    """From 1.38 to 0.43 in 200 steps.

    The tiny model cannot reach 0, because its residual stream has 32 numbers for a patch of 64 noisy latents. With
    little noise, v is almost the noise, and the loss stays near 1. With much noise, v is almost the clip: 0.17.
    """
    # Each clip is listed four times, so that a batch has it with several noises and timesteps.
    rows = [{"file_name": str(real_clips / name), "text": CAPTIONS[name]} for name in list(CAPTIONS)[1:]] * 4
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        f"model.path={tiny_model}", f"data.path={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.buckets=[9x64x64]", "train.precision=fp32",
    ]  # fmt: skip
    run_train(
        *common, f"output_dir={tmp_path / 'run'}",
        "lora.target_modules=[all-linear]", "lora.rank=32", "lora.alpha=64",
        "train.num_steps=200", "train.batch_size=4", "eval.every=null", "train.activation_checkpointing=none",
        "optimizer.lr=5e-3", "optimizer.warmup_steps=10", "optimizer.schedule=cosine",
        # The trained clips are evaluated: this tests memorization, not generalization.
        "conditioning.image_noise=false", "conditioning.image_dropout=0", "conditioning.caption_dropout=0",
        "checkpoint.every=200",
        timeout_s=400, launcher="warm",
    )  # fmt: skip
    base = evaluation_loss(warm, *common)
    tuned = evaluation_loss(warm, *common, "--lora", tmp_path / "run/lora/step-000200")
    print(f"evaluation loss: base {base:.4f}, tuned {tuned:.4f}")
    assert tuned < base / 2
    # Predicting zeros gives about 1, the mean square of the target, so suppressing the random output is not enough.
    assert tuned < 0.6
