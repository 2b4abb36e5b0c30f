"""The export command: files, messages and refusals."""

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file

import cogds.export
from cogds.arguments import parse_args
from cogds.errors import UserError
from cogds.model.load import find_model
from cogds.model.lora.file import read_lora
from tests.conftest import modes
from tests.model.lora.adapters import example_inputs, output, output_in_diffusers, write_lora

METADATA = {
    "image_latents": "pipeline", "rank": 4, "alpha": 8.0, "targets": ["to_q"], "step": 500, "fps": 16.0,
    "buckets": ["1x64x96", "9x64x96"], "base_model": "zai-org/CogVideoX1.5-5B-I2V",
}  # fmt: skip


def export(argv, api=None):
    cogds.export.main(parse_args("export", argv), api)


@pytest.fixture
def lora(tiny_model, tmp_path):
    """`lora(convention)`: a LoRA in the folder of a run."""

    def write(convention="pipeline", **settings):
        folder = tmp_path / convention / "lora/step-000500"
        metadata = {**METADATA, "image_latents": convention, "init_from": "/home/somebody/old.safetensors"}
        return write_lora(tiny_model, folder, metadata=metadata, **settings)

    return write


def front_matter(folder):
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data.to_dict()


def header(file):
    with safe_open(file, "pt") as tensors:
        return json.loads(tensors.metadata()["cogds"])


@pytest.mark.parametrize("kind, file", [
    ("diffusers", "pytorch_lora_weights.safetensors"), ("comfyui", "mine.safetensors"),
    ("comfyui-wrapper", "mine.safetensors"), ("merged", "transformer/diffusion_pytorch_model.safetensors"),
])  # fmt: skip
def test_each_format_has_weights_a_card_and_the_convention(tiny_model, lora, tmp_path, capsys, kind, file):
    out, source = tmp_path / "mine", lora()
    old_umask = os.umask(0o027)
    try:
        export([str(source), "--to", kind, "--output", str(out), "--model", str(tiny_model)])
    finally:
        os.umask(old_umask)
    assert header(out / file)["image_latents"] == "pipeline"
    assert header(out / file)["step"] == 500
    matter = front_matter(out)
    assert matter["base_model"] == "zai-org/CogVideoX1.5-5B-I2V"
    assert matter["pipeline_tag"] == "image-to-video"
    assert ("lora" in matter["tags"]) is (kind != "merged")
    text = capsys.readouterr().out
    assert file in text
    assert re.search(r"^  README\.md  \d+ kB$", text, flags=re.M)
    # diffusers' pipeline scales image latents as in training, but ComfyUI's nodes do not.
    assert ("warning: " in text) is kind.startswith("comfyui")
    assert ("ImageEncode to 2.04" in text) is (kind == "comfyui-wrapper")
    assert (f"How to use it in ComfyUI: {out / 'README.md'}" in text) is kind.startswith("comfyui")
    assert ("--to comfyui-merged" in text) is (kind in ("diffusers", "comfyui"))
    assert not list(tmp_path.glob("*.tmp*"))
    assert modes(out) == {0o640}


def test_another_convention_is_folded_in_or_causes_a_warning(tiny_model, lora, tmp_path, capsys):
    folder = lora("scaled")
    export([str(folder), "--to", "diffusers", "--output", str(tmp_path / "d"), "--model", str(tiny_model)])
    assert "warning: " in capsys.readouterr().out
    assert read_lora(tmp_path / "d").metadata["image_latents"] == "scaled"
    export([str(folder), "--to", "comfyui", "--output", str(tmp_path / "s"), "--model", str(tiny_model)])
    output = capsys.readouterr().out
    assert "need no setting" in output
    assert "warning: " not in output
    assert "image_latents * 0.4" in (tmp_path / "d/README.md").read_text()
    export([str(folder), "--to", "comfyui", "--output", str(tmp_path / "c"), "--model", str(tiny_model)])
    assert "warning" not in capsys.readouterr().out
    export([str(folder), "--to", "merged", "--output", str(tmp_path / "m"), "--model", str(tiny_model)])
    assert "warning" not in capsys.readouterr().out
    metadata = header(tmp_path / "m/transformer/diffusion_pytorch_model.safetensors")
    assert (metadata["image_latents"], metadata["trained_image_latents"]) == ("pipeline", "scaled")
    merged = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "m", subfolder="transformer")
    inputs = example_inputs()
    inputs["hidden_states"][:, :, 8:] /= 0.7**2  # the pipeline's scale
    with torch.no_grad():
        merged_output = merged(**inputs)[0]
    assert (merged_output - output_in_diffusers(tiny_model, (folder, 1.0))).abs().max() < 1e-4


