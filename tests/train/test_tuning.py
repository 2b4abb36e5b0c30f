"""Levels by bucket, what fits where, and what is said where nothing does. Arithmetic over the real model's sizes."""

import dataclasses
import importlib.util
import shutil
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from cogds.config.schema import RECOMPUTE_LEVELS, load_config
from cogds.core.geometry import ClipShape
from cogds.core.memory import CHECKPOINTING_MODES, QUANTIZED_FORMATS
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import inject
from cogds.model.transformer import quantize
from cogds.train import tuning as execution_module
from cogds.train.tuning import (
    Execution,
    check_execution,
    choose_execution,
    choose_levels,
    execution_lines,
    memory_model,
    missing_to_compile,
    prepare_blocks,
)
from tests.model.lora.test_adapter import ATTENTION, example_inputs, randomize

ZERO2 = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 3072**2}
WORLD = World(0, 1, 0, 1)


def configured(model, *overrides):
    cfg, _ = load_config(None, [f"model.path={model}", "data.path=clips", *overrides])
    return cfg


BUCKETS = (ClipShape(9, 64, 96), ClipShape(49, 480, 720))


def test_each_bucket_gets_what_fits(tiny_model):
    model, ds_config, sizes = find_model(str(tiny_model)), {"zero_optimization": ZERO2}, (1, 64)

    def levels(device_bytes, *overrides):
        cfg = configured(tiny_model, *overrides)
        return choose_levels(cfg, memory_model(cfg, ds_config, model, BUCKETS, 1), sizes, device_bytes)

    assert levels(None) == levels(80e9) == ("none", "none")
    memory = memory_model(configured(tiny_model), ds_config, model, BUCKETS, 1)
    needs = [memory.estimate(BUCKETS[1], sizes[1], level).total_bytes for level in RECOMPUTE_LEVELS]
    assert needs == sorted(needs, reverse=True)
    for level, more, less in zip(RECOMPUTE_LEVELS[1:], needs, needs[1:]):
        if less < more:
            assert levels((more + less) / 2 / 0.92) == ("none", level)
    assert levels(1e6) == ("block+offload",) * 2
    assert levels(1e6, "train.recompute=none", "train.recompute_by_bucket={9x64x96: block}") == ("block", "none")
    with pytest.raises(UserError, match=r"49x480x72, which is no bucket of this run \(did you mean '49x480x720'"):
        levels(80e9, "train.recompute_by_bucket={49x480x72: block}")


def test_the_lines_at_the_start(tiny_model):
    model, cfg = find_model(str(tiny_model)), configured(tiny_model, "train.recompute=block")
    execution = choose_execution(cfg, {"zero_optimization": ZERO2}, model, BUCKETS, (1, 1), WORLD)
    assert (execution.kernel, execution.compiled, execution.levels) == ("torch", False, ("block", "block"))
    lines = execution_lines(execution, BUCKETS, (3, 0))
    assert [line for line in lines if line.startswith("  ")] == ["         9x64x96  recompute block"]
    small = dataclasses.replace(execution, device_bytes=1e9, shortfalls=("too large", "too large as well"))
    lines = execution_lines(small, BUCKETS, (3, 0))
    assert lines[-2].endswith("recompute block           about 1.0 GB of 1.0 GB")
    assert lines[-1] == "warning: too large"


def on_a_gpu(monkeypatch, tiny_model, missing, *overrides):
    """What is chosen on one rank of a node of two, each with a GPU, where torch.compile lacks `missing`."""
    failures = {"flash3": "undefined symbol: _ZN3c10"}
    monkeypatch.setattr(execution_module, "fastest", lambda *_: ("cudnn", {"cudnn": 0.2, "flash": 0.3}, failures))
    monkeypatch.setattr(execution_module, "use", lambda *_: None)
    monkeypatch.setattr(execution_module, "memory_of", lambda _: 80e9)
    monkeypatch.setattr(execution_module, "missing_to_compile", lambda _: missing)
    world = SimpleNamespace(rank=0, size=1, sequence=1, local_size=2, device=torch.device("cuda"))
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
    execution = on_a_gpu(monkeypatch, tiny_model, "", "train.recompute=block+offload")
    short, long = execution.pinned
    assert 0 < short < long
    execution = dataclasses.replace(execution, pinned=(int(3e9), int(11.6e9)))

    def said(*num_clips):
        return [line for line in execution_lines(execution, BUCKETS, num_clips) if "pinned" in line]

    assert said(1, 1) == ["block+offload keeps 11.6 GB of pinned host memory a GPU, 23.2 GB a node of 2"]
    assert said(1, 0) == ["block+offload keeps 3.0 GB of pinned host memory a GPU, 6.0 GB a node of 2"]
    assert said(0, 0) == []
    assert on_a_gpu(monkeypatch, tiny_model, "", "train.recompute=block").pinned == (0, 0)


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
    assert ("full", *QUANTIZED_FORMATS) == quantize.BASES
    assert CHECKPOINTING_MODES == RECOMPUTE_LEVELS
    cfg = configured(tiny_model, "model.base=nf4", "parallel.sequence=2")
    memory = memory_model(cfg, {}, find_model(str(tiny_model)), BUCKETS, 2)
    assert (memory.quantization, memory.sequence_parallel, memory.buckets) == ("nf4", 2, BUCKETS)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_blocks_that_were_prepared_draw_the_same_dropout_when_they_are_recomputed(tiny_model, dropout):
    levels = RECOMPUTE_LEVELS
    transformer = load_transformer(find_model(str(tiny_model)), torch.float32).train()
    parameters = inject(transformer, 4, 8, dropout, ATTENTION, seed=0)
    randomize(parameters)  # B is zero at first, and so would be A's gradients
    prepare_blocks(transformer, Execution("torch", False, levels))
    assert [block.has_dropout for block in transformer.transformer_blocks] == [dropout > 0] * 2

    def gradients(level):
        transformer.set_level(level)
        torch.manual_seed(1)
        return torch.autograd.grad(transformer(**example_inputs())[0].square().mean(), parameters)

    expected = gradients(levels[0])
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for level in levels[1:]:
        assert all(map(torch.equal, gradients(level), expected)), level


def test_no_memory_of_a_cpu_is_counted_on():
    from cogds.train.tuning import memory_of

    assert memory_of(torch.device("cpu")) is None
