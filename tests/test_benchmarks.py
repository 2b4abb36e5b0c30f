"""Every speed benchmark runs at a tiny size, prints its table and ends with a line of JSON."""

import importlib
import json
import sys
import zipfile

import pytest

from cogds.config.schema import CHECKPOINTING_MODES
from cogds.core.vae_memory import COGVIDEOX_VAE
from tests.conftest import ROOT, free_port, run_command
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
    "peers --sizes tiny --rounds 1 --checkpointing none --kernel auto",
    "memory",
    "vae --size tiny --precision fp32 --rounds 1",
    "quantized_loss --size tiny --quantizations int8 --fp8-matmul off",
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


@pytest.mark.release
def test_vae(outputs):
    values, _ = result(outputs, "vae")
    assert [(row["tiled"], row["layout"]) for row in values["rows"]] == [
        (tiled, layout) for tiled in (True, False, False) for layout in ("default", "channels_last_3d")
    ]
    assert all(row["median_s"] > 0 and row["distance"] < 1e-5 for row in values["rows"])


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The rows of both calls of gpu.sh at tiny size, without video decoders, and the output folder."""
    folder, blocked = tmp_path_factory.mktemp("gpu"), tmp_path_factory.mktemp("blocked")
    for name in ("av", "decord"):
        (blocked / f"{name}.py").write_text("raise ImportError('not on the GPU machine')")
    rows = []
    for call in ("1", "2"):
        variables = [f"PYTHON={sys.executable}", f"PYTHONPATH={blocked}", "OMP_NUM_THREADS=1"]
        command = ["env", *variables, "bash", ROOT / "benchmarks/gpu.sh", folder, call, "--tiny"]
        done = run_command(command, 460)
        assert done.returncode == 0, done.stdout[-4000:]
        rows += map(json.loads, (folder / f"call{call}.jsonl").read_text().splitlines())
    return rows, folder


def rows_of(rehearsal, measurement):
    return [row for row in rehearsal[0] if row["measurement"] == measurement]


@pytest.mark.release
def test_the_gpu_script_measures_everything(rehearsal):
    rows, folder = rehearsal
    assert list(dict.fromkeys(row["measurement"] for row in rows)) == [
        "versions", "attention kernels", "selective, eager", "selective, compiled", "common step, latents given",
        "full, compiled", "full+offload, compiled", "phases of a step", "end",
        "VAE", "ZeRO", "none, compiled", "quantization", "profile",
    ]  # fmt: skip
    assert not [row for row in rows if "skipped" in row]
    assert not [row for row in rows if "error" in row and row["measurement"] != "quantization"]
    assert all(row["is_finite"] for row in rows if "is_finite" in row)
    assert rows_of(rehearsal, "versions")[0]["allocator"] == "expandable_segments:True"
    assert {row["kernel"] for row in rows_of(rehearsal, "attention kernels")} == {"torch", "flash"}
    assert {*rows_of(rehearsal, "phases of a step")[0]["phases_s"]} == {"inputs", "forward", "backward", "optimizer"}
    assert "CompiledFunction" in (folder / "profile.txt").read_text()


@pytest.mark.release
def test_the_gpu_script_compares_results(rehearsal):
    for mode in ("selective", "full", "full+offload"):
        comparison, timing = rows_of(rehearsal, f"{mode}, compiled")
        assert abs(comparison["loss_change"]) < 1e-3
        assert comparison["gradient_distance"] < 0.05
        assert timing["seconds"]
        assert timing["predicted_gb"] > 0
    same, common = rows_of(rehearsal, "common step, latents given")
    assert same["same_work"]["largest_difference"] < 0.02
    assert common["ours_relative"] > 0
    vae = {row["encoded"]: row for row in rows_of(rehearsal, "VAE") if "encoded" in row}
    assert {*vae} == {"whole", "tiled", "one frame"}
    assert all(row["bf16, cuDNN on"] < 0.05 for row in rows_of(rehearsal, "VAE") if "compared_with" in row)
    zero = {row["deepspeed"]: row for row in rows_of(rehearsal, "ZeRO")}
    assert zero["zero2_offload"]["largest_change"] < 1e-4
    assert zero["zero3"]["largest_change"] < 1e-3
    # ZeRO-3 leaves another linear function behind, which must not reach the engines after it.
    assert rows_of(rehearsal, "quantization")[0]["loss"] == zero["zero2"]["losses"][0]


WRONG_LORA = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu, measuring
from pathlib import Path
bench = gpu.Bench(gpu.TINY, Path("unused"))
measuring.join_process_group(bench.world)
shape = gpu.TINY.short
for scale in (1.0, 1.0, 1.5):
    for name, parameter in bench.trainer.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(scale)
    row = bench.pass_row(bench.trainer, shape, "selective", is_reference=bench.reference is None)
    print("distance", row["gradient_distance"])
gpu.disconnect()
"""


