"""A short run of the demo's config under all launchers, and a video from its LoRA."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from cogds.metrics.tensorboard import COPIES
from tests.board import event_folder
from tests.conftest import ROOT, free_port, run_command
from tests.dist.conftest import losses, metrics, notes

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SHORT = ["--config", "launch/configs/demo.yaml", "train.num_steps=12", "checkpoint.every=6", "eval.every=6"]
LORA = "lora/step-000012/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a checkout in which the run was made, and its output."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    deepspeed = [Path(sys.executable).parent / "deepspeed", "--master_port", free_port()]
    command = "--num_gpus 2 launch/train.py --deepspeed ds_configs/zero2.json"
    done = run_command([*deepspeed, *command.split(), *SHORT], 240, cwd=folder)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def torchrun(demo, run_train):
    folder, _ = demo
    words = ["--deepspeed", "ds_configs/zero2.json", *SHORT, "output_dir=outputs/torchrun"]
    run_train(*words, launcher="torchrun", cwd=folder)
    return folder / "outputs/torchrun"


def test_it_prints_where_its_lora_is_and_how_to_watch(demo):
    _, output = demo
    lines = output.splitlines()
    assert "LoRA: outputs/demo/lora/step-000012" in lines
    (watch,) = [line for line in lines if line.startswith("watch: ")]
    assert watch.endswith("tensorboard --logdir outputs/demo/tensorboard")  # with its folder, if that is not on PATH


def test_the_output_tree(demo):
    run = demo[0] / "outputs/demo"
    assert {path.name for path in run.iterdir()} == {
        "run.yaml", "ds_config.json", "metrics.jsonl", "unusable.jsonl", "tensorboard", "lora", "checkpoints",
        "run.lock",
    }  # fmt: skip
    assert {path.name for path in (run / "lora").iterdir()} == {"step-000006", "step-000012"}
    assert load_file(run / LORA)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-000006", "step-000012", "latest",
    }  # fmt: skip
    assert (run / "checkpoints/latest").read_text().strip() == "step-000012"
    assert (run / "unusable.jsonl").read_text() == ""
    assert "auto" not in (run / "ds_config.json").read_text()
    assert json.loads((run / "ds_config.json").read_text())["train_batch_size"] == 8


def test_the_saved_run_config_loads(demo):
    from cogds.config.loading import load_config

    cfg, _ = load_config(str(demo[0] / "outputs/demo/run.yaml"), [])
    assert cfg.train.num_steps == 12
    assert cfg.data.path == "outputs/shapes-clips"


def test_tensorboard_has_the_scalars_of_metrics_jsonl(demo):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = demo[0] / "outputs/demo"
    events = EventAccumulator(str(event_folder(run)))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(run))
    lines = [*metrics(run), *notes(run)]
    names = {name for line in lines for name in line} - {"step"}
    assert set(events.Tags()["scalars"]) == names | {COPIES[name] for name in names & COPIES.keys()}
    for name in ("checkpoint/pause_s", "checkpoint/write_s"):  # also those of the last save
        assert [event.step for event in events.Scalars(name)][-1] == 12
    assert {"config/run/text_summary", "config/deepspeed/text_summary"} <= set(events.Tags()["tensors"])


def test_torchrun_trains_the_same_bits(demo, torchrun):
    run = demo[0] / "outputs/demo"
    assert len(losses(torchrun)) == 12
    assert losses(torchrun) == losses(run)
    expected, tensors = load_file(run / LORA), load_file(torchrun / LORA)
    assert expected.keys() == tensors.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in tensors.items())


def test_python_alone_is_one_process(demo, run_train):
    """Without --deepspeed, and with half the clips per step."""
    folder, _ = demo
    run_train(*SHORT, "output_dir=outputs/python", "train.num_steps=3", launcher="python", cwd=folder)
    assert len(losses(folder / "outputs/python")) == 3
    assert json.loads((folder / "outputs/python/ds_config.json").read_text())["train_batch_size"] == 4


def kill_deepspeed(process):
    process.terminate()
    assert process.wait(30) != 0


def signal_the_ranks(process):
    """Send the signal as docs/operations.md says, but only to the processes of this run."""
    (words,) = re.findall(r"`pkill (-USR1 -f .*?)`", (ROOT / "docs/operations.md").read_text())
    subprocess.run(["pkill", "--session", str(process.pid), *shlex.split(words)], check=True)


@pytest.mark.parametrize("stop", [kill_deepspeed, signal_the_ranks])
def test_a_stopped_run_is_saved_and_leaves_no_process(demo, stop):
    folder, _ = demo
    run = folder / f"outputs/{stop.__name__}"
    words = f"--num_gpus 2 --master_port {free_port()} launch/train.py --deepspeed ds_configs/zero2.json"
    more = f"{' '.join(SHORT)} output_dir={run} train.num_steps=100000 eval.every=null metrics.every=1"
    process = subprocess.Popen(
        [Path(sys.executable).parent / "deepspeed", *words.split(), *more.split()],
        cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3)
        stop(process)
        until(lambda: not session(process.pid))
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert (run / "checkpoints/latest").read_text().strip() == f"step-{len(metrics(run)):06d}"


def session(leader):
    """Return the running processes of a session."""
    listing = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(leader)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in listing.stdout.splitlines() if "Z" not in line.split()[1]]


def until(condition, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_second_run_does_not_create_the_demo_files_again(demo, torchrun):
    files = [path for parent in sorted((demo[0] / "outputs").glob("shapes-*")) for path in parent.rglob("*")]
    assert len([path for path in files if path.suffix == ".mp4"]) == 12
    started = (torchrun / "run.yaml").stat().st_mtime
    # The manifest and the list of unusable clips are written at every start.
    kept = [path for path in files if path.is_file() and not path.name.endswith((".parquet", ".unusable.jsonl"))]
    assert [path for path in kept if path.stat().st_mtime > started] == []
    assert [path for path in files if ".tmp" in path.name] == []


def test_sample_writes_a_video_of_the_requested_size(demo):
    import av

    folder, _ = demo
    image = folder / "first.png"
    Image.new("RGB", (96, 96), (200, 30, 30)).save(image)
    done = run_command(
        [
            sys.executable, "launch/sample.py",
            "--model", "builtin:shapes", "--lora", "outputs/demo/lora/step-000012",
            "--image", image, "--prompt", "a red disc bounces", "--size", "9x48x64", "--steps", "2",
            "--output", "made/sample.mp4",
        ],
        120,
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "made/sample.mp4" in done.stdout
    with av.open(str(folder / "made/sample.mp4")) as container:
        frames = [(frame.width, frame.height) for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert frames == [(64, 48)] * 9
