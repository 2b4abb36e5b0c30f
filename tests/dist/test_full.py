"""Full fine-tuning with 2 ranks: every ZeRO stage equals a plain loop, resumes bitwise, and exports what it trained."""

import json
import math
import shutil

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel

from cogds.engine.shards import ShardReader
from tests.conftest import ROOT
from tests.dist.conftest import losses, notes
from tests.model.lora.adapters import example_inputs

pytestmark = [pytest.mark.dist, pytest.mark.slow]
CONFIGS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
PARTS = ("zero2,fp32,attn1", "zero3_offload,fp32,attn1,transformer_blocks.1")


@pytest.fixture(scope="module")
def results(warm, tiny_model, tmp_path_factory):
    """Results of full_loop_script.py, by case."""
    file = tmp_path_factory.mktemp("loop") / "results.json"
    cases = [f"{ds},{precision}" for precision in ("fp32", "bf16") for ds in CONFIGS]
    done = warm(ROOT / "tests/dist/full_loop_script.py", [tiny_model, file, *cases, *PARTS], ranks=2)
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("ds", CONFIGS)
def test_every_stage_equals_a_plain_loop(results, ds):
    """With every mode of activation checkpointing, against diffusers' own transformer and torch's AdamW."""
    result = results[f"{ds},fp32"]
    assert result["losses"] == pytest.approx(result["expected"], rel=1e-6)
    assert result["error"] < 1e-3


@pytest.mark.parametrize("ds", CONFIGS)
def test_bf16_weights_have_float32_masters(results, ds):
    result = results[f"{ds},bf16"]
    assert result["losses"] == pytest.approx(result["expected"], rel=5e-3)
    assert result["error"] < 0.2


@pytest.mark.parametrize("case", PARTS)
def test_a_part_of_the_transformer_is_trained(results, case):
    assert results[case]["losses"] == pytest.approx(results[case]["expected"], rel=1e-6)
    assert results[case]["error"] < 1e-3
    assert results[case]["weights"] < results["zero2,fp32"]["weights"]


SCRIPT = ROOT / "tests/dist/full_script.py"
FULL = ("train.method=full", "optimizer.lr=1e-3", "optimizer.weight_decay=0.01")
OVERRIDES = {
    "zero2": (*FULL, "full.ema_decay=0.5", "full.ema_device=cpu"),
    "zero3": (*FULL, "train.precision=bf16", "full.ema_decay=0.5", "train.memory_check=on"),
}


def state_of(run, step=6):
    """Return the whole training state of a checkpoint, and its header."""
    folder = run / f"checkpoints/step-{step:06d}"
    header = json.loads((folder / "state.json").read_text())
    with ShardReader(folder, header["num_shards"]) as reader:
        tensors = {
            f"{kind}/{name}": reader.read(kind, name, 0, math.prod(shape)).view(shape)
            for name, shape in header["shapes"].items()
            for kind in header["kinds"]
        }
    return tensors, header


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])] == []


def stop_after_step_3(whole, stopped):
    """Copy a finished run as if it had been killed after its checkpoint of step 3."""
    shutil.copytree(whole, stopped, symlinks=True)
    for kind in ("checkpoints", "model", *(["model_ema"] if (whole / "model_ema").exists() else [])):
        shutil.rmtree(stopped / kind / "step-000006")
    (stopped / "checkpoints/latest").write_text("step-000003\n")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 3))


@pytest.mark.parametrize("ds", OVERRIDES)
def test_a_resumed_run_equals_the_uninterrupted_run(train_once, workshop, ds):
    overrides = OVERRIDES[ds]
    whole, stopped = train_once(f"full-{ds}", ds, *overrides, script=SCRIPT), workshop / f"full-{ds}-stopped"
    stop_after_step_3(whole, stopped)
    train_once(f"full-{ds}-resumed", ds, *overrides, f"output_dir={stopped}", script=SCRIPT)
    assert losses(stopped) == losses(whole)
    tensors, header = state_of(stopped)
    assert_equal(tensors, state_of(whole)[0])
    assert (header["num_updates"], header["num_shards"]) == (6, 2)
    assert torch.equal(torch.load(stopped / "output.pt"), torch.load(whole / "output.pt"))


