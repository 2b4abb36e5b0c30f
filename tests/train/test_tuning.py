"""The execution plan: checkpointing by bucket, attention kernel, compilation, and how the summary shows them."""

import dataclasses
import importlib.util
import shutil
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from cogds.config.schema import CHECKPOINTING_MODES as CONFIG_MODES
from cogds.core.checkpointing import CHECKPOINTING_MODES, BlockCheckpointing
from cogds.core.geometry import ClipShape
from cogds.core.memory import QUANTIZED_FORMATS
from cogds.errors import UserError
from cogds.job import choose_checkpointing
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import inject
from cogds.model.transformer import quantize
from cogds.train import tuning
from cogds.train.run import Run
from cogds.train.summary import bucket_table, execution_lines
from cogds.train.tuning import (
    Execution,
    check_execution,
    choose_execution,
    gpu_memory,
    missing_to_compile,
    prepare_blocks,
)
from tests.jobs import make_job
from tests.model.lora.adapters import ATTENTION, example_inputs, randomize

BUCKETS = (ClipShape(9, 64, 96), ClipShape(49, 480, 480))


@pytest.fixture
def job(tiny_model):
    """`job(*overrides)`: a job on the tiny model with a small and a large bucket."""
    return lambda *words, **settings: make_job(
        f"model.path={tiny_model}", "data.path=clips", "data.buckets=[9x64x96, 49x480x480]", *words, **settings
    )


def test_each_bucket_gets_the_fastest_mode_that_fits(job):
    sizes = (1, 64)

    def modes(gpu_bytes, *overrides):
        return tuple(blocks.mode for blocks in choose_checkpointing(job(*overrides), sizes, gpu_bytes))

    assert modes(None) == modes(80e9) == ("none", "none")
    memory = job().memory
    needs = [memory.estimate(BUCKETS[1], sizes[1], mode).total_bytes for mode in CHECKPOINTING_MODES]
    assert needs == sorted(needs, reverse=True)
    for mode, more, less in zip(CHECKPOINTING_MODES[1:], needs, needs[1:]):
        if less < more:
            assert modes((more + less) / 2 / 0.92) == ("none", mode)
    assert modes(1e6) == ("full+offload",) * 2
    by_bucket = "train.activation_checkpointing_by_bucket={9x64x96: full}"
    assert modes(1e6, "train.activation_checkpointing=none", by_bucket) == ("full", "none")
    with pytest.raises(UserError, match=r"^train\.activation_checkpointing_by_bucket: 49x480x48 .*'49x480x480'"):
        modes(80e9, "train.activation_checkpointing_by_bucket={49x480x48: full}")


def test_only_auto_lets_some_blocks_keep_their_activations(job):
    """The tiny model has two blocks. The last one would be recomputed at once, so keeping it takes no memory."""
    sizes, memory = (1, 64), job().memory
    gpu_bytes = memory.estimate(BUCKETS[1], 64, "selective").total_bytes / 0.92 + 1
    assert choose_checkpointing(job(), sizes, gpu_bytes)[1] == BlockCheckpointing("selective", 1, 2)
    assert choose_checkpointing(job(), sizes, 1e6)[1] == BlockCheckpointing("full+offload")  # nothing fits
    for mode in ("selective", "full"):
        fixed = choose_checkpointing(job(f"train.activation_checkpointing={mode}"), sizes, 1e12)
        assert fixed == (BlockCheckpointing(mode),) * 2
    chosen = choose_checkpointing(job("train.activation_checkpointing_by_bucket={49x480x480: full}"), sizes, gpu_bytes)
    assert chosen == (BlockCheckpointing("none"), BlockCheckpointing("full"))


def run_of(job, execution, *num_clips):
    """Return a run with this number of clips in each bucket."""
    data = SimpleNamespace(index=SimpleNamespace(buckets=BUCKETS, sizes=[(num,) for num in num_clips]))
    plan = SimpleNamespace(local_batch_sizes=(1, 1))
    return Run(job, data, plan, execution, 0)


