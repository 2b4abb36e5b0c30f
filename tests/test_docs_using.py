"""The commands in docs/using-the-lora.md run, or at least parse, as written."""

import runpy
import shlex
import sys

import pytest
from PIL import Image

import cogds.export
from cogds.arguments import EXPORT_FORMATS, find_config, parse_args
from cogds.cli import call
from cogds.config.loading import load_config
from tests.conftest import ROOT
from tests.model.lora.adapters import write_lora
from tests.readme import commands

COMMANDS = [shlex.split(line) for line in commands("docs/using-the-lora.md")]


def arguments_of(*program):
    """Return the arguments of each command that runs this program."""
    return [words[len(program) :] for words in COMMANDS if tuple(words[: len(program)]) == program]


def test_every_command_is_run_by_a_test():
    assert {tuple(words[:2]) for words in COMMANDS} == {
        ("cogds", "sample"), ("cogds", "export"), ("cogds", "probe"), ("python", "examples/generate.py")
    }  # fmt: skip


@pytest.fixture
def folder(comfyui_model, tmp_path, monkeypatch):
    """The working directory, with the page's LoRAs, which belong to the tiny model."""
    metadata = {"image_latents": "scaled", "image_latent_factor": 0.49, "fps": 8.0, "base_model": str(comfyui_model)}
    metadata["buckets"] = ["9x96x64", "1x64x96", "9x64x96", "9x64x64"]
    for run in ("cogvideox1.5_i2v_lora/lora/step-001000", "another_run/lora/step-002000"):
        write_lora(comfyui_model, tmp_path / "outputs" / run, metadata=metadata)
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_exports(folder, monkeypatch):
    monkeypatch.setattr(cogds.export, "check_repository", lambda *_: None)
    monkeypatch.setattr(cogds.export, "upload_folder", lambda *_: "the hub")
    exports = arguments_of("cogds", "export")
    assert len(exports) == 8
    assert {words[words.index("--to") + 1] for words in exports} == set(EXPORT_FORMATS)
    for words in exports:
        call("export", words)
        assert (folder / words[words.index("--output") + 1] / "README.md").is_file()
    assert (folder / "exports/my_style/my_style.safetensors").is_file()
    assert (folder / "exports/my_model/model_index.json").is_file()
    assert (folder / "exports/my_comfyui_model/my_comfyui_model.safetensors").is_file()


def test_the_example_makes_a_video(folder, comfyui_model, monkeypatch, capsys):
    ((*words,),) = arguments_of("python", "examples/generate.py")
    small = ["--model", str(comfyui_model), "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *words, *small])
    script = runpy.run_path(str(ROOT / "examples/generate.py"), run_name="__main__")
    # Of the sizes that the LoRA records, the one with the image's proportions.
    assert "9 frames of 64x96: video.mp4" in capsys.readouterr().out
    assert (folder / "video.mp4").stat().st_size > 0
    assert script["trained_with"](folder / words[words.index("--lora") + 1])["image_latent_factor"] == 0.49
    assert script["best_size"]([], Image.open(folder / "first.png")) == "81x768x1360"


def test_the_example_makes_a_video_from_text(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metadata = {"task": "text-to-video", "fps": 8.0, "buckets": ["1x64x96", "9x32x32", "9x32x48"]}
    lora = write_lora(family("2b"), tmp_path / "lora", metadata=metadata)
    words = ["--model", str(family("2b")), "--lora", str(lora), "--prompt", "a ball", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *words])
    runpy.run_path(str(ROOT / "examples/generate.py"), run_name="__main__")
    assert "9 frames of 32x48: video.mp4" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate.py", *words, "--image", "first.png"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples/generate.py"), run_name="__main__")
    assert "takes no --image" in capsys.readouterr().err


def test_the_other_commands_parse():
    for words in arguments_of("cogds", "sample"):
        parse_args("sample", words)
    ((*words,),) = arguments_of("cogds", "probe")
    args = parse_args("probe", words)
    cfg, _ = load_config([find_config(config, "run_configs", ".yaml") for config in args.config], args.overrides)
    assert cfg.data.path == "/data/clips"
