"""The model card says what training recorded, and its code runs as it stands."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from cogds.card import (
    find_sample,
    front_matter,
    hub_id,
    lora_facts,
    model_card,
    pipeline_factor,
    shareable,
    snippet,
    write_card,
)
from cogds.config.loading import load_config
from cogds.core.geometry import ClipShape
from cogds.distributed.world import World
from cogds.export import main
from cogds.model.load import find_model
from tests.model.lora.adapters import write_lora

FACTS = {
    "step": 500, "base_model": "zai-org/CogVideoX1.5-5B-I2V", "rank": 128, "alpha": 64.0, "targets": ["to_q", "to_k"],
    "image_latents": "pipeline", "image_latent_factor": 1.0, "fps": 16.0, "num_clips": 30, "learning_rate": 1e-4,
    "buckets": ["1x768x1360", "81x768x1360", "49x480x720"], "example_prompt": 'a "cat" | runs `fast`\nuphill',
    "instance_prompt": "in the style of: mine",
}  # fmt: skip


def test_the_front_matter_is_the_hubs():
    matter = yaml.safe_load(front_matter(FACTS, "diffusers", "sample.mp4").strip("-\n"))
    assert matter == {
        "base_model": "zai-org/CogVideoX1.5-5B-I2V",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": ["cogvideox", "image-to-video", "lora", "diffusers"],
        "instance_prompt": "in the style of: mine",
        "widget": [{"text": "a \"cat\" / runs 'fast' uphill", "output": {"url": "sample.mp4"}}],
    }
    assert "base_model" not in yaml.safe_load(front_matter({"base_model": "/models/mine"}, "diffusers").strip("-\n"))


def test_the_settings_are_a_table():
    card = model_card("mine", FACTS, "diffusers", "me/mine", sample="../a.mp4")
    for row in ("| Rank, alpha | 128, 64 |", "| Layers | to_q, to_k |", "| Clips | 30 |", "| Frame rate | 16 |"):
        assert row in card
    assert '<video controls loop src="../a.mp4">' in card
    assert "None" not in card
    assert "Image latents\n" not in card  # nothing to know of it
    assert "num_frames=81" in card
    assert "Nothing is known of it" in model_card("theirs", {}, "diffusers", "lora")


def test_a_prompt_cannot_leave_the_code():
    facts = {**FACTS, "example_prompt": 'x"); import os; os.abort()  #\n```\n'}
    code = snippet(facts, "diffusers", "me/mine")
    compile(code, "card", "exec")
    assert "`" not in code
    assert sum(line.lstrip().startswith("prompt=") for line in code.splitlines()) == 1
    assert json.loads(re.search(r"prompt=(.*),\n", code)[1]).startswith('x"); import os')


def test_what_each_format_is_told():
    scaled = {**FACTS, "image_latents": "scaled", "image_latent_factor": 0.49, "comfyui_strength": 1.0}
    assert "image_latents * 0.49" in model_card("m", scaled, "diffusers", "m")
    assert "image_latents *" not in model_card("m", scaled, "merged", "m")  # it is within the weights
    wrapper = model_card("m", {**FACTS, "comfyui_strength": 1 / 0.49}, "comfyui-wrapper", "m", "m.safetensors")
    assert "set it to 2.04" in wrapper
    assert "`m.safetensors`" in wrapper
    assert "```python" not in wrapper


def test_what_a_run_records_is_what_the_card_shows(tiny_model):
    cfg, _ = load_config(None, [
        f"model.path={tiny_model}", "data.path=unused", "lora.rank=4", "lora.alpha=6", "optimizer.lr=3e-4",
        "conditioning.image_latents=scaled", "data.default_caption=in my style",
        "sample.prompts=[{prompt: a cat, image: a.png}]",
    ])  # fmt: skip
    run = SimpleNamespace(
        cfg=cfg, model=find_model(str(tiny_model)), buckets=(ClipShape.parse("9x64x96"),),
        data=SimpleNamespace(index=range(7)), world=World(0, 2, 0, 2),
        plan=SimpleNamespace(local_batch_sizes=(1,), accumulation=1),
    )  # fmt: skip
    facts = json.loads(json.dumps(lora_facts(run, 500)))
    assert facts["image_latent_factor"] == pytest.approx(0.49)
    card = model_card("mine", facts, "diffusers", "mine")
    for text in (
        "| Steps | 500 |", "| Rank, alpha | 4, 6 |", "| Clips | 7 |", "| Clips a step | 2 |", "| 0.0003 |",
        "*in my style*",
        'prompt="a cat"', "image_latents * 0.4", "| Image latents | scaled |", "height=64",
    ):  # fmt: skip
        assert text in card


def test_a_card_that_cannot_be_made_costs_nothing_else(tmp_path, capsys):
    write_card(tmp_path, tmp_path / "run/lora/step-000001", {"buckets": [object()]})
    assert not (tmp_path / "README.md").exists()
    assert "warning: " in capsys.readouterr().err


def test_a_shared_one_names_no_folder_of_this_machine():
    facts = {"base_model": "/home/me/models/cog", "init_from": "/home/me/lora.safetensors", "rank": 4, "seed": 0}
    assert shareable(facts) == {"base_model": "cog", "init_from": "lora.safetensors", "rank": 4, "seed": 0}
    assert shareable({"base_model": "zai-org/cog", "init_from": None}) == {
        "base_model": "zai-org/cog",
        "init_from": None,
    }


@pytest.mark.parametrize(
    "inverted, expected", [(True, {"pipeline": 1, "scaled": 0.49, "unscaled": 0.7}),
                           (False, {"pipeline": 1, "scaled": 1, "unscaled": 1 / 0.7})],
)  # fmt: skip
def test_the_factor_is_on_what_the_pipeline_does(inverted, expected):
    config = {"scaling_factor": 0.7, "invert_scale_latents": inverted}
    assert {name: pipeline_factor(config, name) for name in expected} == pytest.approx(expected)


def test_the_runs_own_video_is_linked(tmp_path):
    lora, video = tmp_path / "run/lora/step-000500", tmp_path / "run/samples/step-000500/0.mp4"
    for path in (lora, video.parent):
        path.mkdir(parents=True)
    assert find_sample(lora) is None
    write_card(lora, lora, FACTS)
    assert "<video" not in (lora / "README.md").read_text()
    video.touch()
    (lora / "pytorch_lora_weights.safetensors").touch()
    assert find_sample(lora) == find_sample(lora / "pytorch_lora_weights.safetensors") == video
    write_card(lora, lora, FACTS)
    assert (lora / re.search('src="(.*?)"', (lora / "README.md").read_text())[1]).resolve() == video.resolve()


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("me/mine") == "me/mine"
    (tmp_path / "me/mine").mkdir(parents=True)
    assert hub_id("me/mine") is None
    assert hub_id("/models/mine") is None


@pytest.mark.parametrize("kind, convention", [("diffusers", "pipeline"), ("diffusers", "scaled"), ("merged", "scaled")])
def test_the_cards_code_makes_a_video(tiny_model, tmp_path, monkeypatch, kind, convention):
    """As a reader runs it, on the tiny model: the code block of an exported folder's card."""
    lora = write_lora(tiny_model, tmp_path / "lora", metadata={
        "image_latents": convention, "buckets": ["9x64x96"], "fps": 8.0, "base_model": str(tiny_model),
    })  # fmt: skip
    main([str(lora), "--to", kind, "--output", str(tmp_path / "out")])
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), flags=re.S)
    names = {}
    torch.manual_seed(0)
    exec(compile(code.replace("frames = pipe(", "frames = pipe(num_inference_steps=1,"), "card", "exec"), names)
    assert len(names["frames"]) == 9
    assert names["frames"][0].size == (96, 64)
    assert (tmp_path / "video.mp4").stat().st_size > 0
    scaled = names["pipe"].prepare_latents is names.get("prepare_latents", ...)
    assert scaled is (convention == "scaled" and kind == "diffusers")