def test_the_summary_lists_the_used_buckets_with_their_memory_only_on_gpus(job):
    full = job("train.activation_checkpointing=full")
    execution = choose_execution(full, (1, 1))
    assert (execution.kernel, execution.is_compiled) == ("torch", False)
    assert [str(part.checkpointing) for part in execution.buckets] == ["full", "full"]
    header, row = bucket_table(run_of(full, execution, 3, 0))
    assert row.split() == ["9x64x96", "80", "3", "1", "full"]
    assert "GB" not in header + row
    header, row = bucket_table(run_of(full, dataclasses.replace(execution, gpu_bytes=1e9), 3, 0))
    assert row.endswith("1.0 GB of 1.0 GB")
    assert len(header) == len(row)


def test_the_summary_shows_the_split_of_the_blocks(job):
    execution = choose_execution(job(), (1, 1))
    small, large = execution.buckets
    large = dataclasses.replace(large, checkpointing=BlockCheckpointing("selective", 1, 2))
    _, row, split_row = bucket_table(run_of(job(), dataclasses.replace(execution, buckets=(small, large)), 3, 3))
    assert row.endswith(" none")
    assert split_row.endswith(" selective, 1 of 2 blocks kept")


@pytest.fixture
def on_a_gpu(monkeypatch, job):
    """`on_a_gpu(missing, *overrides)`: the execution on a node of two GPUs. missing: see `missing_to_compile`."""

    def choose(missing, *overrides, saved_kernel=None):
        failures = {"flash3": "undefined symbol: _ZN3c10"}
        monkeypatch.setattr(tuning, "find_fastest_kernel", lambda *_: ("cudnn", {"cudnn": 0.2, "flash": 0.3}, failures))
        monkeypatch.setattr(tuning, "require_kernel", lambda *_: None)
        monkeypatch.setattr(tuning, "installed_kernels", lambda _: ("cudnn", "flash", "flash4"))
        monkeypatch.setattr(tuning, "check_kernel", lambda kernel, *_: "no such layout" if kernel == "flash4" else "")
        monkeypatch.setattr(tuning, "gpu_memory", lambda _: 80e9)
        monkeypatch.setattr(tuning, "missing_to_compile", lambda _: missing)
        world = SimpleNamespace(rank=0, size=1, sequence_size=1, local_size=2, device=torch.device("cuda"))
        return choose_execution(dataclasses.replace(job(*overrides), world=world), (1, 1), saved_kernel)

    return choose


def test_notes_have_the_times_and_failures_of_attention_kernels(on_a_gpu):
    execution = on_a_gpu("")
    assert execution.kernel == "cudnn"
    text = "\n".join(execution.notes)
    assert all(part in text for part in ("cudnn 200.0 ms", "flash 300.0 ms", "flash3", "_ZN3c10"))
    assert on_a_gpu("", "model.attention=flash").notes == ()


def test_a_resumed_run_keeps_its_kernel_if_that_still_works(on_a_gpu):
    assert on_a_gpu("", saved_kernel="flash").kernel == "flash"
    replaced = on_a_gpu("", saved_kernel="flash4")
    assert replaced.kernel == "cudnn"
    assert "flash4" in replaced.notes[0]
    assert on_a_gpu("", saved_kernel="removed").kernel == "cudnn"
    assert on_a_gpu("", "model.attention=cudnn", saved_kernel="flash").kernel == "cudnn"


def test_a_configured_kernel_that_does_not_work_is_a_user_error(on_a_gpu):
    with pytest.raises(UserError, match=r"^model\.attention=flash4: .*no such layout"):
        on_a_gpu("", "model.attention=flash4")