@pytest.mark.parametrize("convention, factor", [("pipeline", 1 / 0.49), ("scaled", 1.0), ("unscaled", 1 / 0.7)])
def test_a_comfyui_merged_file_expects_image_latents_of_comfyui_nodes(
    comfyui_model, tmp_path, capsys, convention, factor
):
    """ComfyUI's nodes always scale by 0.7. The weights include the factor from there to the scale in training."""
    lora = write_lora(comfyui_model, tmp_path / "lora", metadata={**METADATA, "image_latents": convention})
    out = tmp_path / "mine"
    export([str(lora), "--to", "comfyui-merged", "--output", str(out), "--model", str(comfyui_model)])
    assert "warning" not in capsys.readouterr().out
    metadata = header(out / "mine.safetensors")
    assert (metadata["image_latents"], metadata["trained_image_latents"]) == ("scaled", convention)
    assert "image_latent_factor" not in metadata
    tensors = load_file(out / "mine.safetensors")
    base = load_file(comfyui_model / "transformer/diffusion_pytorch_model.safetensors")["patch_embed.proj.weight"]
    changed = (tensors["patch_embed.proj.weight"] / base).reshape(len(base), 32, 8)  # channels come first
    torch.testing.assert_close(changed[:, :16], torch.ones_like(changed[:, :16]))
    torch.testing.assert_close(changed[:, 16:], torch.full_like(changed[:, 16:], factor))
    assert "mine.safetensors" in (out / "README.md").read_text()


def test_several_loras_are_merged_with_their_weights(tiny_model, lora, tmp_path):
    first = lora()
    second = write_lora(tiny_model, tmp_path / "second", 2, 3.0, ("to_k",), {"image_latents": "pipeline"})
    export([
        str(first), "0.7", str(second), "-0.5", "--to", "merged", "--scale", "2", "--output", str(tmp_path / "out"),
        "--model", str(tiny_model), "--pipeline", "link", "--dtype", "fp32",
    ])  # fmt: skip
    merged = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    expected = output_in_diffusers(tiny_model, (first, 1.4), (second, -1.0))
    assert (output(merged) - expected).abs().max() < 1e-5
    assert "step-000500 x 1.4, second x -1" in (tmp_path / "out/README.md").read_text()


def test_the_video_of_the_run_is_copied(tiny_model, lora, tmp_path):
    folder = lora()
    video = folder.parent.parent / "samples/step-000500/0.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"video")
    export([str(folder), "--to", "diffusers", "--output", str(tmp_path / "out"), "--model", str(tiny_model)])
    assert (tmp_path / "out/sample.mp4").read_bytes() == b"video"
    assert 'src="sample.mp4"' in (tmp_path / "out/README.md").read_text()
    assert front_matter(tmp_path / "out")["widget"][0]["output"] == {"url": "sample.mp4"}


def test_nothing_is_downloaded_to_check_a_lora(lora, tmp_path, monkeypatch, capsys):
    """The base model on the hub, 20 GB, would only be used to compare sizes."""
    monkeypatch.setattr(cogds.export, "find_model", lambda path: pytest.fail(f"looked for {path}"))
    export([str(lora()), "--to", "comfyui", "--output", str(tmp_path / "out")])
    assert "--model" in capsys.readouterr().out


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--to", "merged"], r" --model"),
        (["--to", "diffusers", "--scale", "nan"], "--scale: .*nan"),
        (["--to", "diffusers", "--scale", "0"], "strength 0 does nothing"),
        (["{lora}", "0", "--to", "diffusers"], "^{lora}.*strength 0 does nothing"),
        (["{lora}", "nan", "--to", "diffusers"], "^{lora}: .*nan"),
        (["--to", "diffusers", "--output", "{there}"], "--output .*there: already exists"),
        (["--to", "diffusers", "--pipeline", "link"], "--pipeline link: "),
        (["--to", "comfyui-merged", "--model", "{model}", "--pipeline", "link"], "--pipeline link: "),
        (["--to", "comfyui-merged", "--model", "{model}"], "{model}: attention_head_dim is 16"),
        (["--to", "diffusers", "--public"], "--public: "),
        (["--to", "diffusers", "--sample", "nowhere.mp4"], "--sample nowhere.mp4: "),
        (["{lora}", "0.5", "{lora}", "--to", "comfyui"], "--to comfyui: .* 2 were given"),
        (["{lora}", "much", "--to", "merged"], "much: "),
        (["--to", "diffusers", "--lora-alpha", "8"], "--lora-alpha: .*its alpha"),
        (["--to", "diffusers", "--lora-alpha", "nan"], "--lora-alpha: "),
        (["0.7", "--to", "merged"], "0.7: "),
        (["--to", "diffusers", "--push-to", "nobody"], "--push-to nobody: "),
    ],
)
def test_invalid_arguments_are_refused_and_leave_no_files(tiny_model, tmp_path, words, message):
    folder = write_lora(tiny_model, tmp_path / "lora", metadata={"rank": 4})
    (tmp_path / "there").mkdir()
    places = {"there": tmp_path / "there", "model": tiny_model, "lora": folder}
    argv = ["--output", str(tmp_path / "out"), *(word.format(**places) for word in words)]
    with pytest.raises(UserError, match=message.format(**places)):
        export(argv if not words[0].startswith("--") else [str(folder), *argv])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_reported_before_writing(tiny_model, lora, tmp_path, monkeypatch):
    monkeypatch.setattr(cogds.export.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10**7))
    with pytest.raises(UserError, match=r"--output .*0\.01 GB free.* needs 0\.06 GB"):
        export([str(lora()), "--to", "merged", "--output", str(tmp_path / "out"), "--model", str(tiny_model)])
    assert not (tmp_path / "out").exists()


