"""Videos generated during training equal those of the sample command and do not change the run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cogds.sample
from cogds import cli
from tests.conftest import ROOT
from tests.dist.conftest import adapter, losses, notes

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PROMPTS = [("a red circle moves", "17x64x96", 0), ("a blue star", "9x96x64", 3), ("a green ball falls", "9x64x64", 0)]


@pytest.fixture
def with_videos(train_once, workshop, warm):
    """`with_videos(ds)`: a plain run, the folder of the same run with videos, and its output."""

    def run(ds):
        plain = train_once(ds, ds)
        folder = workshop / f"{ds}-videos"
        (folder / "frames").mkdir(parents=True)
        Image.linear_gradient("L").convert("RGB").resize((100, 60)).save(folder / "first.png")
        prompts = [
            f"{{prompt: {prompt}, image: {folder / 'first.png'}, size: {size}, seed: {seed}}}"
            for prompt, size, seed in PROMPTS
        ]
        done = warm(
            ROOT / "tests/dist/samples_script.py",
            [folder / "frames", "--deepspeed", f"ds_configs/{ds}.json", "--config", plain / "run.yaml",
             f"output_dir={folder / 'run'}", "sample.every=3", "sample.num_steps=2",
             f"sample.prompts=[{', '.join(prompts)}]"],
            ranks=2,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return plain, folder, done.stdout

    return run


@pytest.mark.parametrize("ds", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_three_videos_on_two_ranks(with_videos, tiny_model, monkeypatch, ds):
    plain, folder, _ = with_videos(ds)
    run = folder / "run"
    # Training is bitwise the same.
    assert losses(run) == losses(plain)
    expected, tensors = adapter(plain), adapter(run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    # Videos of the base model, which are linked as those of step 0, and of every third step.
    made = sorted(path.relative_to(run / "samples").as_posix() for path in (run / "samples").glob("*/*"))
    names = [name.removeprefix("base/") for name in made[:3]]
    assert [name[:-13] for name in names] == ["a-blue-star", "a-green-ball-falls", "a-red-circle-moves"]
    steps = ("base", "step-000000", "step-000003", "step-000006")
    first_frames = [f"first_frames/{Path(name).stem}.png" for name in names]
    assert made == sorted([*first_frames, *(f"{step}/{name}" for step in steps for name in names)])
    assert [line["step"] for line in notes(run) if "sample/seconds" in line] == [0, 3, 6]

    fresh, images = [], [str(folder / "first.png")]
    monkeypatch.setattr(cogds.sample, "write_video", lambda _path, frames, _fps: fresh.append(frames.numpy()))
    (folder / "list.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "image": images[0], "size": s, "seed": n}) + "\n" for p, s, n in PROMPTS)
    )
    argv = ["--model", str(tiny_model), "--lora", str(run / "lora/step-000006"), "--steps", "2"]
    cli.call("sample", [*argv, "--list", str(folder / "list.jsonl"), "--output", str(folder / "fresh")])
    for (_, size, _), frames in zip(PROMPTS, fresh):
        base, *_, last = (np.load(path).astype(int) for path in sorted((folder / "frames").glob(f"{size}-*")))
        # In float32 the transformer's outputs differ in the last bits, so a pixel by at most one level of 255.
        assert abs(frames - last).max() <= 1
        assert abs(frames - last).mean() < 0.01
        assert abs(frames - base).max() > 10