@pytest.mark.parametrize("ds", OVERRIDES)
def test_the_exported_folder_is_the_trained_model(train_once, ds, tiny_model):
    precision = "bf16" if ds == "zero3" else "fp32"
    run = train_once(f"full-{ds}", ds, *OVERRIDES[ds], script=SCRIPT)
    folder, dtype = run / "model/step-000006", {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder, dtype=dtype)
    weights = pipeline.transformer.state_dict()
    masters, header = state_of(run)
    assert len(header["shapes"]) == len(dict(pipeline.transformer.named_parameters()))
    base = CogVideoXTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer").state_dict()
    for name, weight in weights.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, masters[f"weight/{name}"].to(dtype)), name
        assert not torch.equal(weight, base[name].to(dtype)), f"{name} was not trained"
    expected = torch.load(run / "output.pt")
    inputs = {
        name: value.to(dtype) if name in ("hidden_states", "encoder_hidden_states", "ofs") else value
        for name, value in example_inputs().items()
    }
    with torch.no_grad():
        output = pipeline.transformer(**inputs)[0]
    # diffusers computes the same in another order.
    torch.testing.assert_close(
        output, expected, **({"atol": 0.05, "rtol": 0.05} if precision == "bf16" else {"atol": 1e-5, "rtol": 1e-4})
    )


def test_the_moving_average_is_evaluated_and_exported(train_once):
    """With videos and evaluations, which do not change the training."""
    plain = train_once("full-zero3", "zero3", *OVERRIDES["zero3"], script=SCRIPT)
    run = train_once(
        "full-watched", "zero3", *OVERRIDES["zero3"], "checkpoint.every=1", "checkpoint.keep_last=3", "eval.every=3",
        "sample.every=6", "sample.num_steps=2", script=SCRIPT,
    )  # fmt: skip
    assert losses(run) == losses(plain)
    assert_equal(state_of(run)[0], state_of(plain)[0])
    evaluations = [line for line in notes(run) if "eval/train_loss" in line]
    assert [("eval_ema/train_loss" in line, line["step"]) for line in evaluations] == [(False, 0), (True, 3), (True, 6)]
    assert all(line["eval_ema/train_loss"] != line["eval/train_loss"] for line in evaluations[1:])
    assert len(list((run / "samples").glob("*/*.mp4"))) == 6
    states = {step: state_of(run, step)[0] for step in (4, 5, 6)}
    for step in (5, 6):
        for name in (name for name in states[step] if name.startswith("ema/")):
            weight = states[step][name.replace("ema/", "weight/")]
            expected = states[step - 1][name].lerp(weight, 1 - min(0.5, step / (9 + step)))
            torch.testing.assert_close(states[step][name], expected)
    assert sorted(path.name for path in (run / "model_ema").iterdir()) == ["step-000004", "step-000005", "step-000006"]
    averaged = CogVideoXTransformer3DModel.from_pretrained(run / "model_ema/step-000006", subfolder="transformer")
    for name, weight in averaged.state_dict().items():
        assert torch.equal(weight, states[6][f"ema/{name}"].to(torch.bfloat16)), name


def test_ranks_that_share_a_clip_train_as_one(train_once):
    short = (*FULL, "train.num_steps=3", "checkpoint.every=3", "data.buckets=[9x64x64]", "data.max_unusable=0.2")
    alone = train_once("full-alone", "zero2", *short, ranks=1)
    shared = train_once("full-shared", "zero3", *short, "parallel.sequence_size=2")
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    masters, expected = (state_of(run, 3)[0] for run in (shared, alone))
    for name in (name for name in expected if name.startswith("weight/")):
        torch.testing.assert_close(masters[name], expected[name], atol=2e-4, rtol=1e-3)