def test_loras_of_different_conventions_are_not_merged(tiny_model, lora):
    with pytest.raises(UserError, match=r"\(pipeline, scaled\)"):
        export([str(lora()), str(lora("scaled")), "--to", "merged", "--output", "x", "--model", str(tiny_model)])


def test_a_lora_of_another_model_is_refused(tiny_model, lora, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "transformer/config.json").read_text())
    (other / "transformer/config.json").write_text(json.dumps(config | {"num_layers": 1}))
    with pytest.raises(UserError, match=r"layer transformer_blocks\.1\.attn1\.to_\S+ is .* and is missing"):
        export([str(lora()), "--to", "merged", "--output", str(tmp_path / "out"), "--model", str(other)])


class Hub:
    """A stand-in for the hub's API."""

    def __init__(self, private=None, failing=False):
        self.private, self.failing, self.calls = private, failing, []

    def whoami(self):
        return {"name": "somebody"}

    def model_info(self, _repo):
        if self.private is None:
            raise RepositoryNotFoundError("no such repository", response=SimpleNamespace(headers={}, request=None))
        return SimpleNamespace(private=self.private)

    def create_repo(self, repo, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id, folder_path, **_):
        if self.failing:
            raise OSError("connection reset")
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def push(lora, tmp_path, api, *words):
    export([str(lora()), "--to", "diffusers", "--output", str(tmp_path / "out"), "--push-to", "me/mine", *words], api)


@pytest.mark.parametrize("words, private", [((), True), (("--public",), False)])
def test_an_upload_is_private_by_default(lora, tmp_path, capsys, words, private):
    api = Hub()
    push(lora, tmp_path, api, *words)
    assert api.calls == [
        ("create", "me/mine", private, True),
        ("upload", "me/mine", ["README.md", "pytorch_lora_weights.safetensors"]),
    ]
    text = capsys.readouterr().out
    assert f"me/mine ({'private' if private else 'public'})" in text
    assert text.index("pytorch_lora_weights.safetensors  ") < text.index("me/mine (")
    assert "https://hub/me/mine" in text
    card = (tmp_path / "out/README.md").read_text()
    assert 'load_lora_weights("me/mine", ' in card
    weights = (tmp_path / "out/pytorch_lora_weights.safetensors").read_bytes()
    assert "/home/somebody" not in card + weights.decode("latin-1")


def test_a_public_repository_needs_the_public_flag(lora, tmp_path):
    api = Hub(private=False)
    with pytest.raises(UserError, match=r"--push-to me/mine: .*--public"):
        push(lora, tmp_path, api)
    assert not (tmp_path / "out").exists()
    push(lora, tmp_path, api, "--public")
    assert len(api.calls) == 2


@pytest.mark.parametrize("name", ["whoami", "model_info", "create_repo"])
def test_a_bug_is_not_reported_as_a_hub_error(lora, tmp_path, name):
    api = Hub()
    setattr(api, name, Mock(side_effect=TypeError("planted")))
    with pytest.raises(TypeError, match="planted"):
        push(lora, tmp_path, api)


def test_a_failed_upload_keeps_the_export(lora, tmp_path):
    with pytest.raises(UserError, match=r"--push-to me/mine: .*\(OSError: connection reset\).*hf upload me/mine"):
        push(lora, tmp_path, Hub(private=True, failing=True))
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").exists()


def test_exports_of_a_text_to_video_lora(family, tmp_path):
    model = family("2b")
    lora = write_lora(model, tmp_path / "lora", metadata={"task": "text-to-video", "base_model": str(model)})
    for kind, message in (
        ("comfyui", "^--to comfyui: .* text-to-video"),
        ("comfyui-merged", "comfyui-merged supports only"),
    ):
        with pytest.raises(UserError, match=message):
            export([str(lora), "--to", kind, "--output", str(tmp_path / kind)])
    for kind in ("diffusers", "comfyui-wrapper", "merged"):
        export([str(lora), "--to", kind, "--output", str(tmp_path / kind)])
        text = (tmp_path / kind / "README.md").read_text()
        assert "pipeline_tag: text-to-video" in text
        assert "Image latents" not in text
    whole = ["--to", "merged", "--pipeline", "link", "--output", str(tmp_path / "whole")]
    export([str(lora), *whole])
    assert find_model(str(tmp_path / "whole")).family.positions == "sincos"
