"""Shared code of the speed benchmarks: random models, the training step on them, timing and tables.

Needs torch, diffusers, peft and DeepSpeed, but no video decoders. Scripts import it before torch, because it sets
variables that torch reads when it is imported.
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cogds.distributed.world import World, read_world  # noqa: E402
from cogds.process.environment import set_library_defaults  # noqa: E402

set_library_defaults(read_world().local_size)

import torch  # noqa: E402
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler  # noqa: E402

from cogds.config.deepspeed import load_ds_config, resolve, zero_stage  # noqa: E402
from cogds.config.loading import load_config  # noqa: E402
from cogds.config.schema import RunConfig  # noqa: E402
from cogds.core.diffusion import v_loss  # noqa: E402
from cogds.core.flops import StepFlops, step_flops  # noqa: E402
from cogds.core.geometry import ClipShape, ModelGeometry, num_tokens  # noqa: E402
from cogds.distributed.process_group import connect, is_connected  # noqa: E402
from cogds.engine.start import build_for_stage, prepare_for_zero3, start_engine  # noqa: E402
from cogds.job import Job  # noqa: E402
from cogds.model.load import DTYPES, ModelFolder, empty_transformer  # noqa: E402
from cogds.model.lora.adapter import inject, resolve_targets  # noqa: E402
from cogds.model.transformer.attention import find_fastest_kernel  # noqa: E402
from cogds.train.step import Draws, StepBuilder, random_batch  # noqa: E402

# `cpu` is CPU time of this process, for shared machines. With one thread, it equals the wall time of an idle machine.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

_V15 = {
    "patch_size": 2,
    "patch_size_t": 2,
    "sample_frames": 81,
    "use_rotary_positional_embeddings": True,
    "patch_bias": False,
}
_VAE = {"temporal_compression_ratio": 4, "scaling_factor": 0.7, "invert_scale_latents": True}
_SCHEDULER = {"_class_name": "CogVideoXDPMScheduler", "prediction_type": "v_prediction"}
_VAE |= {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")}


@dataclass(frozen=True)
class Size:
    """A CogVideoX-1.5 image-to-video model: configs of its parts, and a suitable bucket and LoRA rank."""

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    bucket: str
    lora_rank: int


SIZES = {
    size.name: size
    for size in (
        # The model of the demo.
        Size(
            "tiny",
            _V15 | {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 8,
                    "time_embed_dim": 32, "ofs_embed_dim": 32, "text_embed_dim": 32, "num_layers": 2,
                    "sample_width": 60, "sample_height": 60, "max_text_seq_length": 32},
            _VAE | {"block_out_channels": (8, 8, 8, 8), "latent_channels": 8, "layers_per_block": 1,
                    "norm_num_groups": 2},
            "17x64x96", 8,
        ),
        # 0.14 billion parameters: a quarter of the real model's width, and 12 of its 42 blocks. The VAE's channels are
        # chosen so that encoding a clip takes a quarter of the step's operations, as for the real model.
        Size(
            "mid",
            _V15 | {"num_attention_heads": 12, "attention_head_dim": 64, "in_channels": 16, "out_channels": 8,
                    "time_embed_dim": 512, "ofs_embed_dim": 512, "text_embed_dim": 32, "num_layers": 12,
                    "sample_width": 60, "sample_height": 60, "max_text_seq_length": 32},
            _VAE | {"block_out_channels": (12, 24, 24, 48), "latent_channels": 8, "layers_per_block": 3,
                    "norm_num_groups": 4},
            "17x192x256", 32,
        ),
        # CogVideoX1.5-5B-I2V: 5,571,594,880 parameters.
        Size(
            "real",
            _V15 | {"num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 32, "out_channels": 16,
                    "time_embed_dim": 512, "ofs_embed_dim": 512, "text_embed_dim": 4096, "num_layers": 42,
                    "sample_width": 300, "sample_height": 300, "max_text_seq_length": 226},
            _VAE | {"block_out_channels": (128, 256, 256, 512), "latent_channels": 16, "layers_per_block": 3,
                    "norm_num_groups": 32},
            "81x768x1360", 128,
        ),
    )
}  # fmt: skip


def model_of(size: Size) -> ModelFolder:
    """A `ModelFolder` of this size. Its path does not exist, since the weights are random."""
    geometry = ModelGeometry.from_configs(size.transformer, size.vae, _SCHEDULER)
    return ModelFolder(Path(f"random-{size.name}"), dict(size.transformer), dict(size.vae), geometry)


def run_config(precision: str, lora_rank: int, *overrides: str) -> RunConfig:
    """The default config with the values that a benchmark needs."""
    needed = ["model.path=random", "data.path=random", f"train.precision={precision}", f"lora.rank={lora_rank}"]
    return load_config(None, [*needed, f"lora.alpha={lora_rank}", *overrides])[0]


def deepspeed_config(name: str, cfg: RunConfig, model: ModelFolder, world: World) -> dict[str, Any]:
    """A file of ds_configs/ (such as `zero2`), resolved with the run config."""
    path = str(ROOT / "ds_configs" / f"{name}.json")
    return resolve(load_ds_config(path), cfg, frozenset(), world.size, model.hidden_size, path)[0]


def make_job(cfg: RunConfig, ds_name: str, model: ModelFolder, shape: ClipShape, world: World) -> Job:
    """A job with one bucket and without data. ds_name: of a file in ds_configs/, such as `zero2`."""
    ds_config = deepspeed_config(ds_name, cfg, model, world)
    targets = tuple(resolve_targets(empty_transformer(model), cfg.lora.target_modules))
    return Job(cfg, ds_config, model, (shape,), targets, world, world.size)


def join_process_group(world: World) -> None:
    """Connect to the process group unless this process is connected already."""
    if not is_connected():
        connect(world, 600.0)


def alphas_cumprod() -> torch.Tensor:
    """The abar table of CogVideoX-1.5."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0, set_alpha_to_one=True,
    ).alphas_cumprod  # fmt: skip


