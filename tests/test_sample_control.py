"""`cogds sample --control`: needed by a LoRA that was trained with control videos, and only by such a LoRA."""

import numpy as np
import pytest
import torch
from PIL import Image

import cogds.sample
from cogds.cli import call
from cogds.data.video.media import write_video
from cogds.errors import UserError
from cogds.model.control import add_control
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import export, inject


@pytest.fixture
def sample(tiny_model, tmp_path, monkeypatch):
    """`sample(lora, *argv)`: the frames that `cogds sample` writes. lora: "plain" or "control"."""
    model = find_model(str(tiny_model))
    for name in ("plain", "control"):
        transformer = load_transformer(model, torch.float32)
        inject(transformer, 4, 8, 0.0, ["to_q", "to_v"], seed=0)
        if name == "control":
            add_control(transformer, 8)
        numbers = torch.Generator().manual_seed(1)
        tensors = {
            key: 0.3 * torch.randn(value.shape, generator=numbers)
            for key, value in transformer.named_parameters()
            if value.requires_grad
        }
        export(tmp_path / name, transformer, tensors, {"buckets": ["9x32x48"], "fps": 8.0})
    Image.linear_gradient("L").convert("RGB").resize((48, 32)).save(tmp_path / "first.png")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 32, 48, 3), np.uint8)
        write_video(tmp_path / f"{number}.mp4", pixels, 8, num_threads=1)
    written = []
    monkeypatch.setattr(cogds.sample, "write_video", lambda *args: written.append(args))

    def sample(lora, *argv):
        call("sample",
            ["--model", str(tiny_model), "--lora", str(tmp_path / lora), "--image", str(tmp_path / "first.png"),
             "--prompt", "a red circle", "--steps", "1", *argv]
        )  # fmt: skip
        return torch.as_tensor(written[-1][1])

    sample.folder = tmp_path
    return sample


def test_a_video_follows_its_control(sample):
    videos = [sample("control", "--control", str(sample.folder / f"{number}.mp4")) for number in (0, 1, 0)]
    assert torch.equal(videos[0], videos[2])
    assert not torch.equal(videos[0], videos[1])
    # At strength 0, it is the base model's video with any control.
    base = [
        sample("control", "--lora-scale", "0", "--control", str(sample.folder / f"{number}.mp4")) for number in (0, 1)
    ]
    assert torch.equal(base[0], base[1])
    assert torch.equal(base[0], sample("plain", "--lora-scale", "0"))


@pytest.mark.parametrize(
    "lora, argv, problem",
    [
        ("control", [], "--control: missing"),
        ("plain", ["--control", "0.mp4"], "--control: no LoRA was trained with control videos"),
        ("control", ["--control", "0.mp4", "--segments", "2"], "--control: --segments"),
        ("control", ["--control", "0.mp4", "--size", "17x32x48"], "--control: .*0.mp4: "),
    ],
)
def test_a_control_must_fit_the_lora_and_the_clip(sample, lora, argv, problem):
    argv = [str(sample.folder / word) if word.endswith(".mp4") else word for word in argv]
    with pytest.raises(UserError, match=problem):
        sample(lora, *argv)


def test_prompts_of_a_size_share_one_control(sample, monkeypatch):
    calls = []
    for name in ("read_control", "encode_control"):
        original = getattr(cogds.sample, name)
        monkeypatch.setattr(
            cogds.sample,
            name,
            lambda *args, original=original, **kw: (calls.append(original), original(*args, **kw))[1],
        )
    sample("control", "--prompt", "a blue square", "--control", str(sample.folder / "0.mp4"), "--output", "videos")
    assert len(calls) == 2
