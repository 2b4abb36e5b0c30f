"""A newcomer who follows the README: clone, demo, TensorBoard, a run on ten clips, a video with its LoRA.

Every command is the README's, run in a fresh clone. Only the model (a tiny one), the clips and the length differ.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.board import tensorboard
from tests.conftest import ROOT, free_port, run_command
from tests.readme import README, command, with_programs

pytestmark = [pytest.mark.dist, pytest.mark.slow]
NUM_CLIPS = 10
VENV = Path(sys.prefix)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone that uses the environment of this checkout."""
    if not (VENV / ".installed").exists():
        pytest.skip(f"{VENV} was not created by `make install`: run `make test-slow`")
    folder = tmp_path_factory.mktemp("newcomer") / "cogds"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True, timeout=60)
    # With uncommitted changes.
    changed = subprocess.run(
        ["git", "ls-files", "-z", "--modified", "--others", "--exclude-standard"], cwd=ROOT, check=True,
        capture_output=True, text=True, timeout=60,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, changed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("setup.py", "constraints.txt"):
        os.utime(folder / name, (0, 0))  # otherwise make would install again
    return folder


def run(clone, words, more=(), timeout_s=600):
    """Run a command of the README in the clone, with the programs of the clone's environment; return its output."""
    command = [*with_programs(words, VENV / "bin"), *more]
    done = run_command(command, timeout_s, cwd=clone, env={"VENV": str(VENV), "RANKS": "2"})
    assert done.returncode == 0, f"{words}: {done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(clone):
    """The output of the demo."""
    return run(clone, command("make demo"), [f"DEMO_ARGS=--master-port {free_port()}"])


@pytest.fixture(scope="module")
def own(clone):
    """The output folder of a run on ten clips."""
    from tests.drawn import draw_clips

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
    small = ["model.path=builtin:shapes", "data.buckets=[17x48x64, 9x64x48]", "lora.rank=4", "train.num_steps=4",
             "eval.held_out=0.2"]  # fmt: skip
    output = run(clone, [words[0], "--master_port", free_port(), *words[1:]], small)
    trained, held_out = (
        int(re.search(pattern, output)[1]) for pattern in (r"(\d+) of 10 clips in", r"(\d+) clips? held out")
    )
    assert (trained > 0, held_out > 0, trained + held_out) == (True, True, NUM_CLIPS)
    return clone / "outputs/cogvideox1.5_i2v_lora"


def test_the_demo_prints_the_lora_and_how_to_watch(clone, demo):
    watch = re.findall(r"^watch: \S*(tensorboard --logdir \S+)", demo, flags=re.M)[-1]
    (lora,) = re.findall(r"LoRA: (\S+)", demo)
    assert (clone / lora / "pytorch_lora_weights.safetensors").exists()
    program, *rest = watch.split()
    with tensorboard(VENV / "bin" / program, *rest, cwd=clone):
        pass


def test_the_readme_shows_what_the_demo_prints(demo):
    """Except for speeds and losses, which depend on the machine."""

    def shape(line):
        line = re.sub(r" \S*/(tensorboard|cogds) ", r" \1 ", line)  # with its folder, if that is not on PATH
        return re.sub(r"\bms/", "s/", re.sub(r"\d[\d.,:]*", "#", line))

    (shown,) = re.findall(r"[Ii]t prints.*?```text\n(.*?)```", (ROOT / README).read_text(), flags=re.S)
    assert set(map(shape, shown.splitlines())) <= set(map(shape, demo.splitlines()))


def test_the_demo_teaches_the_motion_and_shows_it(clone, demo):
    before, after = map(int, re.findall(r"seen in (\d+)% of .* training, (\d+)% after", demo)[0])
    assert before <= 20
    assert after >= 60
    (picture,) = re.findall(r"^look: (\S+)", demo, flags=re.M)
    with Image.open(clone / picture) as image:
        assert image.width > 1000
    words = shlex.split(re.findall(r"^next: (\S*cogds sample .*)", demo, flags=re.M)[-1])
    assert words[-4:] == ["--steps", "25", "--guidance", "1"]
    assert "demo.mp4" in run(clone, ["cogds", *words[1:]], ["--output", "demo.mp4"])


def test_ten_clips_become_a_lora(own):
    assert (own / "lora/step-000004/pytorch_lora_weights.safetensors").exists()
    assert (own / "unusable.jsonl").read_text() == ""


def test_the_lora_makes_a_video(clone, own):
    Image.new("RGB", (120, 80), (200, 30, 30)).save(clone / "first.png")
    words = command("cogds sample")
    words[words.index("--model") + 1] = "builtin:shapes"
    words[words.index("--lora") + 1] = str(own.relative_to(clone) / "lora/step-000004")
    assert "sample.mp4" in run(clone, words, ["--steps", "2"])
    assert (clone / "sample.mp4").stat().st_size > 0
