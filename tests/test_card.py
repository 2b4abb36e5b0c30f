"""The model card shows the settings of the training, and its code runs."""

import json
import re
from types import SimpleNamespace
from unittest.mock import Mock

import diffusers.utils
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from huggingface_hub import ModelCard
from PIL import Image

import cogds.export
from cogds.arguments import EXPORT_FORMATS, parse_args
from cogds.card import (
    find_sample,
    front_matter,
    hub_id,
    model_card,
    pipeline_factor,
    shareable,
    snippet,
    write_card,
)
from cogds.config.loading import load_config
from cogds.core.condition_modes import MODES, ConditionSettings
from cogds.core.geometry import ClipShape
from cogds.distributed.world import World
from cogds.model.conditioned_pipeline import ConditionedPipeline
from cogds.model.control import add_control, control_of
from cogds.model.load import find_model
from cogds.model.lora.file import read_loras
from cogds.train.metadata import export_metadata
from tests.model.lora.adapters import base_transformer, write_lora

METADATA = {
    "step": 500, "base_model": "zai-org/CogVideoX1.5-5B-I2V", "rank": 128, "alpha": 64.0, "targets": ["to_q", "to_k"],
    "image_latents": "pipeline", "image_latent_factor": 1.0, "fps": 16.0, "num_clips": 30, "learning_rate": 1e-4,
    "buckets": ["1x768x1360", "81x768x1360", "49x480x720"], "example_prompt": 'a "cat" | runs `fast`\nuphill',
    "instance_prompt": "in the style of: mine",
}  # fmt: skip


def export(argv, api=None):
    cogds.export.main(parse_args("export", argv), api)


def parse_front_matter(*arguments):
    """Parse the front matter with the hub's own parser, which raises for invalid metadata."""
    return ModelCard(front_matter(*arguments) + "\n", ignore_metadata_errors=False).data


def test_the_front_matter_is_valid_for_the_hub():
    assert parse_front_matter(METADATA, "diffusers", "sample.mp4").to_dict() == {
        "license": "other",
        "license_name": "cogvideox-license",
        "license_link": "https://huggingface.co/zai-org/CogVideoX1.5-5B-I2V/blob/main/LICENSE",
        "base_model": "zai-org/CogVideoX1.5-5B-I2V",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": ["cogvideox", "image-to-video", "lora", "diffusers"],
        "instance_prompt": "in the style of: mine",
        "widget": [{"text": "a \"cat\" / runs 'fast' uphill", "output": {"url": "sample.mp4"}}],
    }
    local = parse_front_matter({"base_model": "/models/mine"}, "diffusers").to_dict()
    assert local["license"] == "other"
    assert not {"base_model", "license_name", "license_link"} & local.keys()
    small = parse_front_matter({"base_model": "zai-org/CogVideoX-2b", "task": "text-to-video"}, "diffusers")
    assert (small.license, small.license_name) == ("apache-2.0", None)
    # Another owner's base model may have another license.
    assert parse_front_matter({"base_model": "me/mine"}, "diffusers").license_name is None


@pytest.mark.parametrize("kind", EXPORT_FORMATS)
def test_the_library_name_is_set_only_if_diffusers_loads_the_file(comfyui_model, tmp_path, kind):
    """The hub shows code for this library, which loads a LoRA's folder or a merged transformer."""
    lora = write_lora(comfyui_model, tmp_path / "lora", metadata={"base_model": str(comfyui_model)})
    export([str(lora), "--to", kind, "--output", str(tmp_path / "out")])
    data = ModelCard.load(tmp_path / "out/README.md").data
    try:
        if kind == "merged":
            base_transformer(tmp_path / "out")
        else:
            pipe = CogVideoXImageToVideoPipeline(None, None, None, base_transformer(comfyui_model), None)
            pipe.load_lora_weights(tmp_path / "out")
            assert len(pipe.transformer.peft_config["default_0"].target_modules) == 2 * 4
    except ValueError:
        library = None
    else:
        library = "diffusers"
    assert data.library_name == library
    assert ("diffusers" in data.tags) is (library is not None)
    assert ("comfyui" in data.tags) is kind.startswith("comfyui")
    assert ("lora" in data.tags) is (kind not in ("merged", "comfyui-merged"))


