"""Levels by bucket, what fits where, and what is said where nothing does. Arithmetic over the real model's sizes."""

import dataclasses
import importlib.util
import shutil
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from cogds.config.loading import load_config
from cogds.config.schema import CHECKPOINTING_MODES
from cogds.core.geometry import ClipShape
from cogds.core.memory import COGVIDEOX_VAE, QUANTIZED_BYTES, rotary_table_bytes
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import inject
from cogds.model.transformer import quantize
from cogds.train import tuning as execution_module
from cogds.train.tuning import (
    Execution,
    Setting,
    Sizes,
    check_execution,
    choose_checkpointing,
    choose_execution,
    execution_lines,
    fits,
    missing_to_compile,
    prepare_blocks,
    shortfall,
)
from tests.core.test_memory import FULL, REAL, REAL_LORA, V15
from tests.model.lora.test_adapter import ATTENTION, example_inputs, randomize

# As ds_configs/*.json are resolved for a width of 3072.
ZERO2 = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 3072**2}
ZERO2_OFFLOAD = ZERO2 | {"offload_optimizer": {"device": "cpu"}}
ZERO3 = ZERO2 | {
    "stage": 3, "stage3_prefetch_bucket_size": 14 * 3072**2, "stage3_max_live_parameters": 42 * 3072**2,
    "stage3_max_reuse_distance": 42 * 3072**2, "stage3_param_persistence_threshold": 200 * 3072,
}  # fmt: skip
ZERO3_OFFLOAD = ZERO3 | {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
WORLD = World(0, 1, 0, 1)


def real(zero=ZERO2, num_ranks=1, quantization="none", sequence_size=1):
    """The published model with a LoRA of rank 128, 81x768x1360, bf16."""
    rotary = rotary_table_bytes(FULL, V15)
    sizes = Sizes(REAL, REAL_LORA)
    return Setting(V15, sizes, COGVIDEOX_VAE, zero, num_ranks, "bf16", quantization, sequence_size, rotary)


def gigabytes(setting, checkpointing):
    return round(setting.estimate(FULL, 1, checkpointing).total_bytes / 1e9, 1)


def test_the_real_model_on_80_gb():
    """What is predicted, not measured: auto keeps attention's outputs, and 44 GB are taken."""
    assert real().least_checkpointing(FULL, 1, 80e9) == "selective"
    assert [gigabytes(real(), checkpointing) for checkpointing in CHECKPOINTING_MODES] == [172.5, 44.2, 32.5, 21.4]
    assert [gigabytes(real(num_ranks=8), checkpointing) for checkpointing in CHECKPOINTING_MODES] == [
        170.9,
        42.6,
        30.9,
        19.8,
    ]
    assert [gigabytes(real(ZERO3, 8), checkpointing) for checkpointing in CHECKPOINTING_MODES] == [
        162.0,
        33.7,
        21.9,
        10.8,
    ]
    assert real(sequence_size=4, num_ranks=4).least_checkpointing(FULL, 1, 80e9) == "none"


@pytest.mark.parametrize(
    "zero, quantization, offloaded, block",
    [
        (ZERO2, "none", 21.4, 32.5), (ZERO2_OFFLOAD, "none", 19.5, 30.6), (ZERO2_OFFLOAD, "int8", 14.2, 25.3),
        (ZERO2, "nf4", 13.5, 24.6), (ZERO2_OFFLOAD, "nf4", 11.6, 22.7), (ZERO3_OFFLOAD, "none", 9.2, 20.3),
    ],
)  # fmt: skip
def test_settings_under_24_gb(zero, quantization, offloaded, block):
    """One GPU. With the blocks' inputs on the host each fits; with them on the GPU, only what ZeRO-3 offloads does."""
    setting = real(zero, quantization=quantization)
    assert (gigabytes(setting, "full+offload"), gigabytes(setting, "full")) == (offloaded, block)
    assert setting.least_checkpointing(FULL, 1, 24e9) == ("full" if zero is ZERO3_OFFLOAD else "full+offload")
    assert fits(setting.estimate(FULL, 1, "full+offload"), 24e9)


def test_what_does_not_fit_is_said_with_what_would():
    setting = real(num_ranks=8)
    assert shortfall(setting, FULL, 1, "full+offload", 24e9) == shortfall(setting, FULL, 1, "none", None) == ""
    # Another checkpointing mode is the first thing to try.
    assert shortfall(setting, FULL, 1, "none", 80e9) == (
        "81x768x1360, batch 1, will not fit: about 170.9 GB with train.activation_checkpointing=none, of 80.0 GB on a "
        "GPU; by the "
        "same arithmetic these fit: train.activation_checkpointing=selective (42.6 GB)"
    )
    sentence = shortfall(setting, FULL, 1, "full+offload", 16e9)
    for way in (
        "model.quantization=int8 (",
        "model.quantization=nf4 (",
        "ds_configs/zero3.json (",
        "ds_configs/zero3_offload.json (",
    ):
        assert way in sentence
    # One alone is not enough for four clips at once.
    pairs = shortfall(real(), FULL, 4, "full", 12e9)
    assert "train.batch_size=1 train.tokens_per_batch=null with " in pairs
    # Quantized weights cannot be sharded.
    assert "zero3" not in shortfall(real(quantization="nf4", num_ranks=8), FULL, 1, "none", 10e9)
    assert "take a smaller bucket or a larger GPU" in shortfall(real(), FULL, 1, "full", 4e9)
    assert "parallel.sequence_size=2 (" in shortfall(real(ZERO2_OFFLOAD, 2), ClipShape(161, 768, 1360), 1, "full", 26e9)


def configured(model, *overrides):
    cfg, _ = load_config(None, [f"model.path={model}", "data.path=clips", *overrides])
    return cfg


BUCKETS = (ClipShape(9, 64, 96), ClipShape(49, 480, 720))


def test_each_bucket_gets_what_fits(tiny_model):
    model, ds_config, sizes = find_model(str(tiny_model)), {"zero_optimization": ZERO2}, (1, 64)

    def modes(device_bytes, *overrides):
        cfg = configured(tiny_model, *overrides)
        return choose_checkpointing(cfg, ds_config, model, BUCKETS, sizes, 1, device_bytes)

    assert modes(None) == modes(80e9) == ("none", "none")
    cfg = configured(tiny_model)
    setting = Setting.of(cfg, ds_config, model, Sizes.of(cfg, model), BUCKETS, 1)
    needs = [setting.estimate(BUCKETS[1], sizes[1], checkpointing).total_bytes for checkpointing in CHECKPOINTING_MODES]
    assert needs == sorted(needs, reverse=True)
    for checkpointing, more, less in zip(CHECKPOINTING_MODES[1:], needs, needs[1:]):
        if less < more:
            assert modes((more + less) / 2 / 0.92) == ("none", checkpointing)
    assert modes(1e6) == ("full+offload",) * 2
    assert modes(
        1e6, "train.activation_checkpointing=none", "train.activation_checkpointing_by_bucket={9x64x96: full}"
    ) == ("full", "none")
    with pytest.raises(UserError, match=r"49x480x72, which is no bucket of this run \(did you mean '49x480x720'"):
        modes(80e9, "train.activation_checkpointing_by_bucket={49x480x72: full}")


def test_the_lines_at_the_start(tiny_model):
    model, cfg = find_model(str(tiny_model)), configured(tiny_model, "train.activation_checkpointing=full")
    execution = choose_execution(cfg, {"zero_optimization": ZERO2}, model, BUCKETS, (1, 1), WORLD)
    assert (execution.kernel, execution.compiled, execution.checkpointing_modes) == ("torch", False, ("full", "full"))
    lines = execution_lines(execution, BUCKETS, (3, 0))
    assert [line for line in lines if line.startswith("  ")] == ["         9x64x96  activation checkpointing full"]
    small = dataclasses.replace(execution, device_bytes=1e9, shortfalls=("too large", "too large as well"))
    lines = execution_lines(small, BUCKETS, (3, 0))
    assert lines[-2].endswith("activation checkpointing full          about 1.0 GB of 1.0 GB")
    assert lines[-1] == "warning: too large"


def on_a_gpu(monkeypatch, tiny_model, missing, *overrides):
    """What is chosen on one rank of a node of two, each with a GPU, where torch.compile lacks `missing`."""
    failures = {"flash3": "undefined symbol: _ZN3c10"}
    monkeypatch.setattr(execution_module, "fastest", lambda *_: ("cudnn", {"cudnn": 0.2, "flash": 0.3}, failures))
    monkeypatch.setattr(execution_module, "use", lambda *_: None)
    monkeypatch.setattr(execution_module, "memory_of", lambda _: 80e9)
    monkeypatch.setattr(execution_module, "missing_to_compile", lambda _: missing)
    world = SimpleNamespace(rank=0, size=1, sequence_size=1, local_size=2, device=torch.device("cuda"))
    cfg = configured(tiny_model, *overrides)
    return choose_execution(cfg, {"zero_optimization": ZERO2}, find_model(str(tiny_model)), BUCKETS, (1, 1), world)


def test_a_kernel_that_does_not_work_is_named_at_the_start(monkeypatch, tiny_model):
    lines = on_a_gpu(monkeypatch, tiny_model, "").lines
    assert lines == (
        "attention kernel: cudnn (of cudnn 200.0 ms, flash 300.0 ms)",
        "  flash3: not usable (undefined symbol: _ZN3c10)",
    )
    assert on_a_gpu(monkeypatch, tiny_model, "", "model.attention=flash").lines == ()


def test_host_memory_is_named_at_the_start(monkeypatch, tiny_model):
    execution = on_a_gpu(monkeypatch, tiny_model, "", "train.activation_checkpointing=full+offload")
    short, long = execution.pinned
    assert 0 < short < long
    execution = dataclasses.replace(execution, pinned=(int(3e9), int(11.6e9)))

    def said(*num_clips):
        return [line for line in execution_lines(execution, BUCKETS, num_clips) if "pinned" in line]

    assert said(1, 1) == ["full+offload keeps 11.6 GB of pinned host memory a GPU, 23.2 GB a node of 2"]
    assert said(1, 0) == ["full+offload keeps 3.0 GB of pinned host memory a GPU, 6.0 GB a node of 2"]
    assert said(0, 0) == []
    assert on_a_gpu(monkeypatch, tiny_model, "", "train.activation_checkpointing=full").pinned == (0, 0)


def test_auto_compiles_where_it_can_and_says_where_it_cannot(monkeypatch, tiny_model):
    assert on_a_gpu(monkeypatch, tiny_model, "").compiled
    without = on_a_gpu(monkeypatch, tiny_model, "triton")
    assert not without.compiled
    assert without.lines[-1] == "model.compile=auto does not compile, and so is slower: it needs triton"
    off = on_a_gpu(monkeypatch, tiny_model, "triton", "model.compile=off")
    assert "model.compile" not in "".join(off.lines)


def test_what_is_asked_for_and_cannot_be_compiled_is_refused(monkeypatch, tiny_model):
    monkeypatch.setattr(execution_module, "missing_to_compile", lambda _: "a C compiler")
    with pytest.raises(UserError, match=r"model\.compile=on needs a C compiler, on rank 0's machine"):
        check_execution(configured(tiny_model, "model.compile=on"), {}, WORLD)
    check_execution(configured(tiny_model), {}, WORLD)


def test_what_compiling_needs(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    there = {"gcc", "g++", "icc"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert missing_to_compile(gpu, {}) == missing_to_compile(cpu, {}) == ""
    assert missing_to_compile(gpu, {"CC": "icc -O2", "CXX": "nothing"}) == ""
    assert missing_to_compile(cpu, {"CXX": "nothing"}) == "a C++ compiler (CXX=nothing is not there)"
    there.clear()
    assert missing_to_compile(gpu, {}) == "a C compiler (gcc or clang)"
    (tmp_path / "Python.h").unlink()
    assert missing_to_compile(gpu, {}).startswith("Python's headers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert missing_to_compile(gpu, {}).startswith("triton")


def test_bases_are_those_that_can_be_made(tiny_model):
    """The names, and the bytes, of `model.quantize`."""
    assert ("none", *QUANTIZED_BYTES) == quantize.QUANTIZATIONS
    setting = Setting.of(
        configured(tiny_model, "model.quantization=nf4", "parallel.sequence_size=2"), {}, find_model(str(tiny_model)),
        Sizes.of(configured(tiny_model), find_model(str(tiny_model))), BUCKETS, 2,
    )  # fmt: skip
    assert (setting.quantization, setting.sequence_size) == ("nf4", 2)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_blocks_that_were_prepared_draw_the_same_dropout_when_they_are_recomputed(tiny_model, dropout):
    modes = CHECKPOINTING_MODES
    transformer = load_transformer(find_model(str(tiny_model)), torch.float32).train()
    parameters = inject(transformer, 4, 8, dropout, ATTENTION, seed=0)
    randomize(parameters)  # B is zero at first, and so would be A's gradients
    prepare_blocks(transformer, Execution("torch", False, modes))
    assert [block.has_dropout for block in transformer.transformer_blocks] == [dropout > 0] * 2

    def gradients(checkpointing):
        transformer.set_checkpointing(checkpointing)
        torch.manual_seed(1)
        return torch.autograd.grad(transformer(**example_inputs())[0].square().mean(), parameters)

    expected = gradients(modes[0])
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for checkpointing in modes[1:]:
        assert all(map(torch.equal, gradients(checkpointing), expected)), checkpointing


def test_no_memory_of_a_cpu_is_counted_on():
    from cogds.train.tuning import memory_of

    assert memory_of(torch.device("cpu")) is None
