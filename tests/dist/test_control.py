"""Training with control videos, under ZeRO and sequence parallelism, and across a resume."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogds.arguments import parse_args
from cogds.core.geometry import ClipShape
from cogds.data.video.media import probe_video, read_clip, write_video
from cogds.model.lora.file import CONTROL_KEY
from tests.conftest import ROOT
from tests.dist.conftest import adapter, losses
from tests.dist.test_evaluate import evaluated
from tests.dist.test_resume import check_resuming

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def controlled(workshop):
    """The drawn clips, each with a control: its negative."""
    folder = workshop / "controlled"
    shutil.copytree(workshop / "clips", folder)
    for path in sorted(folder.glob("*.mp4")):
        info = probe_video(path)
        pixels = read_clip(path, ClipShape(info.num_frames, info.height, info.width), info.fps)
        write_video(path.with_suffix(".control.mp4"), 255 - pixels, info.fps, num_threads=1)
    image = np.array(Image.open(folder / "image_0.png").convert("RGB"))
    Image.fromarray(255 - image).save(folder / "image_0.control.png")
    return ["conditioning.control=true", f"data.path={folder}"]


def check_trained(run):
    weight = adapter(run)[CONTROL_KEY]
    assert weight.shape == (32, 64)
    assert weight.abs().max() > 1e-3
    return weight


@pytest.mark.slow
def test_a_run_with_controls_starts_as_one_without_and_resumes_bitwise(train_once, workshop, controlled):
    tensors = check_resuming(train_once, workshop, "control", "zero2", *controlled)
    check_trained(workshop / "control")
    assert "weight/patch_embed.control.weight" in tensors
    plain, run = losses(train_once("zero2", "zero2")), losses(workshop / "control")
    assert run[0] == plain[0]
    assert run[1:] != plain[1:]


@pytest.mark.slow
def test_the_command_that_training_shows_has_a_control(train_once, workshop, controlled, run_train):
    train_once("control", "zero2", *controlled)
    done = run_train("--config", workshop / "control/run.yaml", launcher="warm")
    (words,) = re.findall(r"next: .* sample (.*)", done.stdout)
    args = parse_args("sample", shlex.split(words))
    assert args.control == str(Path(args.image[0]).with_suffix(".control.mp4"))


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["zero3", "zero3_offload"])
def test_every_stage_trains_the_same_control(train_once, controlled, ds):
    reference, run = train_once("control", "zero2", *controlled), train_once(f"control-{ds}", ds, *controlled)
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    torch.testing.assert_close(check_trained(run), check_trained(reference), atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_ranks_that_share_clips_train_the_same_control(train_once, controlled):
    alone = train_once("control-alone", "zero2", *controlled, ranks=1)
    shared = train_once("control-shared", "zero2", *controlled, "parallel.sequence_size=2", ranks=2)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    torch.testing.assert_close(check_trained(shared), check_trained(alone), atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_modes_of_the_blocks_do_not_change_the_control(train_once, controlled):
    alone = train_once("control-alone", "zero2", *controlled, ranks=1)
    full = train_once("control-full", "zero2", *controlled, "train.activation_checkpointing=full", ranks=1)
    assert losses(full) == losses(alone)
    fly = train_once("control-fly", "zero2", *controlled, "data.encode=on_the_fly", ranks=1)
    assert losses(fly) == losses(alone)


@pytest.mark.slow
def test_the_evaluate_command_and_an_initial_lora_use_the_control(train_once, warm, controlled):
    """Evaluations and videos do not change the training."""
    watched = ["eval.every=6", "eval.num_clips=2", "eval.num_timesteps=2", "sample.every=6", "sample.num_steps=1"]
    run = train_once("control-watched", "zero3", *controlled, *watched)
    assert losses(run) == losses(train_once("control-zero3", "zero3", *controlled))
    assert len(list(run.glob("samples/step-000006/*.mp4"))) > 0
    lora = run / "lora/step-000006"
    done = warm(ROOT / "launch/evaluate.py", ["--config", run / "run.yaml", "--json", "--lora", lora])
    assert done.returncode == 0, done.stdout[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["LoRA"] == pytest.approx(evaluated(run)[6], rel=1e-4)
    started = train_once(
        "control-started", "zero2", *controlled, f"lora.init_from={lora}", "optimizer.lr=1e-30", "train.num_steps=1"
    )
    expected = adapter(run)
    assert expected[CONTROL_KEY].abs().max() > 0
    for name, tensor in adapter(started, 1).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
