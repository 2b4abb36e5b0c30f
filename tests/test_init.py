"""`cogds init`: questions, flags, and a config that works."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from cogds import init
from cogds.arguments import RECIPES, USES, parse_args
from cogds.cli import main
from cogds.config.loading import load_config
from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.init import Answers, NewRun, ask, fit_memory, model_overrides, parse_memory
from tests.published_model import FULL, published_memory


def test_the_choices_are_those_of_the_flags():
    assert tuple(init.LEARN) == RECIPES
    assert tuple(init.USE) == tuple(init.IMAGE_LATENTS) == USES


def test_memory_is_a_size_or_a_gpu():
    assert parse_memory("24") == parse_memory("24 GB") == (24e9, None)
    assert parse_memory("RTX4090") == (24e9, "NVIDIA GeForce RTX 4090")
    for text in ("", "-1", "nan", "inf", "h1000"):
        with pytest.raises(UserError, match=rf"^--memory: .*{text}.*h100"):
            parse_memory(text)


def test_the_questions(monkeypatch):
    """An answer is a number, a name, or empty for the first choice; wrong ones are asked again."""
    asked, typed = [], iter(["9", "motion", "2", "h100"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(typed))
    assert ask(parse_args("init", ["clips"])) == Answers("motion", "comfyui", 80e9, "NVIDIA H100 80GB HBM3")
    assert ["learn" in asked[0], "'9'" in asked[1], "used" in asked[2], "Memory" in asked[3]] == [True] * 4
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert ask(parse_args("init", ["clips", "--memory=24"])) == Answers("style", "diffusers", 24e9, None)


@pytest.mark.parametrize("missing", ["--learn", "--use", "--memory"])
def test_without_a_terminal_the_missing_flag_is_named(missing, monkeypatch):
    flags = {"--learn": "style", "--use": "both", "--memory": "24"}
    words = [f"{name}={value}" for name, value in flags.items() if name != missing]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(UserError, match=rf"^{missing}: not given"):
        ask(parse_args("init", ["clips", *words]))


def test_the_memory_decides_what_is_changed(monkeypatch):
    """20 GB need fewer bits, and without an answer that fits, the run stays as it is."""

    def resolve(answers, overrides):
        changes = dict(word.split("=") for word in overrides)
        memory = published_memory(quantization=changes.get("model.quantization", "none"))
        mode = memory.least_checkpointing(FULL, 1, answers.gpu_bytes)
        fits = memory.estimate(FULL, 1, mode).fits(answers.gpu_bytes)
        largest = SimpleNamespace(shape=FULL, batch_size=1, shortfall="" if fits else "too much")
        return NewRun(SimpleNamespace(memory=memory, cfg=changes), SimpleNamespace(largest=largest))

    monkeypatch.setattr(init, "resolve", resolve)
    for gigabytes, expected in ((80, {}), (20, {"model.quantization": "int8"}), (2, {})):
        answers = Answers("style", "both", gigabytes * 1e9, None)
        assert fit_memory(resolve(answers, []), answers, []).cfg == expected


def test_a_1_0_model_gets_its_own_size_and_frame_rate(family):
    paths = {name: str(family(name)) for name in ("1.5-5b", "5b", "5b-i2v")}
    assert model_overrides(paths["1.5-5b"]) == [f"model.path={paths['1.5-5b']}"]
    for name in ("5b", "5b-i2v"):
        assert model_overrides(paths[name]) == [f"model.path={paths[name]}", "data.buckets=[17x64x96]", "data.fps=8"]


@pytest.mark.slow
def test_a_text_to_video_model_gets_no_keys_about_the_first_frame(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for number in range(2):
        Image.new("RGB", (96, 64), (60 * number, 0, 0)).save(tmp_path / f"clips/{number}.png")
        (tmp_path / f"clips/{number}.txt").write_text(f"red {number}")
    words = ["init", "clips", "--model", str(family("5b")), "--learn", "style", "--memory", "h100", "--use", "both"]
    assert main(words) == 0
    output, (cfg, explicit) = capsys.readouterr().out, load_config("run.yaml", [])
    assert "--image" not in output
    assert "comfyui-wrapper" in output
    assert cfg.data.fps == 8
    assert cfg.data.buckets == ("1x64x96",)
    assert not any(key.startswith("conditioning.image_") for key in explicit)


@pytest.mark.slow
def test_the_written_config_trains(tiny_model, tmp_path, run_train, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 96), (60 * number, 0, 0)).save(tmp_path / f"clips/{number}.png")
        (tmp_path / f"clips/{number}.txt").write_text(f"red {number}")
    words = ["init", "clips", "--model", str(tiny_model), "--learn", "style", "--memory", "h100"]
    assert main([*words, "--use", "comfyui", "--trigger", "ohwx"]) == 0
    output = capsys.readouterr().out
    assert "cogds train --config run.yaml" in output
    assert "--to comfyui --output" in output
    cfg, _ = load_config("run.yaml", [])
    assert (cfg.data.path, cfg.data.caption_prefix, cfg.eval.held_out) == ("clips", "ohwx", 0)
    assert cfg.conditioning.image_latents == "scaled"
    assert [ClipShape.parse(text).frames for text in cfg.data.buckets] == [1]
    assert len((tmp_path / "run.yaml").read_text().splitlines()) < 45
    assert f"    - {cfg.data.buckets[0]}  # 4 clips\n" in (tmp_path / "run.yaml").read_text()
    before = (tmp_path / "run.yaml").read_text()
    assert main([*words, "--use", "both"]) == 2  # the file is there
    assert (tmp_path / "run.yaml").read_text() == before
    assert main([*words, "--use", "both", "--output", "both.yaml"]) == 0
    assert "--to comfyui-merged --output" in capsys.readouterr().out
    assert load_config("both.yaml", [])[0].conditioning.image_latents == "pipeline"
    small = ["data.buckets=[1x64x48]", "train.num_steps=1", "lora.rank=4", "eval.every=null"]
    done = run_train("--config", "run.yaml", *small, launcher="warm", ranks=1, cwd=tmp_path)
    assert "step 1/1" in done.stdout
