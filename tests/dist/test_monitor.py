"""The metrics of a real run on 2 ranks are correct."""

import csv
import json
import math

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cogds.metrics.tensorboard import COPIES, NUM_SHOWN_HPARAMS
from tests.board import event_folder
from tests.conftest import ROOT
from tests.dist.conftest import metrics, notes

pytestmark = [pytest.mark.dist, pytest.mark.slow]
MAX_GRAD_NORM = 1e-4
TOKENS = {"17x64x96": 104, "9x96x64": 80, "9x64x64": 64, "1x64x64": 48}  # T/2 x H/16 x W/16 + 32 of text


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def run(request, train_once, workshop):
    """A run that saves steps 5 and 6, with DeepSpeed's CSV monitor, which writes to `csv-` + its name."""
    name = f"monitored-{request.param}"
    ds_config = json.loads((ROOT / f"ds_configs/{request.param}.json").read_text())
    ds_config["csv_monitor"] = {"enabled": True, "output_path": str(workshop / f"csv-{name}"), "job_name": "own"}
    file = workshop / f"{name}.json"
    file.write_text(json.dumps(ds_config))
    return train_once(
        name, request.param, "--deepspeed", file, "train.gradient_accumulation_steps=1",
        "checkpoint.every=5", "metrics.every=2", "metrics.norms_every=2", "metrics.show_batches=1",
        f"optimizer.max_grad_norm={MAX_GRAD_NORM}", "train.precision=bf16", "optimizer.lr=1e-5",
    )  # fmt: skip


def test_throughput_counts_the_work_of_all_ranks(run):
    from cogds.core.flops import step_flops

    for line in metrics(run):
        (bucket,) = [name.partition("bucket=")[2] for name in line if name.startswith("train/loss/bucket=")]
        step_s = line["perf/step_s"]
        assert line["perf/samples_per_s"] * step_s == pytest.approx(2)
        assert line["perf/tokens_per_s"] * step_s == pytest.approx(2 * TOKENS[bucket])
        counted = step_flops(TOKENS[bucket], num_layers=2, hidden_size=32).model_flops
        assert line["perf/tflops"] * 1e12 * step_s == pytest.approx(counted)  # two clips, two ranks
        phases = [line[f"perf/{name}_s"] for name in ("inputs", "forward", "backward", "optimizer")]
        assert all(seconds > 0 for seconds in phases)
        assert sum(phases) <= step_s
        assert line["perf/data_wait_s"] == pytest.approx(line["perf/data_wait"] * step_s)
        if "zero2" in run.name:
            assert line["perf/rank_skew"] >= 1
        else:  # all ranks end a forward pass together, because it gathers weights
            assert "perf/rank_skew" not in line
        assert line["perf/peak_memory_gb"] == line["perf/peak_host_memory_gb"] > 0
        assert "perf/mfu" not in line  # the peak of a CPU is unknown


def test_coverage_grows_to_the_whole_dataset(run):
    seen = [line["data/coverage"] for line in metrics(run)]
    assert seen == sorted(seen)
    assert seen[0] == pytest.approx(2 / 7)
    assert seen[-1] == 1.0


def test_the_gradient_norm_is_measured_before_clipping(run):
    assert all(line["train/grad_norm"] > 10 * MAX_GRAD_NORM for line in metrics(run))


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def float32_weights(run, step):
    """Return the float32 weights by name. A step changes only few of the exported bf16 weights."""
    tensors = load_file(run / f"checkpoints/step-{step:06d}/trainable.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weight/")}


def test_norms_by_depth_are_those_of_the_trained_weights(run):
    lines, before, after = metrics(run), float32_weights(run, 5), float32_weights(run, 6)
    due = [line["step"] for line in lines if any(name.startswith("lora/") for name in line)]
    assert due == [2, 4, 6]
    for block in range(2):
        names = [name for name in after if f"transformer_blocks.{block}." in name]
        ups = [after[name] for name in names if "lora_B" in name]
        assert lines[-1][f"lora/weight_norm/blocks=0{block}"] == pytest.approx(norm(ups), rel=1e-5)
        moved = norm([after[name] - before[name] for name in names])
        assert lines[-1][f"lora/update_norm/blocks=0{block}"] == pytest.approx(moved, rel=1e-3)


def test_scalars_of_callbacks_are_in_the_same_file(run):
    names = {name for line in notes(run) for name in line} - {"step"}
    assert {"checkpoint/pause_s", "checkpoint/write_s"} <= names


def test_tensorboard_has_images_and_the_layout(run):
    board = EventAccumulator(str(event_folder(run)))
    board.Reload()
    assert {"data/buckets", "data/first_frames"} <= set(board.Tags()["images"])
    assert any(name.startswith("data/decoded/") for name in board.Tags()["images"])
    assert "custom_scalars__config__" in board.Tags()["tensors"]
    scalars = {name for line in [*metrics(run), *notes(run)] for name in line} - {"step"}
    assert set(board.Tags()["scalars"]) == scalars | {COPIES[name] for name in scalars & COPIES.keys()}


def test_the_hparams_tab_first_shows_the_learning_rate(run):
    board = EventAccumulator(str(event_folder(run)))
    board.Reload()
    content = board.SummaryMetadata(hparams_metadata.SESSION_START_INFO_TAG).plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert sorted(settings)[:NUM_SHOWN_HPARAMS] == [
        "clips", "lora.alpha", "lora.rank", "optimizer.lr", "optimizer.schedule",
    ]  # fmt: skip


def test_deepspeeds_monitors_get_the_same_numbers(run):
    folder = run.with_name(f"csv-{run.name}") / "own"
    written = {file.name for file in folder.glob("*.csv")}
    expected = {name for line in [*metrics(run), *notes(run)] for name in line} - {"step"}
    assert written == {f"{name.replace('/', '_')}.csv" for name in expected}
    rows = list(csv.reader((folder / "train_loss.csv").open()))
    assert rows[0] == ["step", "loss"]
    assert [(int(step), float(loss)) for step, loss in rows[1:]] == [
        (line["step"], line["train/loss"]) for line in metrics(run)
    ]