def random_vae(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """The VAE with random weights, frozen."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoencoderKLCogVideoX.from_config(size.vae).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def share_weights(of_class: Any, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """Build a frozen transformer around existing weights, which are not copied. weights: by diffusers' names."""
    with torch.device("meta"):
        transformer = of_class.from_config(config)
    transformer.load_state_dict(weights, assign=True)
    return transformer.requires_grad_(False)


def randomize_lora(transformer: torch.nn.Module) -> None:
    """Draw the LoRA's B, which is zero at first, so that a wrong LoRA changes the results."""
    numbers = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=numbers))


class Trainer:
    """cogds training with random weights: engine, step builder, and one batch per bucket."""

    def __init__(
        self,
        size: Size,
        cfg: RunConfig,
        ds_name: str,
        world: World,
        transformer: Any = None,
        vae: Any = None,
    ):
        """ds_name: of a file in ds_configs/. transformer: an existing one without LoRA to train, None for a new one."""
        self.size, self.cfg, self.ds_name, self.world, self.device = size, cfg, ds_name, world, world.device
        self.others_bytes = 0  # memory in use that is not this trainer's
        self.model, self.dtype = model_of(size), DTYPES[cfg.train.precision]
        ds_config = deepspeed_config(ds_name, cfg, self.model, world)
        torch.manual_seed(0)
        self.transformer = transformer or build_for_stage(
            self.model, self.dtype, ds_config, self.device, cfg.model.quantization, cfg.model.fp8_matmul
        )
        parameters = inject(self.transformer, cfg.lora.rank, cfg.lora.alpha, 0.0, cfg.lora.target_modules, cfg.seed)
        self.num_lora = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
        randomize_lora(self.transformer)
        if zero_stage(ds_config) == 3 and transformer is not None:
            prepare_for_zero3(self.transformer)
        self.transformer.train()
        self.engine = start_engine(self.transformer, parameters, ds_config)
        no_caption = torch.zeros(
            self.model.geometry.text_tokens, size.transformer["text_embed_dim"], dtype=self.dtype, device=self.device
        )
        vae = vae or random_vae(size, self.dtype, self.device)
        self.builder = StepBuilder(
            vae, self.model.geometry, cfg.conditioning, alphas_cumprod(), no_caption, self.device
        )
        self._compiled: list[Any] = []
        self._batches: dict[tuple[ClipShape, int], dict[str, torch.Tensor]] = {}

    def inputs(self, shape: ClipShape, batch_size: int = 1) -> tuple[dict[str, Any], torch.Tensor]:
        """Build the transformer's arguments and the target, as in every step."""
        if (shape, batch_size) not in self._batches:
            self._batches[shape, batch_size] = random_batch(
                shape,
                batch_size,
                self.model.geometry,
                self.size.transformer["text_embed_dim"],
                self.cfg.train.precision,
            )
        kept = torch.zeros(batch_size, dtype=torch.bool)
        slots = range(self.world.rank * batch_size, (self.world.rank + 1) * batch_size)
        draws = Draws(torch.full((batch_size,), 500), kept, kept, self.cfg.seed, 0, slots)
        return self.builder.build(self._batches[shape, batch_size], shape, draws)

    def train(self, inputs: Mapping[str, Any], target: torch.Tensor) -> torch.Tensor:
        """Run forward, backward and optimizer step, and return the loss."""
        loss = v_loss(self.engine(**inputs)[0], target).mean()
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def step(self, shape: ClipShape, batch_size: int = 1) -> torch.Tensor:
        """Run a whole step: encoding of the first frame, noise, forward, backward, optimizer."""
        return self.train(*self.inputs(shape, batch_size))

    def set_compiled(self, compiled: bool, backend: str = "inductor") -> None:
        """Switch between compiled and uncompiled blocks. The compiled code is kept."""
        if compiled and not self._compiled:
            self.transformer.compile_blocks(backend)
            self._compiled = [block._body for block in self.transformer.transformer_blocks]
        for index, block in enumerate(self.transformer.transformer_blocks):
            block._body = self._compiled[index] if compiled else block.body

    def flops(self, shape: ClipShape, batch_size: int = 1) -> StepFlops:
        """Operations of a step on this rank."""
        clip = step_flops(
            num_tokens(shape, self.model.geometry), self.model.num_layers, self.model.hidden_size, self.num_lora
        )
        return StepFlops(batch_size * clip.linears, batch_size * clip.attention, batch_size * clip.lora)

    def close(self) -> None:
        """Free the memory. The trainer cannot be used afterwards."""
        self.engine.destroy()
        del self.engine, self.transformer, self.builder
        free(self.device)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Cast the transformer's arguments to a dtype, except for rotary tables, which stay float32."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((one - other).norm() / other.norm()).item()