def test_settings_are_shown_in_a_table():
    card = model_card("mine", METADATA, "diffusers", "me/mine", sample="../a.mp4")
    for row in ("| Rank, alpha | 128, 64 |", "| Layers | to_q, to_k |", "| Clips | 30 |", "| Frame rate | 16 |"):
        assert row in card
    assert '<video controls loop src="../a.mp4">' in card
    assert "None" not in card
    assert "## Image latents" not in card  # diffusers scales them in the same way
    assert "num_frames=81" in card
    assert "| Steps" not in model_card("theirs", {}, "diffusers", "lora")


def test_a_prompt_cannot_break_out_of_the_code():
    metadata = {**METADATA, "example_prompt": 'x"); import os; os.abort()  #\n```\n'}
    code = snippet(metadata, "diffusers", "me/mine")
    compile(code, "card", "exec")
    assert "`" not in code
    assert sum(line.lstrip().startswith("prompt=") for line in code.splitlines()) == 1
    assert json.loads(re.search(r"prompt=(.*),\n", code)[1]).startswith('x"); import os')


def test_each_kind_has_its_own_instructions():
    scaled = {**METADATA, "image_latents": "scaled", "image_latent_factor": 0.49, "comfyui_strength": 1.0}
    assert "image_latents * 0.49" in model_card("m", scaled, "diffusers", "m")
    assert "image_latents *" not in model_card("m", scaled, "merged", "m")  # the weights include the factor
    metadata = {**METADATA, "comfyui_strength": 1 / 0.49}
    cards = {
        kind: model_card("m", metadata, kind, "m", "m.safetensors") for kind in EXPORT_FORMATS if "comfyui" in kind
    }
    for kind, card in cards.items():
        assert "`m.safetensors`" in card
        assert "```python" not in card
        assert ("2.04" in card) is (kind == "comfyui-wrapper")
        assert ("--scale 0" in card) is (kind == "comfyui")  # to export the base model in ComfyUI's names


@pytest.mark.parametrize("frames, latents", [(81, 21), (49, 13), (9, 3), (1, 1)])
def test_comfyui_instructions_use_an_even_number_of_latents(frames, latents):
    """diffusers' pipeline samples as many, and drops those that are to be cut."""
    metadata = {"buckets": [f"{frames}x768x1360"]}
    for kind in ("comfyui", "comfyui-merged"):
        card = model_card("m", metadata, kind, "m", "m.safetensors")
        length, index, amount = map(int, re.search(r"length to (\d+).*index (\d+), amount (\d+)", card).groups())
        assert (length - 1) // 4 + 1 == latents + 1
        assert (index, amount) == (1, latents)
    even = model_card("m", {"buckets": ["85x768x1360"]}, "comfyui", "m", "m.safetensors")
    assert re.search(r"length to (\d+)", even)[1] == "85"
    assert "LatentCut" not in even


def test_the_card_shows_what_a_run_records(tiny_model):
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
    metadata = json.loads(json.dumps(export_metadata(run, 500)))
    assert metadata["image_latent_factor"] == pytest.approx(0.49)
    card = model_card("mine", metadata, "diffusers", "mine")
    for text in (
        "| Steps | 500 |", "| Rank, alpha | 4, 6 |", "| Clips | 7 |", "| Clips per step | 2 |", "| 0.0003 |",
        "*in my style*",
        'prompt="a cat"', "image_latents * 0.4", "| Image latents | scaled |", "height=64",
    ):  # fmt: skip
        assert text in card


