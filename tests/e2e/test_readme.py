"""Every command of README and quick start, run as it stands, but for the model, the clips and the size of the run."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from cogds.metrics.jsonl import step_lines
from tests.board import tensorboard
from tests.conftest import free_port, run_command
from tests.readme import QUICKSTART, README, ROOT, command, commands

pytestmark = [pytest.mark.dist, pytest.mark.slow]
BIN = Path(sys.executable).parent

# Which test runs a command that starts like this; .ci/run runs the make targets (and `install` runs pip).
RUN_BY = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "pip install -e .": "Makefile",
    "deepspeed launch/train.py": "here",
    "sbatch ": "tests/cluster/test_slurm.py",
    "python launch/report.py": "here",
    "tensorboard ": "here",
    "python launch/sample.py": "here",
}
RUN_BY_OF_QUICKSTART = {
    "pip install -e .": "Makefile",
    "hf download": "nobody",  # 31 GB
    "python launch/report.py": "here",
    "python launch/train.py": "here",
    "deepspeed --num_gpus 8": "here",
    "deepspeed --hostfile": "tests/cluster/test_two_nodes.py",
    "srun ": "tests/cluster/test_two_nodes.py",
    "sbatch ": "tests/cluster/test_slurm.py",
    "deepspeed launch/preflight.py": "here",
    "deepspeed launch/encode.py": "here",
    "tensorboard ": "here",
    "python launch/sample.py": "here",
}


@pytest.mark.parametrize("file, run_by", [(README, RUN_BY), (QUICKSTART, RUN_BY_OF_QUICKSTART)])
def test_no_command_is_left_out(file, run_by):
    unclaimed = [line for line in commands(file) if not any(line.startswith(start) for start in run_by)]
    assert unclaimed == []
    assert all(command(start, file) for start in run_by)
    for start, where in run_by.items():
        if where not in ("here", "nobody"):
            text = (ROOT / where).read_text()
            assert start in text or start.removeprefix("pip ").split(" -e")[0] in text


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, tiny_model):
    """What makes the real run small: appended to the README's command, where the last word wins."""
    from cogds.data.video.drawn import draw_clips

    folder = tmp_path_factory.mktemp("readme")
    draw_clips(folder / "clips")
    return [
        f"model.path={tiny_model}",
        f"data.path={folder / 'clips'}",
        f"data.cache_dir={folder / 'cache'}",
        "data.buckets=[17x64x96, 9x96x64, 1x64x64]",
        f"output_dir={folder / 'run'}",
        "train.num_steps=2",
        "lora.rank=4",
    ]


@pytest.fixture(scope="module")
def finished(overrides):
    """Folder of the run that the first command made."""
    words = command("deepspeed launch/train.py")
    done = run_command([BIN / words[0], "--master_port", free_port(), *words[1:], *overrides], 240)
    assert done.returncode == 0, done.stdout[-4000:]
    return Path(overrides[4].partition("=")[2])


def test_all_gpus(finished):
    assert (finished / "lora/step-000002/pytorch_lora_weights.safetensors").exists()


def test_one_gpu(overrides, tmp_path):
    words = command("python launch/train.py", QUICKSTART)
    done = run_command([sys.executable, *words[1:], *overrides, f"output_dir={tmp_path}"], 240)
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "lora/step-000002/pytorch_lora_weights.safetensors").exists()


def test_eight_gpus_which_are_two_ranks_here(overrides, tmp_path):
    words = command("deepspeed --num_gpus 8", QUICKSTART)
    words[words.index("8")] = "2"
    done = run_command(
        [BIN / words[0], "--master_port", free_port(), *words[1:], *overrides, f"output_dir={tmp_path}"], 240
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(step_lines((tmp_path / "metrics.jsonl").read_text())) == 2


def test_report(overrides, tmp_path):
    words = command("python launch/report.py")
    words[words.index("--html") + 1] = str(tmp_path / "report.html")
    done = run_command([sys.executable, *words[1:], *overrides, "data.max_unusable=1"], 120)
    assert done.returncode == 0, done.stdout
    assert "17x64x96" in done.stdout
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_preflight(overrides):
    words = command("deepspeed launch/preflight.py", QUICKSTART)
    done = run_command([BIN / words[0], "--master_port", free_port(), *words[1:], *overrides], 240)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "ready: 1 rank" in done.stdout


def test_encode(overrides, finished):  # noqa: ARG001 (what it made is there)
    words = command("deepspeed launch/encode.py", QUICKSTART)
    done = run_command([BIN / words[0], "--master_port", free_port(), *words[1:], *overrides], 240)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "7 clips encoded" in done.stdout


def test_tensorboard_serves_the_run(finished):
    words = command("tensorboard")
    words[words.index("--logdir") + 1] = str(finished / "tensorboard")
    with tensorboard(BIN / words[0], *words[1:]):
        pass


def test_sample(finished, tiny_model, tmp_path):
    Image.new("RGB", (120, 80), (200, 30, 30)).save(tmp_path / "first.png")
    words = command("python launch/sample.py")
    for name, value in (
        ("--model", tiny_model),
        ("--lora", finished / "lora/step-000002"),
        ("--image", tmp_path / "first.png"),
        ("--output", tmp_path / "sample.mp4"),
    ):
        words[words.index(name) + 1] = str(value)
    done = run_command([sys.executable, *words[1:], "--size", "9x64x96", "--steps", "2"], 120)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "sample.mp4").stat().st_size > 0