@pytest.mark.release
def test_the_gpu_script_notices_a_wrong_lora():
    done = run_command([sys.executable, "-c", WRONG_LORA], 120)
    assert done.returncode == 0, done.stdout
    distances = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("distance")]
    assert distances[:2] == [0.0, 0.0]
    assert distances[2] > 0.01


@pytest.mark.release
def test_peers(outputs):
    values, table = result(outputs, "peers")
    assert values["ratio"] > 0
    assert values["ratio_without_vae"] > 0
    same = values["results"][0]["same_work"]
    assert same["v_loss_ours"] == pytest.approx(same["weighted_x0_loss_common"], rel=1e-4)
    assert same["largest_difference"] < 1e-5
    assert "common, VAE in the loop" in table


@pytest.mark.release
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


@pytest.mark.release
def test_quantized_loss(outputs):
    values, _ = result(outputs, "quantized_loss")
    bf16, fp32, int8 = values["rows"]
    assert (bf16["precision"], fp32["precision"], int8["quantization"]) == ("bf16", "fp32", "int8")
    assert bf16["output_distance"] == 0 < fp32["output_distance"] < 0.02
    assert "error" in int8 or 0 < int8["output_distance"] < 0.05


@pytest.mark.release
def test_loop(outputs):
    values, table = result(outputs, "loop")
    (row,) = values["rows"]
    assert row["median_s"]["loop"] > row["median_s"]["inputs"] > 0
    assert 0 <= row["data_wait_share"] < 1
    assert "engine over plain" in table


@pytest.mark.release
def test_scaling(outputs):
    values, table = result(outputs, "scaling")
    assert [(row["bucket"], row["batch_size"]) for row in values["shapes"]] == [
        ("5x64x64", 1), ("17x64x96", 1), ("5x64x64", 2)
    ]  # fmt: skip
    assert [row["num_clips"] for row in values["clips"]] == [1_000, 100_000, 10_000_000]
    assert "calculated, not measured" in table


@pytest.mark.release
def test_weak_scaling_starts_its_ranks():
    command = [sys.executable, ROOT / "benchmarks/scaling.py", "--size", "tiny", "--parts", "ranks", "--rounds", "1"]
    done = run_command(command, 240)
    assert done.returncode == 0, done.stdout[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])["ranks"]
    assert [(row["deepspeed"], row["ranks"]) for row in rows] == [
        ("zero2", 1), ("zero2", 2), ("zero3", 1), ("zero3", 2)
    ]  # fmt: skip
    assert all(row["efficiency"] > 0 for row in rows)


@pytest.mark.release
@pytest.mark.parametrize("options", [[], ["--in-tars"]])
def test_scan(options):
    command = [sys.executable, ROOT / "benchmarks/scan.py", "--rows", "60", "--films", "12", *options]
    done = run_command(command, 240)
    assert done.returncode == 0, done.stdout[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["ranks"], row["clips"]) for row in rows] == [(ranks, 12 if options else 60) for ranks in (1, 2)]
    assert all(row["scan_s"] >= row["rescan_s"] >= 0 for row in rows)


@pytest.mark.release
def test_training_on_tars_behind_a_server_that_restarts():
    command = [sys.executable, ROOT / "benchmarks/remote_data.py", "--clips", "12", "--steps", "4"]
    command += ["--encode", "on_the_fly"]
    done = run_command(command, 580)
    assert done.returncode == 0, done.stdout[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["steps"] for row in rows] == [4] * 2
    assert [row.get("same_losses") for row in rows] == [None, True]
    assert all(row["restarts"] > 0 for row in rows if row["data"] != "files")


@pytest.mark.release
def test_one_block_of_the_real_geometry_is_trained_and_loads_in_diffusers(tmp_path):
    """In float32, because some CPUs multiply in bf16 a hundred times slower."""
    words = ["--layers", "1", "--precision", "fp32", "--rank", "4", "--no-trial-step", "--port", free_port()]
    done = run_command([sys.executable, ROOT / "benchmarks/real_geometry.py", tmp_path / "real", *words], 900)
    assert done.returncode == 0, done.stdout[-6000:]
    values = json.loads(done.stdout.splitlines()[-1])
    assert [row["command"] for row in values["rows"]] == [
        "create the folder", "report", "preflight without a step", "train --dry-run", "train", "export",
        "load in diffusers",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["peak_gb"] > row["own_gb"] > 0 for row in values["rows"])
    assert len([name for name in values["files"] if name.endswith(".safetensors")]) == 3
    assert (values["is_trained"], len(values["losses"])) == (True, 2)
    lora = values["lora"]
    assert (lora["num_tensors"], lora["num_trained"], lora["scale"]) == (8, 4, 1.0)
    assert lora["largest_change"] > 0
    assert not (tmp_path / "real").exists()