def make_batches(
    size: Size, folder: ModelFolder, shape: ClipShape, timesteps: Sequence[int], device: torch.device
) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Inputs in bf16 and target of one random clip, for each timestep."""
    dtype = torch.bfloat16
    text = torch.zeros(folder.geometry.text_tokens, folder.transformer_config["text_embed_dim"], dtype=dtype)
    vae = random_vae(size, dtype, device)
    conditioning = run_config("bf16", 1).conditioning
    builder = StepBuilder(vae, folder.geometry, conditioning, alphas_cumprod(), text, device)
    batch = random_batch(shape, 1, folder.geometry, folder.transformer_config["text_embed_dim"], "bf16")
    kept = torch.zeros(1, dtype=torch.bool)
    return [
        builder.build(batch, shape, Draws(torch.tensor([timestep]), kept, kept, 0, 0, [number]))
        for number, timestep in enumerate(timesteps)
    ]


def estimate_bytes(
    size: Size, cfg: RunConfig, ds_name: str, shape: ClipShape, batch_size: int, checkpointing: str, world: World
) -> int:
    """GPU memory of a step according to the memory model, without the CUDA context."""
    memory = make_job(cfg, ds_name, model_of(size), shape, world).memory
    estimate = memory.estimate(shape, batch_size, checkpointing)
    return estimate.total_bytes - estimate.cuda_context_bytes


def fastest_kernel(size: Size, buckets: Sequence[str], precision: str, device: torch.device) -> tuple[str, Any]:
    """Find the fastest attention kernel for the longest bucket, and print and return the seconds of each kernel."""
    geometry = model_of(size).geometry
    tokens = max(num_tokens(ClipShape.parse(bucket), geometry) for bucket in buckets)
    heads = size.transformer["num_attention_heads"]
    kernel, times, failures = find_fastest_kernel(tokens, heads, geometry.head_dim, DTYPES[precision], device)
    flops = step_flops(tokens, 1, heads * geometry.head_dim).attention * 3.5
    for name, seconds in times.items():
        print(f"  attention, {tokens} tokens, {name}: {seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.1f} TFLOP/s")
    for name, reason in failures.items():
        print(f"  attention, {tokens} tokens, {name}: not usable ({reason})")
    return kernel, times


def process_age_s() -> float:
    """Seconds since this process started, imports included."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Release unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    """Reset the peak of memory: on a CPU, that of the process's resident memory, if Linux allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory since `reset_peak`, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def held_bytes(device: torch.device) -> int | None:
    """Memory in use now, None if unknown."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS")


def _resident(field_name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field_name + ":"):
                return int(line.split()[1]) * 1024
    return None


@dataclass
class Timing:
    """Seconds of each counted call and of the first one (which compiles and allocates), peak memory in bytes, error."""

    seconds: list[float] = field(default_factory=list)
    first_s: float | None = None
    peak: int | None = None
    error: str = ""

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def numbers(self) -> dict[str, Any]:
        """Values for a JSON row."""
        if not self.seconds:
            first = {"first_s": round(self.first_s, 3)} if self.first_s else {}
            return {"error": self.error, **first}
        return {
            "median_s": round(statistics.median(self.seconds), 5),
            "min_s": round(min(self.seconds), 5),
            "max_s": round(max(self.seconds), 5),
            "num_counted": len(self.seconds),
            "first_s": round(self.first_s or 0.0, 3),
            "peak_gb": round(self.peak / 1e9, 3) if self.peak else None,
        }


def timed(call: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Seconds of one call, including the device's work. clock: a key of `CLOCKS`."""
    now = CLOCKS[clock]
    wait(device)
    start = now()
    call()
    wait(device)
    return now() - start


