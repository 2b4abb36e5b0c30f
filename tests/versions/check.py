"""Train, resume and sample the demo with the installed versions of the dependencies (`make test-versions`).

Run with the interpreter of the environment under test: `python tests/versions/check.py`. Everything goes through the
commands that users run, with two ranks (one on a machine with one GPU), under ZeRO-2 and ZeRO-3, in bf16. Exits
non-zero if a command fails, a loss is not finite, or a resumed run differs from the uninterrupted one in any bit.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
COGDS = (sys.executable, "-m", "cogds")
NUM_RANKS = min(2, torch.cuda.device_count()) or 2
HALF, LAST = "step-000006", "step-000012"  # the checkpoints of the demo


def run(*command: object) -> None:
    """Run a command in the checkout, with one thread per rank. Raises CalledProcessError if it fails."""
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(zero: str, output: Path, *overrides: str) -> list[float | None]:
    """Train the demo and return the loss of each step, None if it is not finite."""
    demo = output.parents[1]
    run(
        *COGDS, "train", "--num-gpus", NUM_RANKS, "--deepspeed", f"ds_configs/{zero}.json",
        "--config", "launch/configs/demo.yaml", "data.draw_demo_clips=true", f"data.path={demo / 'clips'}",
        "train.num_steps=12", "checkpoint.every=6",
        f"data.cache_dir={demo / 'cache'}", f"output_dir={output}", "train.precision=bf16", *overrides,
    )  # fmt: skip
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def check(zero: str, demo: Path) -> None:
    """Train, resume from the checkpoint at half of the run, compare, sample, and read the logs."""
    whole, resumed = demo / zero / "whole", demo / zero / "resumed"
    losses = train(zero, whole)
    assert len(losses) == 12, losses
    assert all(loss is not None and math.isfinite(loss) for loss in losses), losses
    again = train(zero, resumed, f"checkpoint.resume={whole / 'checkpoints' / HALF}")
    assert again == losses[6:], (again, losses)
    for file in (f"lora/{LAST}/pytorch_lora_weights.safetensors", f"checkpoints/{LAST}/trainable.safetensors"):
        expected, tensors = load_file(whole / file), load_file(resumed / file)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items()), file
    video, image = demo / zero / "sample.mp4", demo / zero / "first.png"
    Image.new("RGB", (96, 96), (200, 200, 200)).save(image)
    run(
        *COGDS, "sample", "--model", "builtin:shapes", "--lora", resumed / "lora" / LAST,
        "--image", image, "--prompt", "a white square bounces", "--size", "9x48x48", "--steps", "2",
        "--output", video,
    )  # fmt: skip
    assert video.stat().st_size > 0
    run(Path(sys.executable).parent / "tensorboard", "--inspect", "--logdir", whole)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for zero in ("zero2", "zero3"):
            check(zero, Path(folder))
    names = ("torch", "deepspeed", "diffusers", "transformers", "peft", "numpy")
    print(f"passed: Python {sys.version.split()[0]},", ", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    main()
