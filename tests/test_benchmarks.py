"""Every speed benchmark runs at a tiny size, prints its table and ends with a line of JSON."""

import importlib
import json
import sys

import pytest

from cogds.config.schema import CHECKPOINTING_MODES
from cogds.core.vae_memory import COGVIDEOX_VAE
from tests.conftest import ROOT, run_command
from tests.published_model import LORA, TRANSFORMER, V15

# One process for all, because most of the time is for imports.
SCRIPT = f"""
import importlib, json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
for line in {{lines!r}}:
    name, *arguments = line.split()
    print("===", name, flush=True)
    importlib.import_module(name).main(arguments)
from cogds.distributed.process_group import disconnect
disconnect()
"""
LINES = [
    "step --sizes tiny --rounds 1 --checkpointing full,none --kernels auto,math --deepspeed zero2,zero3 --profile",
    "peers --sizes tiny --rounds 1 --checkpointing none --kernel auto",
    "memory",
    "vae --size tiny --precision fp32 --rounds 1",
    "quantized_loss --size tiny --quantizations int8 --fp8-matmul off",
    "agree --size tiny",
    "loop --sizes tiny --bucket 5x64x64 --steps 3",
    "scaling --size tiny --rounds 1 --parts tokens,batch,clips,paper --batch-sizes 1,2",
]


@pytest.fixture(scope="module")
def outputs():
    """The output of each benchmark, by name."""
    done = run_command([sys.executable, "-c", SCRIPT.format(lines=LINES)], 240)
    assert done.returncode == 0, done.stdout[-4000:]
    parts = [part.partition("\n") for part in done.stdout.split("=== ")[1:]]
    return {name: text for name, _, text in parts}


def result(outputs, name):
    """The JSON of a benchmark's last line, and the text before it."""
    *table, last = [line for line in outputs[name].splitlines() if line.strip()]
    values = json.loads(last)
    assert values["benchmark"] == name
    assert {"device", "torch", "commit", "load_average"} <= set(values["machine"])
    return values, "\n".join(table)


@pytest.mark.slow
def test_vae(outputs):
    values, _ = result(outputs, "vae")
    assert [(row["tiled"], row["layout"]) for row in values["rows"]] == [
        (tiled, layout) for tiled in (True, False, False) for layout in ("default", "channels_last_3d")
    ]
    assert all(row["median_s"] > 0 and row["distance"] < 1e-5 for row in values["rows"])


@pytest.mark.slow
def test_agree(outputs):
    values, table = result(outputs, "agree")
    assert {(row["checkpointing"], row["kernel"]) for row in values["rows"]} == {
        (mode, kernel) for mode in CHECKPOINTING_MODES for kernel in ("torch", "flash", "math")
    }
    assert all(row["output"] < 1e-5 and row["gradient"] < 1e-5 for row in values["rows"])
    assert values["num_wrong"] == 0
    assert "agrees" in table


@pytest.mark.slow
def test_step(outputs):
    values, table = result(outputs, "step")
    rows = values["rows"]
    assert [(row["checkpointing"], row["kernel"], row["deepspeed"]) for row in rows if row["kernel"] != "math"] == [
        ("full", rows[0]["kernel"], "zero2"), ("none", rows[0]["kernel"], "zero2"),
        ("full", rows[0]["kernel"], "zero3"),
    ]  # fmt: skip
    assert all(row["median_s"] > 0 and row["mfu"] > 0 and row["estimate_gb"] > 0 for row in rows)
    assert rows[0]["to_baseline"] == 1.0
    assert rows[0]["floor_s"] > rows[1]["floor_s"]  # recomputation takes time
    assert set(values["attention_s"]["tiny"]) >= {"torch"}
    assert "Self CPU" in table


@pytest.mark.slow
def test_peers(outputs):
    values, table = result(outputs, "peers")
    assert values["ratio"] > 0
    assert values["ratio_without_vae"] > 0
    same = values["results"][0]["same_work"]
    assert same["v_loss_ours"] == pytest.approx(same["weighted_x0_loss_common"], rel=1e-4)
    assert same["largest_difference"] < 1e-5
    assert "common, VAE in the loop" in table


@pytest.mark.slow
def test_memory(outputs):
    """With the real geometry, the values shown in docs/performance.md."""
    values, table = result(outputs, "memory")
    rows = {(row["deepspeed"], row["ranks"], row["quantization"]): row for row in values["rows"]}
    assert [rows["zero2", 1, "none"][mode] for mode in CHECKPOINTING_MODES] == [172.5, 44.2, 32.5, 21.4]
    assert [rows["zero3", 8, "none"][mode] for mode in CHECKPOINTING_MODES] == [162.0, 33.7, 21.9, 10.8]
    assert rows["zero2_offload", 1, "nf4"]["full+offload"] == 11.6
    assert {row["pinned"] for row in rows.values()} == {11.6}
    assert "calculated" in table
    shown = (ROOT / "docs/performance.md").read_text()
    for row in rows.values():
        assert "| " + " | ".join(str(row[mode]) for mode in CHECKPOINTING_MODES) + " |" in shown


@pytest.mark.slow
def test_quantized_loss(outputs):
    values, _ = result(outputs, "quantized_loss")
    bf16, fp32, int8 = values["rows"]
    assert (bf16["precision"], fp32["precision"], int8["quantization"]) == ("bf16", "fp32", "int8")
    assert bf16["output_distance"] == 0 < fp32["output_distance"] < 0.02
    assert "error" in int8 or 0 < int8["output_distance"] < 0.05


@pytest.mark.slow
def test_loop(outputs):
    values, table = result(outputs, "loop")
    (row,) = values["rows"]
    assert row["median_s"]["loop"] > row["median_s"]["inputs"] > 0
    assert 0 <= row["data_wait_share"] < 1
    assert "engine over plain" in table