@pytest.mark.parametrize("modes, expected", [
    ([], {}),
    (["conditioning.modes={first: 1, last: 0}"], {}),
    (["conditioning.modes={keyframes: 0.25, first: 0.75}", "conditioning.keyframe_times=[0.5]"],
     {"modes": {"first": 0.75, "keyframes": 0.25}, "keyframe_times": [0.5]}),
    (["conditioning.modes={prefix: 1}"], {"modes": {"prefix": 1}, "context_latents": 3, "keyframe_times": []}),
])  # fmt: skip
def test_modes_are_recorded_unless_only_first_is_trained(tiny_model, tmp_path, modes, expected):
    cfg, _ = load_config(None, [f"model.path={tiny_model}", "data.path=unused", *modes])
    run = SimpleNamespace(
        cfg=cfg, model=find_model(str(tiny_model)), buckets=(ClipShape.parse("9x64x96"),),
        data=SimpleNamespace(index=range(7)), world=World(0, 1, 0, 1),
        plan=SimpleNamespace(local_batch_sizes=(1,), accumulation=1),
        job=SimpleNamespace(condition_settings=ConditionSettings(3)),
    )  # fmt: skip
    lora = write_lora(tiny_model, tmp_path / "lora", metadata=export_metadata(run, 500))
    (file,) = read_loras([str(lora)], None, "--alpha")
    names = ("modes", "context_latents", "keyframe_times")
    assert {name: file.metadata[name] for name in names if name in file.metadata} == expected


@pytest.mark.parametrize(
    "settings, words, prompt",
    [
        (["data.path=unused", "data.caption_prefix= ohwx, "], ["ohwx,"], "ohwx, what happens in the video"),
        (["data.path=unused", "data.caption_prefix=ohwx", "data.default_caption=a cat"], ["ohwx"], "ohwx a cat"),
        (["data.sets=[{path: a, caption_prefix: b|d}, {path: b}]", "data.caption_prefix=ab"], ["b|d", "ab"], "b/d "),
        (["data.path=unused", "data.caption_prefix= "], [], "what happens"),
        (["data.path=unused", "data.caption_prefix=ohwx", "sample.prompts=[{prompt: my dog, image: i}]"], ["ohwx"],
         "my dog"),
    ],
)  # fmt: skip
def test_the_trigger_words_are_recorded(tiny_model, tmp_path, settings, words, prompt):
    cfg, _ = load_config(None, [f"model.path={tiny_model}", *settings])
    run = SimpleNamespace(
        cfg=cfg, model=find_model(str(tiny_model)), buckets=(ClipShape.parse("9x64x96"),),
        data=SimpleNamespace(index=range(7)), world=World(0, 1, 0, 1),
        plan=SimpleNamespace(local_batch_sizes=(1,), accumulation=1),
    )  # fmt: skip
    recorded = export_metadata(run, 500)
    lora = write_lora(tiny_model, tmp_path / "lora", metadata=recorded)
    (file,) = read_loras([str(lora)], None, "--alpha")
    assert file.metadata.get("trigger_words", []) == words
    card = model_card("mine", file.metadata, "diffusers", "mine")
    assert all(f"`{word.replace('|', '/')}`" in card for word in words)
    assert ("Captions began with" in card) is bool(words)
    assert f'prompt="{prompt}' in card
    if words:
        assert parse_front_matter(file.metadata, "diffusers").instance_prompt == ", ".join(words)


def test_a_failing_card_is_only_a_warning(tmp_path, capsys):
    write_card(tmp_path, tmp_path / "run/lora/step-000001", {"buckets": [object()]})
    assert not (tmp_path / "README.md").exists()
    assert "warning: " in capsys.readouterr().err


def test_shareable_metadata_has_no_local_paths():
    metadata = {"base_model": "/home/me/models/cog", "init_from": "/home/me/lora.safetensors", "rank": 4, "seed": 0}
    assert shareable(metadata) == {"base_model": "cog", "init_from": "lora.safetensors", "rank": 4, "seed": 0}
    assert shareable({"base_model": "zai-org/cog", "init_from": None}) == {
        "base_model": "zai-org/cog",
        "init_from": None,
    }


