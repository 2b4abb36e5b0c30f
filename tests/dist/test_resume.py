"""A resumed run is bitwise equal to the uninterrupted run with the same number of ranks and ZeRO stage."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cogds.config.loading import load_config
from cogds.engine.state import state_bytes
from cogds.model.load import empty_transformer, find_model
from cogds.model.lora.adapter import inject
from tests.conftest import ROOT, modes
from tests.dist.conftest import adapter, losses, metrics

pytestmark = pytest.mark.dist
SLOW = [pytest.param(ds, marks=pytest.mark.slow) for ds in ("zero2_offload", "zero3_offload")]


def check_resuming(train_once, workshop, name, ds, *overrides, **options):
    """Check that a run of 6 steps equals a run that was stopped and resumed."""
    whole = train_once(name, ds, *overrides, **options)
    # The run is stopped after step 5, two steps after its checkpoint of step 3. Those steps are trained again.
    stopped = workshop / f"{name}-stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints/step-000006")
    (stopped / "checkpoints/latest").write_text("step-000003\n")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (stopped / "metrics.jsonl").write_text("".join(kept))
    shutil.rmtree(stopped / "lora/step-000006")
    resumed = train_once(f"{name}-resumed", ds, f"output_dir={stopped}", *overrides, **options)
    assert resumed != stopped
    assert [line["step"] for line in metrics(stopped)] == [1, 2, 3, 4, 5, 6]
    assert losses(stopped) == losses(whole)
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(stopped).items())
    assert (stopped / "checkpoints/latest").read_text() == "step-000006\n"
    expected, tensors = (load_file(run / "checkpoints/step-000006/trainable.safetensors") for run in (whole, stopped))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    return tensors


def several_captions(workshop):
    """A list of the drawn clips with three captions each."""
    paths = sorted(path for path in (workshop / "clips").iterdir() if path.suffix != ".txt")
    rows = [
        {"path": str(path), "captions": [f"{path.stem} {word}" for word in ("is", "was", "will be")]} for path in paths
    ]
    (workshop / "several.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return workshop / "several.jsonl"


@pytest.mark.parametrize("ds", ["zero2", *SLOW])
def test_a_resumed_run_equals_the_uninterrupted_run(train_once, workshop, ds):
    overrides = {
        "zero2_offload": [f"data.path={several_captions(workshop)}"],
        "zero3_offload": ["train.deterministic=true"],  # changes nothing on CPUs
    }.get(ds, [])
    check_resuming(train_once, workshop, f"{ds}-changed" if overrides else ds, ds, *overrides)


# DeepSpeed's own optimizers for offload. Those without offload are GPU kernels.
OPTIMIZERS = {
    # With 0.99, the powers of beta show rounding errors within a few steps.
    "cpu-adamw": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}},
    "cpu-lion": {"type": "Lion", "params": {"betas": [0.9, 0.99], "weight_decay": 0.1}},
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # compiling them takes minutes the first time
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_deepspeeds_own_optimizers_resume_bitwise(train_once, workshop, name):
    ds = "zero2_offload"
    config = json.loads((ROOT / f"ds_configs/{ds}.json").read_text()) | {"optimizer": OPTIMIZERS[name]}
    file = workshop / f"{name}.json"
    file.write_text(json.dumps(config))
    saved = check_resuming(train_once, workshop, name, ds, "--deepspeed", file, ranks=1, timeout_s=600)
    first = [tensor for key, tensor in saved.items() if key.startswith("exp_avg/")]
    assert len(first) == len(adapter(workshop / name))
    assert all(tensor.abs().max() > 0 for tensor in first)


@pytest.mark.slow
def test_a_finished_run_does_nothing(train_once, run_train):
    whole = train_once("zero2", "zero2")
    before = (whole / "metrics.jsonl").read_text()
    done = run_train(
        "--deepspeed", "ds_configs/zero2.json", "--config", whole / "run.yaml", "train.num_steps=6", launcher="warm"
    )
    assert "already trained to step 6" in done.stdout
    assert (whole / "metrics.jsonl").read_text() == before


def damage_entry(shard, bucket):
    """Flip a bit of an entry of this bucket, if the shard has one. Return whether it has."""
    frames, height, width = bucket
    moments = [(frames + 3) // 4, height // 8, width // 8]  # latent frames, height and width
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")  # safetensors: the header's length, the header, the tensors
    header = json.loads(data[8:start])
    offsets = [
        tensor["data_offsets"][0]
        for name, tensor in header.items()
        if name.endswith("/moments") and tensor["shape"][1:] == moments
    ]
    if offsets:
        data[start + offsets[0]] ^= 1
        shard.write_bytes(data)
    return bool(offsets)


@pytest.mark.slow
def test_a_run_continues_without_its_clips(train_once, workshop):
    """A deleted clip is read from the cache, a damaged entry is replaced, and both ranks train all steps."""
    clips = workshop / "mortal"
    shutil.copytree(workshop / "clips", clips)
    own = (f"data.path={clips}", "data.max_unusable=0.5")
    whole = train_once("mortal-whole", "zero2", *own)
    stopped = workshop / "mortal-stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints/step-000006")
    (stopped / "checkpoints/latest").write_text("step-000003\n")
    (clips / "clip_0.mp4").unlink()
    train_once("mortal-resumed", "zero2", *own, f"output_dir={stopped}")
    assert losses(stopped) == losses(whole)
    assert not (stopped / "quarantine.jsonl").exists()

    (clips / "clip_6.mp4").write_bytes((clips / "clip_1.mp4").read_bytes())  # new data needs a new run
    (clips / "clip_6.txt").write_text("one more")
    cache = f"data.cache_dir={workshop / 'mortal-cache'}"
    train_once("mortal-new", "zero2", *own, cache, "train.num_steps=1")
    # Damage one entry only, because the bucket needs a readable clip.
    assert any(damage_entry(shard, (9, 96, 64)) for shard in (workshop / "mortal-cache/clips").glob("*.safetensors"))
    damaged = train_once("mortal-damaged", "zero2", *own, cache, "train.num_steps=12")
    assert len(losses(damaged)) == 12
    records = [json.loads(line) for line in (damaged / "quarantine.jsonl").read_text().splitlines()]
    assert len({record["reason"] for record in records}) == 1  # a copy shares its entry
    assert all("is damaged" in record["reason"] for record in records)


def test_changed_settings_are_named(train_once, run_train):
    whole = train_once("zero2", "zero2")
    done = run_train("--deepspeed", "ds_configs/zero2.json", "--config", whole / "run.yaml",
                     "lora.rank=8", "seed=1", "train.num_steps=7", check=False, launcher="warm")  # fmt: skip
    assert done.returncode != 0
    assert "seed was 0, now 1" in done.stdout
    assert "lora.rank was 4, now 8" in done.stdout
    assert "Traceback" not in done.stdout


def test_others_may_read_what_a_run_writes(train_once, workshop):
    """As the umask says: safetensors would allow only the owner."""
    run, umask = train_once("zero2", "zero2"), os.umask(0)
    os.umask(umask)
    assert modes(run) == modes(workshop / "cache") == {0o666 & ~umask}


def test_a_checkpoint_is_the_adapter_and_its_moments(train_once, tiny_model):
    whole = train_once("zero2", "zero2")
    state = json.loads((whole / "checkpoints/step-000006/state.json").read_text())
    assert (state["step"], state["num_updates"]) == (6, 6)
    tensors = load_file(whole / "checkpoints/step-000006/trainable.safetensors")
    assert {name.partition("/")[0] for name in tensors} == {"weight", "exp_avg", "exp_avg_sq"}
    exported = adapter(whole)
    assert len(tensors) == 3 * len(exported)
    for name, tensor in exported.items():
        key = name.removeprefix("transformer.").replace(".weight", ".default.weight")
        assert torch.equal(tensor, tensors[f"weight/{key}"])
    # The size that is checked against the free disk space before a run is the size of the file.
    transformer, (cfg, _) = empty_transformer(find_model(str(tiny_model))), load_config(str(whole / "run.yaml"), [])
    inject(transformer, cfg.lora.rank, cfg.lora.alpha, 0.0, cfg.lora.target_modules, seed=0)
    assert state_bytes(SimpleNamespace(module=transformer)) == sum(tensor.nbytes for tensor in tensors.values())
