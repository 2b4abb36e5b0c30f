"""A step whose loss is not finite is skipped on every rank, and too many in a row end the run."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cogds.data.cache.shard import entry_record, write_shard
from tests.dist.conftest import adapter, metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def poison(cache):
    """Make the moments of one encoded clip infinite."""
    path = min((cache / "clips").glob("*.safetensors"))
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        texts = dict(file.metadata())
    key = min(name.partition("/")[0] for name in tensors)
    tensors[f"{key}/moments"].fill_(torch.inf)
    entry = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(key)}
    texts[key] = entry_record(key, entry)
    path.unlink()
    write_shard(path, tensors, {name: text for name, text in texts.items() if name != "format"})


@pytest.mark.parametrize("ds, precision", [("zero2", "fp32"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")])
def test_the_step_is_skipped_on_all_ranks_and_its_clip_is_named(workshop, tiny_model, run_train, ds, precision):
    folder = workshop / f"bad-{ds}-{precision}"
    own = [
        "--deepspeed", f"ds_configs/{ds}.json", f"train.precision={precision}",
        f"model.path={tiny_model}", f"data.path={workshop / 'clips'}", f"data.cache_dir={folder / 'cache'}",
        "data.buckets=[17x64x96, 9x96x64, 1x64x64]", f"output_dir={folder / 'run'}",
        "data.num_workers=0", "lora.rank=4", "eval.every=null", "train.gradient_accumulation_steps=2",
    ]  # fmt: skip
    run_train(*own, "train.num_steps=1", launcher="warm")
    poison(folder / "cache")
    done = run_train(*own, "train.num_steps=7", "checkpoint.resume=none", launcher="warm")
    lines = metrics(folder / "run")
    skipped = [line["step"] for line in lines if line["train/skipped"]]
    assert 1 <= len(skipped) < 7
    for line in lines:
        assert (line["train/loss"] is None) == (line["step"] in skipped)
    for step in skipped:
        (text,) = [line for line in done.stdout.splitlines() if line.startswith(f"step {step} skipped")]
        assert "(loss nan)" in text or "(loss inf)" in text
        assert str(workshop / "clips") in text
    assert all(tensor.isfinite().all() for tensor in adapter(folder / "run", 7).values())
    state = json.loads((folder / "run/checkpoints/step-000007/state.json").read_text())
    assert state["num_updates"] == 7 - len(skipped)

    if precision == "bf16":
        return
    # The weights diverge, so no later step is finite.
    done = run_train(
        *own, "train.num_steps=50", "checkpoint.resume=none", "optimizer.lr=1e20", "optimizer.warmup_steps=0",
        "train.max_bad_steps=3", launcher="warm", check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout.count("error: train.max_bad_steps: 3 ") == 1