def test_the_summary_has_the_pinned_host_memory_of_the_used_buckets(on_a_gpu, job):
    execution = on_a_gpu("", "train.activation_checkpointing=full+offload")
    short, long = (part.pinned_host_bytes for part in execution.buckets)
    assert 0 < short < long
    parts = [
        dataclasses.replace(part, pinned_host_bytes=size)
        for part, size in zip(execution.buckets, (int(3e9), int(11.6e9)))
    ]
    execution = dataclasses.replace(execution, buckets=tuple(parts))

    def lines(*num_clips):
        return [line for line in execution_lines(run_of(job(), execution, *num_clips)) if "pinned" in line]

    assert all(part in lines(1, 1)[0] for part in ("11.6 GB", "23.2 GB"))
    assert all(part in lines(1, 0)[0] for part in ("3.0 GB", "6.0 GB"))
    assert lines(0, 0) == []
    plain = on_a_gpu("", "train.activation_checkpointing=full")
    assert [part.pinned_host_bytes for part in plain.buckets] == [0, 0]


def test_auto_compiles_if_possible_or_notes_what_is_missing(on_a_gpu):
    assert on_a_gpu("").is_compiled
    without = on_a_gpu("triton")
    assert not without.is_compiled
    assert "model.compile=auto" in without.notes[-1]
    assert "triton" in without.notes[-1]
    assert "model.compile" not in "".join(on_a_gpu("triton", "model.compile=off").notes)


def test_compile_on_is_refused_if_something_is_missing(monkeypatch, job):
    monkeypatch.setattr(tuning, "missing_to_compile", lambda _: "a C compiler")
    with pytest.raises(UserError, match=r"^model\.compile: .*a C compiler"):
        check_execution(job("model.compile=on"))
    check_execution(job())


def test_requirements_of_compiling(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    installed = {"gcc", "g++", "icc"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in installed else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert missing_to_compile(gpu, {}) == missing_to_compile(cpu, {}) == ""
    assert missing_to_compile(gpu, {"CC": "icc -O2", "CXX": "nothing"}) == ""
    assert missing_to_compile(cpu, {"CXX": "nothing"}) == "a C++ compiler (CXX=nothing does not exist)"
    installed.clear()
    assert missing_to_compile(gpu, {}) == "a C compiler (gcc or clang)"
    (tmp_path / "Python.h").unlink()
    assert missing_to_compile(gpu, {}).startswith("the Python headers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert missing_to_compile(gpu, {}).startswith("Triton")


def test_names_are_the_same_in_the_config_the_memory_model_and_the_model(job):
    assert ("none", *QUANTIZED_FORMATS) == quantize.QUANTIZATIONS
    assert CHECKPOINTING_MODES == CONFIG_MODES
    memory = job("model.quantization=nf4", "parallel.sequence_size=2", num_ranks=2).memory
    assert (memory.quantization, memory.sequence_size, memory.buckets) == ("nf4", 2, BUCKETS)


def test_models_for_encoding_on_the_fly_are_in_the_memory_model(job):
    assert job().memory.on_the_fly is None
    on_the_fly = job("data.encode=on_the_fly", "data.vae_tiling=on").memory.on_the_fly
    assert on_the_fly.tiled == set(BUCKETS)
    assert on_the_fly.num_batches == 3  # two that wait and one that is encoded


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_blocks_draw_the_same_dropout(tiny_model, dropout):
    transformer = load_transformer(find_model(str(tiny_model)), torch.float32).train()
    parameters = inject(transformer, 4, 8, dropout, ATTENTION, seed=0)
    randomize(parameters)  # B is zero at first, and so would be A's gradients
    prepare_blocks(transformer, Execution("torch", False, ()))
    assert [block.has_dropout for block in transformer.transformer_blocks] == [dropout > 0] * 2

    def gradients(mode):
        transformer.set_checkpointing(mode)
        torch.manual_seed(1)
        return torch.autograd.grad(transformer(**example_inputs())[0].square().mean(), parameters)

    expected = gradients("none")
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for mode in CHECKPOINTING_MODES:
        assert all(map(torch.equal, gradients(mode), expected)), mode


def test_a_cpu_has_no_gpu_memory():
    assert gpu_memory(torch.device("cpu")) is None