@pytest.mark.parametrize(
    "inverted, expected", [(True, {"pipeline": 1, "scaled": 0.49, "unscaled": 0.7}),
                           (False, {"pipeline": 1, "scaled": 1, "unscaled": 1 / 0.7})],
)  # fmt: skip
def test_the_factor_is_relative_to_the_pipeline(inverted, expected):
    config = {"scaling_factor": 0.7, "invert_scale_latents": inverted}
    assert {name: pipeline_factor(config, name) for name in expected} == pytest.approx(expected)


def test_the_video_of_the_run_is_linked(tmp_path):
    lora, video = tmp_path / "run/lora/step-000500", tmp_path / "run/samples/step-000500/0.mp4"
    for path in (lora, video.parent):
        path.mkdir(parents=True)
    assert find_sample(lora) is None
    write_card(lora, lora, METADATA)
    assert "<video" not in (lora / "README.md").read_text()
    video.touch()
    (lora / "pytorch_lora_weights.safetensors").touch()
    assert find_sample(lora) == find_sample(lora / "pytorch_lora_weights.safetensors") == video
    write_card(lora, lora, METADATA)
    assert (lora / re.search('src="(.*?)"', (lora / "README.md").read_text())[1]).resolve() == video.resolve()


def test_a_local_folder_is_not_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("me/mine") == "me/mine"
    (tmp_path / "me/mine").mkdir(parents=True)
    assert hub_id("me/mine") is None
    assert hub_id("/models/mine") is None


@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("1.5-5b-i2v", "diffusers", {"image_latents": "pipeline"}),
        ("1.5-5b-i2v", "diffusers", {"image_latents": "scaled"}),
        ("1.5-5b-i2v", "merged", {"image_latents": "scaled"}),
        ("1.5-5b", "diffusers", {"task": "text-to-video"}),
        ("2b", "merged", {"task": "text-to-video"}),
    ],
)
def test_the_code_on_the_card_generates_a_video(family, tmp_path, monkeypatch, name, kind, settings):
    """Only `export_to_video` is a stand-in, because it requires imageio, which is not installed."""
    export_to_video, model = Mock(), family(name)
    monkeypatch.setattr(diffusers.utils, "export_to_video", export_to_video)
    metadata = {"buckets": ["9x64x96"], "fps": 8.0, "base_model": str(model), **settings}
    lora = write_lora(model, tmp_path / "lora", metadata=metadata)
    export([str(lora), "--to", kind, "--output", str(tmp_path / "out")])
    assert ("load_image" in (tmp_path / "out/README.md").read_text()) is ("task" not in settings)
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), flags=re.S)
    names = {}
    torch.manual_seed(0)
    exec(compile(code.replace("frames = pipe(", "frames = pipe(num_inference_steps=1,"), "card", "exec"), names)
    export_to_video.assert_called_once_with(names["frames"], "video.mp4", fps=8)
    assert len(names["frames"]) == 9
    assert names["frames"][0].size == (96, 64)
    assert names["pipe"].transformer.dtype is torch.bfloat16
    is_rescaled = names["pipe"].prepare_latents is names.get("prepare_latents", ...)
    assert is_rescaled is (settings.get("image_latents") == "scaled" and kind == "diffusers")


