"""Real runs of the train command with 2 ranks on drawn clips, shared by several tests."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cogds.metrics.jsonl import step_lines


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder for the clips, the cache and the runs."""
    from tests.drawn import draw_clips

    folder = tmp_path_factory.mktemp("workshop")
    draw_clips(folder / "clips")
    return folder


@pytest.fixture(scope="session")
def train_once(workshop, tiny_model, run_train):
    """`train_once(name, ds, *overrides)`: the folder of a finished run. Each name is run once per session."""
    finished = {}

    def run(name, ds="zero2", *overrides, **options):
        settings = (ds, overrides, options)
        if name not in finished:
            run_train(
                "--deepspeed", ds if isinstance(ds, Path) else f"ds_configs/{ds}.json",
                f"model.path={tiny_model}", f"data.path={workshop / 'clips'}", f"data.cache_dir={workshop / 'cache'}",
                "data.buckets=[17x64x96, 9x96x64, 9x64x64, 1x64x64]", f"output_dir={workshop / name}",
                "train.num_steps=6", "train.gradient_accumulation_steps=2", "train.precision=fp32",
                "data.num_workers=1", "lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2", "optimizer.warmup_steps=2",
                "optimizer.schedule=cosine", "checkpoint.every=3", "eval.every=null", "eval.held_out=0", *overrides,
                **{"launcher": "warm"} | options,
            )  # fmt: skip
            finished[name] = settings
        assert finished[name] == settings, f"the run {name} was made with other settings: {finished[name]}"
        return workshop / name

    return run


def metrics(run: Path):
    """Return the lines of metrics.jsonl that belong to optimizer steps."""
    return step_lines((run / "metrics.jsonl").read_text())


def notes(run: Path):
    """Return the lines of metrics.jsonl that callbacks write."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" not in line]


def losses(run: Path):
    return [line["train/loss"] for line in metrics(run)]


def adapter(run: Path, step=6):
    return load_file(run / f"lora/step-{step:06d}/pytorch_lora_weights.safetensors")