@pytest.fixture(scope="module")
def scripts():
    """Import a benchmark as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


def test_full_from_scratch_starts_as_the_recipe_does(scripts, tmp_path):
    """The same random weights, the same clips, and no loss in their files."""
    from types import SimpleNamespace

    import torch

    from cogds.data.video.media import read_clip

    bench = scripts("full_from_scratch")
    bench.write_model(tmp_path / "model")
    model = bench.find_model(str(tmp_path / "model"))
    loaded = bench.recipe.CogVideoXTransformer3DModel.from_pretrained(model.path, subfolder="transformer")
    expected = bench.recipe.create(bench.SEED).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    shipped = bench.find_model(bench.SHAPES_MODEL).path
    assert (model.path / "vae").resolve() == (shipped / "vae").resolve()

    drawn = []

    def encode(clips):
        drawn.append((clips.transpose(1, 2) + 1) / 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: clips))

    scenes, captions = list(bench.recipe_scenes(10)), []
    for rank in range(bench.RANKS):
        numbers = bench.Numbers(bench.SEED * 1000 + 2 + rank)
        for size in bench.SIZES:
            captions += bench.recipe.encode_clips(SimpleNamespace(encode=encode), size, 10, numbers)[2]
    assert [scene.caption for scene in scenes] == captions
    assert all((scene.draw() - clip).abs().max() < 1e-6 for scene, clip in zip(scenes, (c for b in drawn for c in b)))

    bench.write_clips(tmp_path / "clips", scenes[::20])
    for number, scene in enumerate(scenes[::20]):
        shape = bench.ClipShape(scene.frames, scene.height, scene.width)
        read = read_clip(tmp_path / f"clips/clip_{number:05d}.mkv", shape, bench.FPS)
        assert (read == bench.to_uint8(scene.draw())).all()


def test_full_from_scratch_has_the_schedule_of_the_recipe(scripts, tmp_path):
    from types import SimpleNamespace

    from cogds.config.loading import load_config
    from cogds.core.lr_schedule import learning_rate

    bench, rates = scripts("full_from_scratch"), []
    args = SimpleNamespace(run="run", steps=2000, saves=4, batch_size=24, words=["optimizer.lr=1.0"])
    for last, words in bench.schedule_words(2000, None).items():
        cfg, _ = load_config(None, [*bench.config_words(tmp_path, args), *words])
        assert (cfg.train.method, cfg.train.num_steps, len(cfg.data.buckets)) == ("full", last, len(bench.SIZES))
        keys = cfg.optimizer
        rates += [
            learning_rate(step, keys.lr, keys.schedule, last, keys.warmup_steps, keys.final_lr_ratio)
            for step in range(len(rates), last)
        ]
    recipe = [min(1.0, (step + 1) / 30) * min(1.0, (1 - step / 2000) / 0.6) for step in range(2000)]
    assert rates == pytest.approx(recipe, abs=0.04)
    assert list(bench.schedule_words(60, 60)) == [60]


@pytest.mark.release
def test_full_from_scratch(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/full_from_scratch.py", tmp_path / "out", "--clips", "1"]
    command += ["--steps", "2", "--constant-steps", "2", "--batch-size", "1", "--saves", "1", "--videos", "2"]
    done = run_command(command, 480)
    assert done.returncode == 0, done.stdout[-4000:]
    values = json.loads(done.stdout.splitlines()[-1])
    assert [point["step"] for point in values["curve"]] == [0, 2]
    recipe, average, live = values["models"].values()
    assert recipe["first_frame_psnr"][0] > 30 > live["first_frame_psnr"][0]  # two steps from random weights
    assert average.keys() == live.keys() == recipe.keys()


@pytest.mark.release
def test_conditions(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks/conditions.py",
        tmp_path / "out",
        "--loras",
        "mixed",
        "more",
        "control",
    ]
    command += ["--seeds", "0", "--clips", "4", "--videos", "1", "--steps", "2"]
    done = run_command(command, 480)
    assert done.returncode == 0, done.stdout[-4000:]
    names = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    expected = {"first": "mixed", "first_last": "mixed", "prefix": "mixed", "last": "more", "suffix": "more",
                "keyframes": "more", "control": "control"}  # fmt: skip
    assert names == [name for mode, lora in expected.items() for name in (f"| `{mode}`", "| base", f"| {lora}")]
    assert len(list((tmp_path / "out").glob("*.png"))) == 2 * len(expected)


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


def test_the_gpu_script_skips_what_no_longer_fits(scripts, tmp_path):
    """Each line is on disk before the next measurement, and a slow machine makes the later ones longer."""
    gpu, now, path = scripts("gpu"), [10.0], tmp_path / "new" / "call1.jsonl"
    lines = lambda: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731

    def takes(seconds, error=None):
        def rows():
            yield {"number": len(lines())}
            now[0] += seconds
            if error:
                raise error

        return rows

    names = ("on time", "slow", "fails", "too long", "short")
    seconds = (takes(10), takes(50), takes(1, RuntimeError("no kernel\nmore")), takes(30), takes(5))
    expected = (10, 20, 1, 30, 5)
    measurements = [gpu.Measurement(*values) for values in zip(names, expected, seconds)]
    record = gpu.Record(path, lambda: now[0])
    assert not gpu.measure_all(measurements, record, 120.0, 1.0, lambda: now[0])
    rows = lines()
    assert [row["measurement"] for row in rows] == ["on time", "slow", "fails", "fails", "too long", "short", "end"]
    assert [row["number"] for row in rows if "number" in row] == [0, 1, 2, 5]
    assert rows[3]["error"] == "RuntimeError: no kernel"
    assert rows[4]["skipped"] == "needs about 60 s, and 49 s are left"  # twice as slow as expected
    assert gpu.measure_all(measurements[:1], record, 120.0, 1.0, lambda: now[0])


def test_the_gpu_script_reports_wrong_kernels(scripts, monkeypatch):
    import torch

    gpu = scripts("gpu")
    from cogds.model.transformer import attention

    def wrong(query, key, value):
        return 1.1 * torch.nn.functional.scaled_dot_product_attention(query, key, value)

    cpu = torch.device("cpu")
    right = gpu.attention_row("torch", 40, 2, 16, cpu)
    assert right["is_finite"]
    assert right["problem"] == ""
    assert right["forward_ms"] > 0 < right["backward_ms"]
    monkeypatch.setitem(attention.KERNELS, "torch", (wrong, None))
    assert "output differs" in gpu.attention_row("torch", 40, 2, 16, cpu)["problem"]
    assert "not available" in gpu.attention_row("cudnn", 40, 2, 16, cpu)["error"]


def test_the_gpu_script_installs_wheels_without_a_network(tmp_path):
    wheels, stub = tmp_path / "wheels", tmp_path / "python"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "here = True")
        info = "carried-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    show = "import carried, os, sys; print(*sys.argv[1:], os.environ['HF_HUB_OFFLINE'])"
    stub.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && exec {sys.executable} "$@"\nshift 2\nexec {sys.executable} -c "{show}" "$@"\n'
    )
    stub.chmod(0o755)
    command = ["bash", ROOT / "benchmarks/gpu.sh", "out", "2", "--wheels", wheels, "--tiny"]
    done = run_command(["env", f"PYTHON={stub}", *command], 60)
    assert done.returncode == 0, done.stdout
    out, call, tiny, option, limit_s, offline = done.stdout.split()
    assert (out, call, tiny, option, offline) == ("out", "2", "--tiny", "--limit-s", "1")
    assert 400 <= int(limit_s) <= 435


def test_the_real_size_is_the_published_model(scripts):
    measuring = scripts("measuring")
    size = measuring.SIZES["real"]
    model, cfg = measuring.model_of(size), measuring.run_config("bf16", size.lora_rank)
    assert model.geometry == V15
    assert measuring.num_tokens(measuring.ClipShape.parse(size.bucket), model.geometry) == 45_106
    shape, world = measuring.ClipShape.parse(size.bucket), measuring.World(0, 1, 0, 1)
    memory = measuring.make_job(cfg, "zero2", model, shape, world).memory
    assert (memory.transformer, memory.trained, memory.vae) == (TRANSFORMER, LORA, COGVIDEOX_VAE)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 2080", None),
    ],
)  # fmt: skip
def test_mfu_needs_the_exact_device_name(scripts, monkeypatch, name, peak):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert scripts("gpu").peak_rate(torch.device("cuda")) == peak


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