@pytest.mark.slow
def test_the_code_of_every_mode_generates_a_video(tiny_model, tmp_path, monkeypatch):
    """`load_video` and `export_to_video` are stand-ins, because they require imageio, which is not installed."""
    export_to_video = Mock()
    monkeypatch.setattr(diffusers.utils, "export_to_video", export_to_video)
    for file in ("first", "last", "keyframe-0.5s", "keyframe-1s"):
        Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / f"{file}.png")
    frames = [Image.new("RGB", (96, 64), (level,) * 3) for level in range(12)]
    monkeypatch.setattr(diffusers.utils, "load_video", lambda _: frames)
    monkeypatch.chdir(tmp_path)
    metadata = {
        "buckets": ["9x64x96"], "fps": 8.0, "base_model": str(tiny_model), "image_latents": "pipeline",
        "modes": dict.fromkeys(MODES, 1 / len(MODES)), "context_latents": 2, "keyframe_times": [0.5, 1.0],
    }  # fmt: skip
    lora = write_lora(tiny_model, tmp_path / "lora", metadata=metadata)
    card = model_card("mine", metadata, "diffusers", str(lora))
    codes = re.findall("```python\n(.*?)```", card, flags=re.S)
    assert len(codes) == len(MODES)
    conditions, encode = [], ConditionedPipeline._preprocess
    monkeypatch.setattr(
        ConditionedPipeline, "_preprocess", lambda self, *args: conditions.append(args[:3]) or encode(self, *args)
    )
    for mode, code in zip(MODES, codes, strict=True):
        assert f"Mode `{mode}`" in card
        names = {}
        exec(compile(code.replace("frames = pipe(", "frames = pipe(num_inference_steps=1,"), mode, "exec"), names)
        assert len(names["frames"]) == 9
        assert isinstance(names["pipe"], ConditionedPipeline) == (mode != "first")
    videos = [video for _, video, _ in conditions if video is not None]
    assert videos == [frames[-5:], frames[:5]]
    assert [sorted(keyframes) for *_, keyframes in conditions if keyframes] == [[4, 8]]
    assert [last is not None for last, *_ in conditions] == [True, True, False, False, False, False]
    assert "ConditionedPipeline" not in model_card("mine", METADATA, "diffusers", "m")


def test_the_code_of_a_lora_with_controls_gives_the_pipeline_a_control_video(tiny_model, tmp_path, monkeypatch):
    from cogds.model.load import load_transformer
    from cogds.model.lora.adapter import export, inject

    transformer = load_transformer(find_model(str(tiny_model)), torch.float32)
    inject(transformer, 2, 2, 0.0, ["to_q"], 0)
    torch.nn.init.normal_(add_control(transformer, 8).detach())
    metadata = {**METADATA, "base_model": str(tiny_model), "buckets": ["9x64x96"], "fps": 8.0, "control": True}
    lora = export(tmp_path / "lora", transformer, dict(transformer.named_parameters()), metadata).parent
    Image.new("RGB", (96, 64)).save(tmp_path / "first.png")
    monkeypatch.setattr(diffusers.utils, "export_to_video", Mock())
    monkeypatch.setattr(diffusers.utils, "load_video", lambda _: [Image.new("RGB", (96, 64))] * 12)
    monkeypatch.chdir(tmp_path)
    card = model_card("mine", metadata, "diffusers", str(lora))
    assert "cogds sample --control" in card
    (code,) = re.findall("```python\n(.*?)```", card, flags=re.S)
    names = {}
    exec(compile(code.replace("frames = pipe(", "frames = pipe(num_inference_steps=1,"), "card", "exec"), names)
    assert len(names["frames"]) == 9
    assert isinstance(names["pipe"], ConditionedPipeline)
    assert control_of(names["pipe"].transformer).weight.abs().sum() > 0


def test_the_code_of_a_text_to_video_lora_with_controls_says_that_it_ignores_them():
    metadata = {**METADATA, "task": "text-to-video", "control": True}
    assert "does not use the control video. `cogds sample --control` does." in snippet(metadata, "diffusers", "mine")
    assert "control" not in snippet({**metadata, "control": False}, "diffusers", "mine")


@pytest.mark.parametrize("mode", ["first", "first_last"])
def test_the_code_of_a_lora_of_the_shapes_model_finds_the_model(mode):
    metadata = {**METADATA, "base_model": "builtin:shapes", "modes": {mode: 1.0}}
    code = snippet(metadata, "diffusers", "mine", mode)
    assert "pip install cogds " in code
    loads = next(line for line in code.splitlines() if ".from_pretrained(" in line)
    call = re.search(r"from_pretrained\((.*), torch_dtype", loads)[1]
    names = {}
    exec("\n".join(line for line in code.splitlines() if "cogds.model.load import" in line), names)
    assert eval(call, names) == find_model("builtin:shapes").path
    assert "find_model" not in snippet(metadata, "full", "mine")  # a whole model