@pytest.mark.slow
def test_scaling(outputs):
    values, table = result(outputs, "scaling")
    assert [(row["bucket"], row["batch_size"]) for row in values["shapes"]] == [
        ("5x64x64", 1), ("17x64x96", 1), ("5x64x64", 2)
    ]  # fmt: skip
    assert [row["num_clips"] for row in values["clips"]] == [1_000, 100_000, 10_000_000]
    assert "calculated, not measured" in table


@pytest.mark.slow
def test_weak_scaling_starts_its_ranks():
    command = [sys.executable, ROOT / "benchmarks/scaling.py", "--size", "tiny", "--parts", "ranks", "--rounds", "1"]
    done = run_command(command, 240)
    assert done.returncode == 0, done.stdout[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])["ranks"]
    assert [(row["deepspeed"], row["ranks"]) for row in rows] == [
        ("zero2", 1), ("zero2", 2), ("zero3", 1), ("zero3", 2)
    ]  # fmt: skip
    assert all(row["efficiency"] > 0 for row in rows)


@pytest.fixture(scope="module")
def scripts():
    """Import a benchmark as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


def test_a_failing_call_becomes_a_row_with_its_error(scripts):
    import torch

    measuring, recovered, calls = scripts("measuring"), [], []

    def fails():
        calls.append("fails")
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def cannot():
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    timings = measuring.interleaved(
        {"works": lambda: None, "fails": fails, "cannot": cannot}, 3, torch.device("cpu"), lambda: recovered.append(1)
    )
    assert len(timings["works"].seconds) == 3
    assert timings["fails"].numbers()["error"] == "out of memory"
    assert timings["cannot"].numbers() == {"error": "No available kernel. Aborting execution."}
    assert len(calls) == 3
    assert len(recovered) == 2


def test_the_real_size_is_the_published_model(scripts):
    measuring = scripts("measuring")
    size = measuring.SIZES["real"]
    model, cfg = measuring.model_of(size), measuring.run_config("bf16", size.lora_rank)
    assert model.geometry == V15
    assert measuring.num_tokens(measuring.ClipShape.parse(size.bucket), model.geometry) == 45_106
    shape, world = measuring.ClipShape.parse(size.bucket), measuring.World(0, 1, 0, 1)
    memory = measuring.make_job(cfg, "zero2", model, shape, world).memory
    assert (memory.transformer, memory.lora, memory.vae) == (TRANSFORMER, LORA, COGVIDEOX_VAE)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_mfu_needs_the_exact_device_name(scripts, monkeypatch, name, peak):
    import torch

    measuring, step = scripts("measuring"), scripts("step")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    gpu = torch.device("cuda")
    tflops, source = measuring.peak_tflops(None, torch.bfloat16, gpu)
    assert tflops == peak
    assert name in source
    assert measuring.peak_tflops(None, torch.float32, gpu)[0] is None
    assert measuring.peak_tflops(50.0, torch.float32, gpu) == (50.0, "given")
    variant = step.Variant("17x64x96", 1, "full", "torch", "off", "none", "off", "bf16", "zero2")
    row = step.make_row(variant, measuring.Timing([1.0], 2.0), measuring.SIZES["tiny"], 0, tflops, None)
    assert ("mfu" in row) == ("floor_s" in row) == (peak is not None)
    assert row["tokens_per_s"] == 104
    step.cells(row | {"estimate_gb": 1.0})


def test_variants_differ_in_one_value_or_are_all_combinations(scripts):
    step = scripts("step")
    choices = {
        "bucket": ["a", "b"], "batch_size": [1], "checkpointing": ["full", "none"], "kernel": ["torch"],
        "compiled": ["off", "on"], "quantization": ["none"], "fp8_matmul": ["off"], "precision": ["bf16"],
        "deepspeed": ["zero2", "zero3"],
    }  # fmt: skip
    single = step.make_variants(choices, False)
    assert len(single) == 2 * (1 + 3)
    assert len(step.make_variants(choices, True)) == 2 * 2 * 2 * 2
    groups = list(step.group_by_engine(single, single[0]))
    assert [len(group) for group in groups] == [6, 2]
    # Each engine first measures the baseline's settings.
    assert all((group[0].checkpointing, group[0].compiled) == ("full", "off") for group in groups)


def test_calculated_communication(scripts):
    scaling = scripts("scaling")
    links = scaling.Links("a test", 8, 100.0, 50.0, hop_us=0.0)
    assert links.ring_s(8e9, 8) == pytest.approx(8e9 * 7 / 8 / 100e9)
    assert links.ring_s(8e9, 16) == pytest.approx(8e9 * 15 / 16 / 50e9)  # the links out of the node are the bottleneck
    assert links.exchange_s(8e9, 4) == pytest.approx(8e9 * 3 / 4 / 100e9)
    assert links.exchange_s(8e9, 16) == pytest.approx(8 * 8e9 / 2 / 50e9)
    # ZeRO-3 gathers every weight twice. ZeRO-2 sends the LoRA's gradients and new weights once each.
    lora, base = scaling.LORA_BYTES, scaling.BASE_BYTES
    assert scaling.communication_s("zero2", 8, links) == pytest.approx(2 * lora * 7 / 8 / 100e9)
    assert scaling.communication_s("zero3", 8, links) == pytest.approx((2 * base + 3 * lora) * 7 / 8 / 100e9)
    own = 45_106 / 4 * 3072 * 2
    more = scaling.communication_s("sequence", 8, links, 4) - scaling.communication_s("zero2", 8, links)
    assert more == pytest.approx(42 * 12 * own * 3 / 4 / 100e9)