def attempt(call: Callable[[], object], device: torch.device, timing: Timing, clock: str = "wall") -> float | None:
    """Seconds of one call, or None if it fails. The error is then stored in `timing`."""
    try:
        return timed(call, device, clock)
    except torch.OutOfMemoryError:
        timing.error = "out of memory"
    except RuntimeError as error:
        # From allocators other than torch's, and from kernels that do not support this shape or GPU.
        timing.error = "out of memory" if "out of memory" in str(error).lower() else str(error).strip().splitlines()[0]
    except Exception as error:
        timing.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    timing.seconds.clear()
    return None


def interleaved(
    calls: Mapping[Any, Callable[[], object]],
    rounds: int,
    device: torch.device,
    recover: Callable[[], object] = lambda: None,
    clock: str = "wall",
) -> dict[Any, Timing]:
    """Time calls in turn, `rounds` times each: A A B B, then A B ..., without counting the first call of each.

    Results are also printed immediately. The peak of memory is that of the uncounted call. A call that fails is not
    repeated, and `recover` is called.
    """
    timings = {name: Timing() for name in calls}

    def count(name: Any) -> None:
        if timings[name].error:
            return
        seconds = attempt(calls[name], device, timings[name], clock)
        if seconds is None:
            recover()
            return
        timings[name].seconds.append(seconds)
        print(f"  {name}: {seconds:.3f} s", flush=True)

    for name, call in calls.items():
        timing = timings[name]
        reset_peak(device)
        timing.first_s = attempt(call, device, timing, clock)
        timing.peak = peak_bytes(device)
        if timing.first_s is None:
            recover()
        memory = f"peak {timing.peak / 1e9:.2f} GB" if timing.peak else ""
        outcome = timing.error if timing.first_s is None else f"{timing.first_s:.3f} s, first call"
        print(f"  {name}: {outcome}, {memory}", flush=True)
        count(name)
    for _ in range(rounds - 1):
        for name in calls:
            count(name)
    return timings


def machine(device: torch.device) -> dict[str, Any]:
    """The conditions of a measurement: machine, versions, load, commit."""
    info: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": _commit(),
    }
    if device.type == "cuda":
        info["gpu_gb"] = round(torch.cuda.mem_get_info(device)[1] / 1e9, 1)
    return info


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        outputs = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
            for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "cogds", "benchmarks"))
        ]
        return outputs[0].strip() + (" and changes" if outputs[1].strip() else "")
    return os.environ.get("COMMIT", "unknown")  # a copy without its repository


def print_machine(info: Mapping[str, Any]) -> None:
    """Print the result of `machine` in one line."""
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in info.items()), flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table with aligned columns, numbers to the right."""
    texts = [list(head), *[["-" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    right = [all(row[column][:1] in "-+0123456789" for row in texts[1:]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in zip(row, widths, right)
        ).rstrip()
        for row in texts
    )


def seconds_text(row: Mapping[str, Any]) -> str:
    """Format median, minimum and maximum of a row's seconds, or its error."""
    if "median_s" not in row:
        return row["error"][:40]
    return f"{row['median_s']:.3f} ({row['min_s']:.3f}-{row['max_s']:.3f})"


def print_json(benchmark: str, info: Mapping[str, Any], **result: Any) -> None:
    """Print the JSON line that ends every benchmark."""
    print(json.dumps({"benchmark": benchmark, "machine": dict(info), **result}), flush=True)
