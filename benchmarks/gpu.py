"""Measure cogds on one GPU: one process, one import, one model, the most important first. Run by benchmarks/gpu.sh.

    python benchmarks/gpu.py FOLDER 1 [--tiny] [--limit-s 440]
    python benchmarks/gpu.py FOLDER 2 [--tiny] [--limit-s 440]

Call 1: versions and allocator; attention kernels; a step with selective checkpointing, eager and compiled; the common
step of `peers.py` with latents given; full and full+offload; the phases of a step.
Call 2: the VAE whole, tiled and on one frame, and cuDNN on against off; the losses of ZeRO-3 and zero2_offload against
zero2; a shorter bucket without checkpointing; nf4 and fp8; a profile.

The model has the sizes of CogVideoX-1.5-5B with random weights, drawn once on the GPU and shared by all engines, so no
model, clips or network are needed. Every measurement is a line of JSON in FOLDER/call1.jsonl or call2.jsonl, which is
on disk before the next one starts. A measurement that would not fit into the time left is a line with "skipped", and
one that fails a line with "error"; the exit code is then 1. (A
kernel or quantization that this machine does not support is only a line with its error.)

In every checkpointing mode, loss and gradients are compared with those of the first one (relative L2 distance). The
learning rate is 0 there, so that the weights stay equal. Peak memory counts tensors, less those of other engines, next
to the prediction of the memory model. On a CPU (--tiny), both say nothing.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import (
    SIZES,
    Size,
    Trainer,
    free,
    held_bytes,
    model_of,
    peak_bytes,
    process_age_s,
    reset_peak,
    timed,
    wait,
)
from peers import SMALL, CommonStep, difference
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cogds.core.diffusion import v_loss
from cogds.core.flops import PEAK_TFLOPS, step_flops
from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.vae_memory import VaeSize, vae_encode_bytes
from cogds.distributed.process_group import disconnect
from cogds.distributed.world import read_world
from cogds.engine.start import set_learning_rate
from cogds.errors import brief
from cogds.model.cudnn import cudnn_version, find_cudnn_problem
from cogds.model.load import build_transformer
from cogds.model.transformer.attention import (
    activate_kernel,
    attend,
    find_fastest_kernel,
    installed_kernels,
    measure_errors,
)
from cogds.model.transformer.forward import Transformer
from cogds.model.transformer.quantize import check_quantization, pack_block

Rows = Iterator[dict[str, Any]]
PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "transformers", "peft", "torchao", "bitsandbytes")
DTYPE = torch.bfloat16
LEARNING_RATE = 1e-4
NUM_LOSSES = 4
PROFILE_ROWS = 30


@dataclass(frozen=True)
class Setup:
    """What is measured.

    long, middle, short: buckets; tile: what the VAE encodes with cuDNN on and off; backend: of torch.compile;
    pace: seconds that measurements take, relative to `Measurement.expected_s`.
    """

    size: Size
    long: ClipShape
    middle: ClipShape
    short: ClipShape
    tile: ClipShape
    backend: str
    pace: float


def make_setup(size: str, buckets: Sequence[str], backend: str, pace: float) -> Setup:
    """buckets: long, middle, short and tile."""
    long, middle, short, tile = map(ClipShape.parse, buckets)
    return Setup(SIZES[size], long, middle, short, tile, backend, pace)


REAL = make_setup("real", ("81x768x1360", "49x768x1360", "49x480x720", "9x192x320"), "inductor", 1.0)
# A CPU would compile C++ for minutes. `aot_eager` does the rest: it traces, and it partitions the backward pass.
TINY = make_setup("tiny", ("17x64x96", "9x64x64", "5x64x64", "9x32x48"), "aot_eager", 0.1)


@dataclass(frozen=True)
class Measurement:
    """A name, the seconds that it takes on an H200 by arithmetic, and the function that yields its rows."""

    name: str
    expected_s: float
    rows: Callable[[], Rows]


class Record:
    """The file with a line per row. A line is on disk when `write` returns."""

    def __init__(self, path: Path, age_s: Callable[[], float] = process_age_s):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._age_s = path.open("w"), age_s

    def write(self, measurement: str, **row: Any) -> None:
        line = json.dumps({"measurement": measurement, "age_s": round(self._age_s(), 1), **row})
        print(line, file=self._file, flush=True)
        os.fsync(self._file.fileno())
        print(line, flush=True)


def measure_all(
    measurements: Sequence[Measurement], record: Record, limit_s: float, pace: float,
    age_s: Callable[[], float] = process_age_s,
) -> bool:  # fmt: skip
    """Run what fits into the time left, in order, and return whether nothing failed.

    pace: seconds per expected second. If measurements take longer than expected, the later ones are expected to, too.
    """
    expected_s = taken_s = 0.0
    is_right = True
    for measurement in measurements:
        slowdown = max(1.0, taken_s / expected_s) if expected_s else 1.0
        needed_s, left_s = measurement.expected_s * pace * slowdown, limit_s - age_s()
        if needed_s > left_s:
            record.write(measurement.name, skipped=f"needs about {needed_s:.0f} s, and {left_s:.0f} s are left")
            continue
        start_s = age_s()
        try:
            for row in measurement.rows():
                record.write(measurement.name, **row)
        except Exception as error:  # the others may work
            record.write(measurement.name, error=brief(error))
            is_right = False
        else:
            expected_s, taken_s = expected_s + measurement.expected_s * pace, taken_s + age_s() - start_s
        gc.collect()
        torch.cuda.empty_cache()
    record.write("end", limit_s=limit_s)
    return is_right


def attention_row(kernel: str, tokens: int, num_heads: int, head_dim: int, device: torch.device) -> dict[str, Any]:
    """Time a kernel over one clip, forward and backward (the fastest of three runs), and compare it with float32."""
    row: dict[str, Any] = {"tokens": tokens, "kernel": kernel}
    try:
        activate_kernel(kernel, device)
        errors = measure_errors(kernel, tokens, num_heads, head_dim, DTYPE, device)
        row |= {"is_finite": errors.is_finite, "errors": errors.relative, "problem": errors.problem(DTYPE)}
        query, key, value, gradient = (
            torch.randn(1, tokens, num_heads, head_dim, dtype=DTYPE, device=device, requires_grad=True)
            for _ in range(4)
        )
        output = attend(query, key, value, kernel)
        passes = {
            "forward": lambda: attend(query, key, value, kernel),
            "backward": lambda: torch.autograd.grad(output, (query, key, value), gradient, retain_graph=True),
        }
        flops = step_flops(tokens, 1, num_heads * head_dim).attention
        for name, factor in (("forward", 1.0), ("backward", 2.5)):
            seconds = min(timed(passes[name], device) for _ in range(3))
            row |= {f"{name}_ms": round(1e3 * seconds, 3), f"{name}_tflops": round(factor * flops / seconds / 1e12, 1)}
    except Exception as error:  # an unsupported GPU, type or shape, or a package that does not load
        row["error"] = brief(error)
    return row


def expandable_segments(device: torch.device) -> bool | None:
    """Whether the allocator uses them: asked of its segments, since the variable may have been set too late."""
    if device.type != "cuda":
        return None
    tensor = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    segments = torch.cuda.memory_snapshot()
    del tensor
    return bool(segments) and all(segment.get("is_expandable", False) for segment in segments)


def peak_rate(device: torch.device) -> float | None:
    """Peak bf16 TFLOP/s of this device, None if unknown."""
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Bench:
    """The model, and all measurements on it. The base, the VAE and the kernel are made when they are first needed."""

    def __init__(self, setup: Setup, folder: Path):
        self.setup, self.folder, self.world = setup, folder, read_world()
        self.device, self.size = self.world.device, setup.size
        self.model = model_of(self.size)
        self.cfg = measuring.run_config("bf16", self.size.lora_rank)
        self.reference: tuple[float, torch.Tensor] | None = None
        self.steps: dict[str, float] = {}  # median seconds by mode
        self._trainer: Trainer | None = None
        self._kernels: dict[str, float] = {}  # seconds of the right ones at the long bucket

    # -------------------------------------------------------------------------------------------------- shared parts

    @functools.cached_property
    def vae(self) -> Any:
        return measuring.random_vae(self.size, DTYPE, self.device)

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The frozen base, in memory once."""
        torch.manual_seed(0)
        return build_transformer(self.model, DTYPE, self.device).state_dict()

    @functools.cached_property
    def base_bytes(self) -> int:
        """Memory of base and VAE."""
        assert self.weights
        assert self.vae is not None
        free(self.device)
        return held_bytes(self.device) or 0

    @functools.cached_property
    def kernel(self) -> str:
        """The fastest attention kernel that is right."""
        if self._kernels:
            return min(self._kernels, key=lambda name: self._kernels[name])
        heads = self.size.transformer["num_attention_heads"]
        return find_fastest_kernel(
            self.tokens(self.setup.long), heads, self.model.geometry.head_dim, DTYPE, self.device
        )[0]

    def tokens(self, shape: ClipShape) -> int:
        return num_tokens(shape, self.model.geometry)

    def new_trainer(self, ds_name: str = "zero2", quantization: str = "none", fp8_matmul: bool = False) -> Trainer:
        """Return an engine around the shared base, with learning rate 0 and the same LoRA as every other."""
        check_quantization(quantization, fp8_matmul, "bf16", int(ds_name[4]), self.device)
        assert self.base_bytes >= 0
        others = (held_bytes(self.device) or 0) - self.base_bytes
        transformer = measuring.share_weights(Transformer, self.size.transformer, self.weights)
        if quantization != "none" or fp8_matmul:
            for block in transformer.transformer_blocks:
                pack_block(block, quantization, fp8_matmul, fill=True)
        overrides = f"model.quantization={quantization}", f"model.fp8_matmul={str(fp8_matmul).lower()}"
        cfg = measuring.run_config("bf16", self.size.lora_rank, *overrides)
        trainer = Trainer(self.size, cfg, ds_name, self.world, transformer, self.vae)
        activate_kernel(self.kernel, self.device)
        trainer.transformer.set_kernel(self.kernel)
        set_learning_rate(trainer.engine, 0.0)
        used = {parameter.data_ptr() for parameter in trainer.transformer.parameters()}
        others += sum(weight.nbytes for weight in self.weights.values() if weight.data_ptr() not in used)
        trainer.others_bytes = others
        return trainer

    @property
    def trainer(self) -> Trainer:
        """The ZeRO-2 engine that most measurements use."""
        self._trainer = self._trainer or self.new_trainer()
        return self._trainer

    @contextlib.contextmanager
    def temporary(self, *args: Any) -> Iterator[Trainer]:
        """An engine that is freed at the end."""
        linear = torch.nn.functional.linear
        trainer = self.new_trainer(*args)
        try:
            yield trainer
        finally:
            trainer.close()
            # ZeRO-3 replaces it for the whole process by one that rounds differently, and leaves it so.
            torch.nn.functional.linear = linear

    def memory(self, trainer: Trainer, shape: ClipShape, mode: str) -> dict[str, float]:
        """Peak memory of tensors since `reset_peak`, and what was predicted."""
        predicted = measuring.estimate_bytes(self.size, trainer.cfg, trainer.ds_name, shape, 1, mode, self.world)
        peak = (peak_bytes(self.device) or 0) - trainer.others_bytes
        return {"peak_gb": round(peak / 1e9, 3), "predicted_gb": round(predicted / 1e9, 3)}

    # --------------------------------------------------------------------------------------------------------- steps

    def pass_row(self, trainer: Trainer, shape: ClipShape, mode: str, is_reference: bool = False) -> dict[str, Any]:
        """Run forward and backward without an update, for the first time in this mode: compiles, and compares."""
        trainer.transformer.set_checkpointing(mode)
        inputs, target = trainer.inputs(shape)
        wait(self.device)
        start = time.perf_counter()
        loss = v_loss(trainer.transformer(**inputs)[0], target).mean()
        parameters = [parameter for parameter in trainer.transformer.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters)
        wait(self.device)
        seconds = time.perf_counter() - start
        result = loss.item(), torch.cat([gradient.float().flatten().cpu() for gradient in gradients])
        if is_reference:
            self.reference = result
        row = {"first_pass_s": round(seconds, 3), "loss": result[0], "gradient_norm": result[1].norm().item()}
        row["is_finite"] = math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])
        if self.reference is not None:
            row["loss_change"] = result[0] / self.reference[0] - 1
            row["gradient_distance"] = measuring.distance(result[1], self.reference[1])
        return row

    def step_row(self, trainer: Trainer, shape: ClipShape, mode: str, num_steps: int) -> dict[str, Any]:
        """Time whole steps, after `pass_row`."""
        free(self.device)
        reset_peak(self.device)
        seconds = sorted(timed(lambda: trainer.step(shape), self.device) for _ in range(num_steps))
        median_s = seconds[len(seconds) // 2]
        flops, peak = trainer.flops(shape), peak_rate(self.device)
        row: dict[str, Any] = {"seconds": [round(number, 4) for number in seconds], **self.memory(trainer, shape, mode)}
        row["tflops"] = round(flops.model_flops / median_s / 1e12, 2)
        if peak:
            row["mfu"] = round(row["tflops"] / peak, 4)
            row["floor_s"] = round(flops.hardware_flops(mode) / peak / 1e12, 3)
        return row

    def mode_rows(
        self, trainer: Trainer, shape: ClipShape, mode: str, compiled: bool, num_steps: int = 2,
        is_reference: bool = False,
    ) -> Rows:  # fmt: skip
        """Yield the comparison and the timing of one checkpointing mode."""
        trainer.set_compiled(compiled, self.setup.backend)
        name = {"bucket": str(shape), "tokens": self.tokens(shape), "checkpointing": mode, "compiled": compiled}
        name["kernel"] = self.kernel
        yield {**name, **self.pass_row(trainer, shape, mode, is_reference)}
        row = self.step_row(trainer, shape, mode, num_steps)
        if compiled:
            self.steps[f"{shape} {mode}"] = row["seconds"][len(row["seconds"]) // 2]
        yield {**name, **row}

    # -------------------------------------------------------------------------------------------------------- call 1

    def versions(self) -> Rows:
        row: dict[str, Any] = {"size": self.size.name, "machine": measuring.machine(self.device)}
        row["packages"] = {}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                row["packages"][name] = importlib.metadata.version(name)
        row |= {"cuda": torch.version.cuda, "cudnn": cudnn_version()}
        row["cudnn_problem"] = find_cudnn_problem(row["cudnn"], DTYPE)
        row["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        row["expandable_segments"] = expandable_segments(self.device)
        if self.device.type == "cuda":
            row["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            row["driver"] = _nvidia_smi("driver_version,clocks.max.sm,power.limit")
        yield row

    def kernels(self) -> Rows:
        heads, head_dim = self.size.transformer["num_attention_heads"], self.model.geometry.head_dim
        for shape in (self.setup.long, self.setup.middle):
            for kernel in installed_kernels(self.device):
                if kernel == "math":  # stores the whole attention matrix
                    continue
                row = attention_row(kernel, self.tokens(shape), heads, head_dim, self.device)
                if shape == self.setup.long and not row.get("error") and not row["problem"]:
                    self._kernels[kernel] = row["forward_ms"] + row["backward_ms"]
                yield row
                free(self.device)

    def selective_eager(self) -> Rows:
        yield from self.mode_rows(self.trainer, self.setup.long, "selective", False, 1, is_reference=True)

    def compiled(self, mode: str) -> Rows:
        yield from self.mode_rows(self.trainer, self.setup.long, mode, True)

    def common_step(self) -> Rows:
        """The common step, compared with ours on a small clip, then timed."""
        ours = self.trainer
        before = (held_bytes(self.device) or 0) - self.base_bytes
        common = CommonStep(self.size, "bf16", self.weights, self.vae, self.kernel, self.device)
        common.allocate()
        ours.set_compiled(False)
        yield {"same_work": difference(common, ours, SMALL)}
        step = functools.partial(common.step, False)
        first_s = timed(step, self.device)
        reset_peak(self.device)
        seconds = timed(step, self.device)
        peak = (peak_bytes(self.device) or 0) - before
        row: dict[str, Any] = {"bucket": str(common.shape), "kernel": self.kernel, "first_s": round(first_s, 3)}
        row |= {"seconds": [round(seconds, 4)], "peak_gb": round(peak / 1e9, 3)}
        if own_s := self.steps.get(f"{common.shape} selective"):
            row["ours_relative"] = round(own_s / seconds, 4)
        yield row

    def phases(self) -> Rows:
        """The phases of a compiled step, each until the device has finished it."""
        trainer, shape = self.trainer, self.setup.long
        trainer.transformer.set_checkpointing("selective")
        trainer.set_compiled(True, self.setup.backend)
        seconds: dict[str, float] = {}

        def run(name: str, call: Callable[[], Any]) -> Any:
            results: list[Any] = []
            seconds[name] = round(timed(lambda: results.append(call()), self.device), 4)
            return results[0]

        inputs, target = run("inputs", lambda: trainer.inputs(shape))
        loss = run("forward", lambda: v_loss(trainer.engine(**inputs)[0], target).mean())
        run("backward", lambda: trainer.engine.backward(loss))
        run("optimizer", trainer.engine.step)
        yield {"bucket": str(shape), "checkpointing": "selective", "compiled": True, "phases_s": seconds}

    # -------------------------------------------------------------------------------------------------------- call 2

    def vae_encoding(self) -> Rows:
        """The VAE's time and memory, then whether it is right with cuDNN."""
        long = self.setup.long
        frame = ClipShape(1, long.height, long.width)
        vae_size = VaeSize.from_config(self.size.vae, sum(weight.numel() for weight in self.vae.parameters()))
        for name, shape, tiled in (("whole", long, False), ("tiled", long, True), ("one frame", frame, False)):
            yield {"encoded": name, **self.encode_row(shape, tiled, vae_size)}
            free(self.device)
        self.vae.disable_tiling()
        exact = copy.deepcopy(self.vae).float()
        for shape in (self.setup.tile, ClipShape(1, self.setup.short.height, self.setup.short.width), frame):
            yield self.cudnn_row(exact, shape)

    def encode_row(self, shape: ClipShape, tiled: bool, vae_size: VaeSize) -> dict[str, Any]:
        """Time and memory of encoding one clip."""
        (self.vae.enable_tiling if tiled else self.vae.disable_tiling)()
        before = held_bytes(self.device) or 0  # the prediction includes the pixels
        video, results = self.random_video(shape), []
        first_s = timed(lambda: _encode(self.vae, video), self.device)
        reset_peak(self.device)
        seconds = timed(lambda: results.append(_encode(self.vae, video)), self.device)
        peak = (peak_bytes(self.device) or 0) - before
        row: dict[str, Any] = {"clip": str(shape), "first_s": round(first_s, 3), "seconds": round(seconds, 4)}
        row |= {
            "peak_gb": round(peak / 1e9, 3),
            "predicted_gb": round(vae_encode_bytes(shape, tiled, vae_size) / 1e9, 3),
        }
        return {**row, "is_finite": bool(results[0].isfinite().all())}

    def cudnn_row(self, exact: Any, shape: ClipShape) -> dict[str, Any]:
        """Distances of moments from those of `exact`, the VAE in float32, with cuDNN on and off.

        Without cuDNN, a convolution stores 27 values per input value. If these are more than 2^31, which torch's
        kernels might not index, everything is computed with cuDNN.
        """
        video = self.random_video(shape)
        is_small = 27 * self.size.vae["block_out_channels"][0] * shape.frames * shape.height * shape.width < 2**31

        def encode(vae: Any, cudnn: bool) -> torch.Tensor:
            with torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=False):
                return _encode(vae, video.to(vae.dtype)).float()

        reference = encode(exact, not is_small)
        row: dict[str, Any] = {"clip": str(shape), "compared_with": f"float32, cuDNN {'off' if is_small else 'on'}"}
        row["bf16, cuDNN on"] = measuring.distance(encode(self.vae, True), reference)
        if is_small:
            row["bf16, cuDNN off"] = measuring.distance(encode(self.vae, False), reference)
            row["float32, cuDNN on"] = measuring.distance(encode(exact, True), reference)
        return row

    def random_video(self, shape: ClipShape) -> torch.Tensor:
        """Pixels [1, 3, F, H, W] in [-1, 1]."""
        numbers = torch.Generator(self.device).manual_seed(0)
        sizes = 1, 3, shape.frames, shape.height, shape.width
        return torch.rand(sizes, generator=numbers, device=self.device, dtype=DTYPE) * 2 - 1

    def zero_stages(self) -> Rows:
        """Losses of a few steps on one batch, by ZeRO configuration. The first pass is the reference of `quantized`."""
        shape, mode, expected = self.setup.short, "selective", None
        for ds_name in ("zero2", "zero2_offload", "zero3"):
            with self.temporary(ds_name) as trainer:
                if expected is None:
                    self.pass_row(trainer, shape, mode, is_reference=True)
                trainer.transformer.set_checkpointing(mode)
                set_learning_rate(trainer.engine, LEARNING_RATE)
                losses, seconds = [], []
                reset_peak(self.device)
                for _ in range(NUM_LOSSES):
                    seconds.append(timed(lambda: losses.append(trainer.step(shape).item()), self.device))  # noqa: B023
                expected = expected or losses
                row: dict[str, Any] = {"deepspeed": ds_name, "bucket": str(shape), "losses": losses}
                row["largest_change"] = max(abs(a / b - 1) for a, b in zip(losses, expected))
                row |= {"seconds": [round(number, 4) for number in seconds], **self.memory(trainer, shape, mode)}
            yield row

    def no_checkpointing(self) -> Rows:
        self.reference = None  # of another bucket
        yield from self.mode_rows(self.trainer, self.setup.middle, "none", True)

    def quantized(self) -> Rows:
        """Each quantization against the full base, eager, on the short bucket."""
        shape, mode = self.setup.short, "selective"
        kinds = (("none", False), ("nf4", False), ("fp8", False), ("fp8", True))
        self.reference = None
        for quantization, fp8_matmul in kinds:
            row: dict[str, Any] = {"quantization": quantization, "fp8_matmul": fp8_matmul}
            try:
                with self.temporary("zero2", quantization, fp8_matmul) as trainer:
                    rows = self.mode_rows(trainer, shape, mode, False, is_reference=quantization == "none")
                    row |= {name: value for part in rows for name, value in part.items()}
            except Exception as error:  # a package that is missing or does not support this device
                row["error"] = brief(error)
            yield row
            free(self.device)

    def profile(self) -> Rows:
        """The time of one compiled step by operation. The whole table goes to profile.txt."""
        trainer, shape = self.trainer, self.setup.long
        self.reference = None
        trainer.set_compiled(True, self.setup.backend)
        yield {"bucket": str(shape), **self.pass_row(trainer, shape, "selective")}
        gpu = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
            trainer.step(shape)
            wait(self.device)
        averages, order = profiler.key_averages(), f"self_{'device' if gpu else 'cpu'}_time_total"
        table = averages.table(sort_by=order, row_limit=3 * PROFILE_ROWS, max_name_column_width=90)
        (self.folder / "profile.txt").write_text(table)
        # On a GPU, each kernel counts for itself and for the operation that started it.
        times = [
            (round(getattr(event, order) / 1e3, 2), event.count, event.key[:90])
            for event in averages
            if not gpu or (event.device_type == DeviceType.CUDA and not event.is_user_annotation)
        ]
        yield {
            "total_ms": round(sum(milliseconds for milliseconds, *_ in times), 1),
            "ms_count_operation": sorted(times, reverse=True)[:PROFILE_ROWS],
        }

    # --------------------------------------------------------------------------------------------------------- calls

    def measurements(self, call: int) -> list[Measurement]:
        """The measurements of a call, in order. Times include what the first one to need it builds and compiles."""
        if call == 1:
            return [
                Measurement("versions", 3, self.versions),
                Measurement("attention kernels", 20, self.kernels),
                Measurement("selective, eager", 65, self.selective_eager),
                Measurement("selective, compiled", 115, functools.partial(self.compiled, "selective")),
                Measurement("common step, latents given", 45, self.common_step),
                Measurement("full, compiled", 95, functools.partial(self.compiled, "full")),
                Measurement("full+offload, compiled", 45, functools.partial(self.compiled, "full+offload")),
                Measurement("phases of a step", 14, self.phases),
            ]
        return [
            Measurement("versions", 3, self.versions),
            Measurement("VAE", 60, self.vae_encoding),
            Measurement("ZeRO", 65, self.zero_stages),
            Measurement("none, compiled", 80, self.no_checkpointing),
            Measurement("quantization", 60, self.quantized),
            Measurement("profile", 100, self.profile),
        ]


@torch.no_grad()
def _encode(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """Moments of the posterior."""
    return vae.encode(video).latent_dist.parameters


def _nvidia_smi(fields: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return "unknown"


def main(argv: list[str] | None = None) -> int:
    """Run one call. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the results")
    parser.add_argument("call", type=int, choices=(1, 2))
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny model")
    parser.add_argument("--limit-s", type=float, default=440.0, help="age that the process may reach [s]")
    args = parser.parse_args(argv)
    setup = TINY if args.tiny else REAL
    bench = Bench(setup, args.folder)
    if bench.device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU. Use --tiny to rehearse on a CPU.")
    measuring.join_process_group(bench.world)
    record = Record(args.folder / f"call{args.call}.jsonl")
    is_right = measure_all(bench.measurements(args.call), record, args.limit_s, setup.pace)
    return 0 if is_right else 1


if __name__ == "__main__":
    code = main()
    disconnect()
    sys.exit(code)
