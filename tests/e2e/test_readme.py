"""Every command of the README and the quick start runs as written, except for model, clips and the size of the run."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from cogds.metrics.jsonl import step_lines
from tests.board import tensorboard
from tests.conftest import free_port, run_command
from tests.readme import QUICKSTART, README, ROOT, command, commands, with_programs

pytestmark = [pytest.mark.dist, pytest.mark.slow]

# Start of a command -> the file that runs it.
RUN_BY = {
    "make demo": "tests/e2e/test_newcomer.py",
    "make test": ".ci/run",
    "pip install -e .": "Makefile",
    "cogds report": "here",
    "deepspeed launch/train.py": "here",
    "sbatch ": "tests/cluster/test_slurm.py",
    "tensorboard ": "here",
    "cogds sample": "here",
}
RUN_BY_OF_QUICKSTART = {
    "pip install -e .": "Makefile",
    "hf download": "nobody",  # 31 GB
    "cogds init": "tests/test_init.py",
    "cogds report": "here",
    "cogds train": "here",
    "deepspeed --num_gpus 8": "here",
    "deepspeed --hostfile": "tests/cluster/test_two_nodes.py",
    "srun ": "tests/cluster/test_two_nodes.py",
    "sbatch ": "tests/cluster/test_slurm.py",
    "deepspeed launch/preflight.py": "here",
    "deepspeed launch/encode.py": "here",
    "tensorboard ": "here",
    "cogds sample": "here",
}


@pytest.mark.parametrize("file, run_by", [(README, RUN_BY), (QUICKSTART, RUN_BY_OF_QUICKSTART)])
def test_every_command_is_run_by_a_test(file, run_by):
    unclaimed = [line for line in commands(file) if not any(line.startswith(start) for start in run_by)]
    assert unclaimed == []
    assert all(command(start, file) for start in run_by)
    for start, where in run_by.items():
        if where not in ("here", "nobody"):
            text = (ROOT / where).read_text()
            assert start in text or start.removeprefix("pip ").split(" -e")[0] in text


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, tiny_model):
    """Overrides that make the real run small. They are appended to a command, and the last value of a key wins."""
    from tests.drawn import draw_clips

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


def run(words, more, timeout_s=240):
    """Run a command with more arguments, and return its output."""
    words = with_programs(words)
    if Path(words[0]).name == "deepspeed":
        words[1:1] = ["--master_port", free_port()]
    done = run_command([*words, *more], timeout_s)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(overrides):
    """The output folder of the README's run."""
    run(command("deepspeed launch/train.py"), overrides)
    return Path(overrides[4].partition("=")[2])


def test_all_gpus(finished):
    assert (finished / "lora/step-000002/pytorch_lora_weights.safetensors").exists()


def test_one_gpu(overrides, tmp_path):
    run(command("cogds train", QUICKSTART), [*overrides, f"output_dir={tmp_path}"])
    assert (tmp_path / "lora/step-000002/pytorch_lora_weights.safetensors").exists()


def test_eight_gpus_as_two_ranks(overrides, tmp_path):
    words = command("deepspeed --num_gpus 8", QUICKSTART)
    words[words.index("8")] = "2"
    run(words, [*overrides, f"output_dir={tmp_path}"])
    assert len(step_lines((tmp_path / "metrics.jsonl").read_text())) == 2


@pytest.mark.parametrize("file", [README, QUICKSTART])
def test_report(file, overrides, tmp_path):
    words = command("cogds report", file)
    words[words.index("--html") + 1] = str(tmp_path / "report.html")
    assert "17x64x96" in run(words, [*overrides, "data.max_unusable=1"], 120)
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_preflight(overrides):
    assert "ready: 1 rank" in run(command("deepspeed launch/preflight.py", QUICKSTART), overrides)


def test_encode(overrides, finished):  # noqa: ARG001 (its run has encoded the clips)
    assert "7 clips encoded" in run(command("deepspeed launch/encode.py", QUICKSTART), overrides)


def test_tensorboard_serves_the_run(finished):
    words = command("tensorboard")
    words[words.index("--logdir") + 1] = str(finished / "tensorboard")
    with tensorboard(Path(sys.executable).parent / words[0], *words[1:]):
        pass


@pytest.mark.parametrize("file", [README, QUICKSTART])
def test_sample(file, finished, tiny_model, tmp_path):
    Image.new("RGB", (120, 80), (200, 30, 30)).save(tmp_path / "first.png")
    words = command("cogds sample", file)
    for name, value in (
        ("--model", tiny_model),
        ("--lora", finished / "lora/step-000002"),
        ("--image", tmp_path / "first.png"),
        ("--output", tmp_path / "sample.mp4"),
    ):
        words[words.index(name) + 1] = str(value)
    run(words, ["--size", "9x64x96", "--steps", "2"], 120)
    assert (tmp_path / "sample.mp4").stat().st_size > 0
