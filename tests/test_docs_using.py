"""The commands of docs/using-the-lora.md run, or at least parse, as written."""

import re
import runpy
import shlex
import sys

import pytest
from PIL import Image

import cogds.export
import cogds.probe
import cogds.sample
from tests.conftest import ROOT
from tests.model.adapters import write_lora

PAGE = (ROOT / "docs/using-the-lora.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()
]


def starting(script):
    return [words[2:] for words in COMMANDS if words[:2] == ["python", script]]


def test_no_command_is_left_out():
    scripts = {words[1] for words in COMMANDS}
    assert scripts == {"launch/sample.py", "examples/generate.py", "launch/export.py", "launch/probe.py"}
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.fixture
def here(comfyui_model, tmp_path, monkeypatch):
    """A folder with the page's LoRAs, which belong to the tiny model."""
    metadata = {"image_latents": "scaled", "image_latent_factor": 0.49, "fps": 8.0, "base_model": str(comfyui_model)}
    for run in ("cogvideox1.5_i2v_lora/lora/step-001000", "another_run/lora/step-002000"):
        write_lora(comfyui_model, tmp_path / "outputs" / run, metadata=metadata)
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_exports(here, monkeypatch):
    monkeypatch.setattr(cogds.export, "check_repo", lambda *_: None)
    monkeypatch.setattr(cogds.export, "push", lambda *_: "the hub")
    commands = starting("launch/export.py")
    assert len(commands) == 8
    assert {words[words.index("--to") + 1] for words in commands} == set(cogds.export.FORMATS)
    for words in commands:
        cogds.export.main(words)
        assert (here / words[words.index("--output") + 1] / "README.md").is_file()
    assert (here / "exports/my_style/my_style.safetensors").is_file()
    assert (here / "exports/my_model/model_index.json").is_file()
    assert (here / "exports/my_comfyui_model/my_comfyui_model.safetensors").is_file()


def test_the_example_makes_a_video(here, comfyui_model, monkeypatch, capsys):
    ((*words,),) = starting("examples/generate.py")
    small = ["--model", str(comfyui_model), "--size", "9x64x96", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *words, *small])
    found = runpy.run_path(str(ROOT / "examples/generate.py"), run_name="__main__")
    assert "9 frames of 64x96: video.mp4" in capsys.readouterr().out
    assert (here / "video.mp4").stat().st_size > 0
    assert found["trained_with"](here / words[words.index("--lora") + 1])["image_latent_factor"] == 0.49


def test_the_others_are_understood():
    for words in starting("launch/sample.py"):
        cogds.sample._parser().parse_args(words)
    ((*words,),) = starting("launch/probe.py")
    args = cogds.probe.parse_args(words, "", cogds.probe._add_arguments)
    cfg, _ = cogds.probe.load_config(str(ROOT / args.config), args.overrides)
    assert cfg.data.path == "/data/clips"
