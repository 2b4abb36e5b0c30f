"""A newcomer's path by the README alone: clone, demo, watch it, one's own ten clips, a video from the LoRA.

Every command is the README's, run in a fresh clone; only the model (a tiny one), the clips and the length are given.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.board import tensorboard
from tests.conftest import ROOT, free_port, remove_shared_buffers, run_command
from tests.readme import command

pytestmark = [pytest.mark.dist, pytest.mark.slow]
NUM_CLIPS = 10
VENV = Path(sys.prefix)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What `git clone` gives; `make install` has been run for it already, by whoever runs this test."""
    if not (VENV / ".installed").exists():
        pytest.skip(f"{VENV} is not what `make install` made: run by `make test-slow`")
    folder = tmp_path_factory.mktemp("newcomer") / "cogds"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True, timeout=60)
    # What is being changed counts too.
    changed = subprocess.run(
        ["git", "ls-files", "-z", "--modified", "--others", "--exclude-standard"], cwd=ROOT, check=True,
        capture_output=True, text=True, timeout=60,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, changed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("setup.py", "constraints.txt"):
        os.utime(folder / name, (0, 0))  # or make would install once more
    return folder


def run(clone, words, more=(), timeout_s=240):
    """A command of the README in the clone, its programs those of the clone's environment."""
    program = VENV / "bin" / words[0]
    command = [program if program.exists() else words[0], *words[1:], *more]
    done = run_command(command, timeout_s, cwd=clone, env={"VENV": str(VENV), "RANKS": "2"})
    assert done.returncode == 0, f"{words}: {done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(clone):
    said = run(clone, command("make demo"))
    remove_shared_buffers([int(re.search(r"--master_port=(\d+)", said)[1])])
    return said


@pytest.fixture(scope="module")
def own(clone, demo):  # noqa: ARG001 (the tiny model is the demo's)
    """The run on ten clips of one's own; its folder."""
    from cogds.data.video.drawn import draw_clips

    clips = clone / "clips"
    for seed in (0, 1):
        draw_clips(clips / str(seed), seed)
    for path in sorted(clips.rglob("*.png")):
        path.unlink()
        path.with_suffix(".txt").unlink()
    for path in sorted(clips.rglob("*.mp4"))[NUM_CLIPS:]:
        path.unlink()
        path.with_suffix(".txt").unlink()
    words = command("deepspeed launch/train.py")
    words[words.index("data.path=/data/clips")] = "data.path=clips"
    small = ["model.path=outputs/demo-model", "data.buckets=[17x64x96, 9x96x64]", "lora.rank=4", "train.num_steps=4",
             "eval.held_out=0.2"]  # fmt: skip
    said = run(clone, [words[0], "--master_port", free_port(), *words[1:]], small)
    trained, held_out = (int(re.search(what, said)[1]) for what in (r"(\d+) of 10 clips in", r"(\d+) clips? held out"))
    assert (trained > 0, held_out > 0, trained + held_out) == (True, True, NUM_CLIPS)
    return clone / "outputs/cogvideox1.5_i2v_lora"


def test_the_demo_ends_with_what_to_do_next(clone, demo):
    watch = re.findall(r"^watch: (tensorboard --logdir \S+)", demo, flags=re.M)[-1]
    (lora,) = re.findall(r"LoRA: (\S+)", demo)
    assert (clone / lora / "pytorch_lora_weights.safetensors").exists()
    program, *rest = watch.split()
    with tensorboard(VENV / "bin" / program, *rest, cwd=clone):
        pass


def test_ten_clips_of_ones_own_become_a_lora(own):
    assert (own / "lora/step-000004/pytorch_lora_weights.safetensors").exists()
    assert (own / "unusable.jsonl").read_text() == ""


def test_and_the_lora_makes_a_video(clone, own):
    Image.new("RGB", (120, 80), (200, 30, 30)).save(clone / "first.png")
    words = command("python launch/sample.py")
    words[words.index("--model") + 1] = "outputs/demo-model"
    words[words.index("--lora") + 1] = str(own.relative_to(clone) / "lora/step-000004")
    said = run(clone, words, ["--steps", "2"])
    assert "sample.mp4" in said
    assert (clone / "sample.mp4").stat().st_size > 0
