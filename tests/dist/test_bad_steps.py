"""A loss that is not finite costs its step, on every rank, and not the run; too many in a row end it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cogds.data.cache.shard import entry_record, write_shard
from tests.dist.conftest import adapter, metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def poison(cache):
    """Make the moments of one encoded clip infinite, as a broken encoder would; returns how many were changed."""
    done = 0
    for path in (cache / "clips").glob("*.safetensors"):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            texts = dict(file.metadata())
        key = min(name.partition("/")[0] for name in tensors)
        if done == 0:
            tensors[f"{key}/moments"].fill_(torch.inf)
            entry = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(key)}
            texts[key] = entry_record(key, entry)
            path.unlink()
            write_shard(path, tensors, {name: text for name, text in texts.items() if name != "format"})
            done += 1
    return done


def test_the_step_is_skipped_by_all_and_the_clip_named(workshop, tiny_model, run_train):
    own = [
        f"model.path={tiny_model}", f"data.path={workshop / 'clips'}", f"data.cache_dir={workshop / 'poisoned'}",
        "data.buckets=[17x64x96, 9x96x64, 1x64x64]", f"output_dir={workshop / 'bad'}", "train.precision=fp32",
        "data.num_workers=0", "lora.rank=4", "eval.every=null", "train.gradient_accumulation_steps=2",
    ]  # fmt: skip
    run_train(*own, "train.num_steps=1", launcher="warm")
    assert poison(workshop / "poisoned") == 1
    done = run_train(*own, "train.num_steps=7", "checkpoint.resume=none", launcher="warm")
    lines = metrics(workshop / "bad")
    skipped = [line["step"] for line in lines if line["train/skipped"]]
    assert 1 <= len(skipped) < 7
    for line in lines:
        assert (line["train/loss"] is None) == (line["step"] in skipped)
    for step in skipped:
        (said,) = [line for line in done.stdout.splitlines() if f"step {step} was skipped" in line]
        assert "its loss is not finite: rank " in said
        assert "bucket " in said
        assert "(loss nan)" in said or "(loss inf)" in said
        assert str(workshop / "clips") in said
    assert all(tensor.isfinite().all() for tensor in adapter(workshop / "bad", 7).values())
    state = json.loads((workshop / "bad/checkpoints/step-000007/state.json").read_text())
    assert state["num_updates"] == 7 - len(skipped)

    # The weights themselves run away: no later step can be finite.
    done = run_train(
        *own, "train.num_steps=50", "checkpoint.resume=none", "optimizer.lr=1e20", "optimizer.warmup_steps=0",
        "train.max_bad_steps=3", launcher="warm", check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "3 steps in a row had a loss or gradient that is not finite" in done.stdout
    assert done.stdout.count("error: 3 steps in a row") == 1
