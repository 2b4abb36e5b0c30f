"""examples/first_lora.ipynb: stored without outputs, its commands and settings are valid, and all of it runs."""

import re
import shlex
import sys

import imageio_ffmpeg
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from cogds.arguments import parse_args
from cogds.config.loading import load_config
from tests.conftest import ROOT

FILE = ROOT / "examples/first_lora.ipynb"
CELL_TIMEOUT_S = 1200

# Loaded by every Python process of the notebook: whatever leaves this machine is refused and written down.
NO_NETWORK = """
import sys

def refuse(event, arguments):
    host = None
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", b"localhost", b"127.0.0.1"):
        with open(FILE, "a") as file:
            file.write(f"{event} {host}\\n")
        raise OSError(f"no network: {host}")

sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(FILE, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def commands(notebook):
    """Return the words of every command of cogds, without `cogds`."""
    shells = [cell.source.partition("\n")[2] for cell in code(notebook) if cell.source.startswith("%%bash")]
    lines = "\n".join(shells).replace("\\\n", "").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("cogds ")]


def test_the_outputs_are_stripped(notebook):
    for cell in code(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


def test_its_commands_and_settings_are_valid(notebook, tmp_path):
    (settings,) = (cell.source for cell in code(notebook) if cell.source.startswith("%%writefile outputs/run.yaml\n"))
    (tmp_path / "run.yaml").write_text(settings.partition("\n")[2])
    cfg, _ = load_config(str(tmp_path / "run.yaml"), [])
    assert cfg.model.path == "builtin:shapes"
    for verb, *arguments in commands(notebook):
        args = parse_args(verb, arguments, "")
        assert getattr(args, "config", None) in (["outputs/run.yaml"], None)
    assert [words[0] for words in commands(notebook)] == ["report", "train", "sample"]
    # The LoRA that the last two sections read is the one that training wrote.
    names = {name for cell in code(notebook) for name in re.findall(r"[\w/]+/lora/[\w-]+", cell.source)}
    assert names == {f"{cfg.output_dir}/lora/step-{cfg.train.num_steps:06d}"}


def decode(path):
    """Decode a video with ffmpeg's own program: float32 [F, H, W, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return np.stack(frames).astype(np.float32)


def psnr(first, second):
    return 10 * np.log10(255**2 / np.square(first - second).mean())


@pytest.mark.slow
def test_it_goes_from_clips_to_a_better_video_without_network(notebook, tmp_path, monkeypatch):
    from cogds.shapes.clips import to_uint8, unseen_scenes
    from cogds.shapes.world import SIZES

    programs, hooks, home, requests = (tmp_path / name for name in ("bin", "hooks", "home", "requests.txt"))
    for folder in (programs, hooks, home):
        folder.mkdir()
    (hooks / "sitecustomize.py").write_text(NO_NETWORK.replace("FILE", repr(str(requests))))
    # The command of an installed cogds, if it is not installed here.
    (programs / "cogds").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cogds "$@"\n')
    (programs / "cogds").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("PYTHONPATH", f"{hooks}:{ROOT}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # In a copy: outputs are written to the cells.
    copy = nbformat.from_dict(notebook)
    client = NotebookClient(copy, timeout=CELL_TIMEOUT_S, resources={"metadata": {"path": str(tmp_path)}})
    try:
        client.execute()
    finally:
        nbformat.write(copy, tmp_path / "executed.ipynb")

    assert not requests.exists(), requests.read_text()
    outputs = [output for cell in code(copy) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert sum("<video" in output.get("data", {}).get("text/html", "") for output in outputs) == 3

    folder = tmp_path / "outputs"
    real = to_uint8(unseen_scenes(1, SIZES[:1], ["bounce"])[0].draw()).astype(np.float32)
    without, with_lora = (decode(path) for path in sorted((folder / "videos").glob("*-scale?.mp4")))
    by_diffusers = decode(folder / "diffusers.mp4")
    quality = {
        "without the LoRA": psnr(without, real),
        "with the LoRA": psnr(with_lora, real),
        "by diffusers": psnr(by_diffusers, real),
        "cogds and diffusers": psnr(with_lora, by_diffusers),
    }
    print(quality)
    assert min(quality["with the LoRA"], quality["by diffusers"]) > quality["without the LoRA"] + 2
    assert quality["cogds and diffusers"] > 30
