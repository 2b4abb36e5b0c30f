"""Measure a training step by bucket, checkpointing, attention kernel, compilation, quantization and ZeRO stage.

    python benchmarks/step.py [--sizes tiny,mid | real] [--buckets ...] [--checkpointing ...] [--kernels ...]
        [--compile off,on] [--quantizations none,int8,nf4] [--fp8-matmul off,on] [--precisions bf16,fp32]
        [--deepspeed zero2,zero3] [--all] [--rounds 3]

A step is that of training: noising and encoding the first frame, noise, forward, backward, clipping, AdamW. Weights and
batches are random. The default models are tiny and mid (0.14 billion parameters) on a CPU, and CogVideoX-1.5's real
geometry on a GPU.

The first value of each list forms the baseline. The other values are varied one at a time, or with --all in every
combination. Variants that differ in checkpointing, kernel or compilation run in one engine, in turn (A B A B).
Quantization, precision and ZeRO stage need separate engines, in which the baseline's checkpointing, kernel and
compilation are measured again. A variant that does not fit into memory or cannot run is a row with its error.

TFLOP/s and MFU count the forward and backward pass of the frozen base, without weight gradients, LoRA and recomputation
(1,479 + 2,529 = 4,008 TFLOP at 81x768x1360). The floor is the time of all operations, including LoRA and recomputation,
at the peak rate. Peak memory is that of the allocator, next to the estimate of the memory model. On a CPU, they are the
process's memory and the estimate for a GPU. Prints a table, then one line of JSON.

--kernels auto: use the fastest available kernel, and print the time of each for one block's attention.
--profile: print the time by operation for one step of the baseline.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from measuring import (
    CLOCKS,
    DTYPES,
    SIZES,
    Size,
    Timing,
    Trainer,
    attempt,
    deadline_of,
    estimate_bytes,
    fastest_kernel,
    free,
    interleaved,
    join_process_group,
    machine,
    model_of,
    peak_tflops,
    print_json,
    print_machine,
    run_config,
    seconds_text,
    table,
    wait,
)
from torch.profiler import ProfilerActivity, profile

from cogds.config.schema import ATTENTION_KERNELS, CHECKPOINTING_MODES, RunConfig
from cogds.core.flops import step_flops
from cogds.core.geometry import ClipShape, num_tokens
from cogds.distributed.process_group import disconnect
from cogds.distributed.world import World, read_world
from cogds.model.transformer.attention import activate_kernel
from cogds.model.transformer.quantize import QUANTIZATIONS, check_quantization


@dataclass(frozen=True)
class Variant:
    """One way to run a step."""

    bucket: str
    batch_size: int
    checkpointing: str
    kernel: str
    compiled: str
    quantization: str
    fp8_matmul: str
    precision: str
    deepspeed: str

    @property
    def engine(self) -> tuple[str, ...]:
        """The values that require a separate engine."""
        return self.quantization, self.fp8_matmul, self.precision, self.deepspeed

    def __str__(self) -> str:
        return " ".join(map(str, asdict(self).values()))


def make_variants(choices: dict[str, Sequence[Any]], every: bool) -> list[Variant]:
    """Return the baseline and the variants that differ from it in one value, or with `every` all combinations.

    Buckets and batch sizes are always combined with all other values.
    """
    if every:
        return [Variant(*values) for values in itertools.product(*choices.values())]
    variants = []
    for bucket, batch_size in itertools.product(choices["bucket"], choices["batch_size"]):
        baseline = Variant(bucket, batch_size, *(values[0] for values in list(choices.values())[2:]))
        variants.append(baseline)
        for name, values in list(choices.items())[2:]:
            variants += [replace(baseline, **{name: value}) for value in values[1:]]
    return variants


def group_by_engine(variants: Sequence[Variant], baseline: Variant) -> Iterator[list[Variant]]:
    """Yield the variants of each engine, starting with the baseline's settings for each bucket."""
    settings = {name: getattr(baseline, name) for name in ("checkpointing", "kernel", "compiled")}
    for engine in dict.fromkeys(variant.engine for variant in variants):
        group = [variant for variant in variants if variant.engine == engine]
        yield list(dict.fromkeys([*(replace(variant, **settings) for variant in group), *group]))


class EngineGroup:
    """One engine and the variants that it runs."""

    def __init__(self, size: Size, first: Variant, lora_rank: int, world: World):
        self.size, self.first, self.lora_rank, self.world = size, first, lora_rank, world
        self.trainer: Trainer | None = None

    def build(self) -> None:
        """Build a new engine and free the old one, whose state is undefined after a failure."""
        self.close()
        first = self.first
        check_quantization(
            first.quantization, first.fp8_matmul == "on", first.precision, int(first.deepspeed[4]), self.world.device
        )
        self.trainer = Trainer(self.size, engine_config(first, self.lora_rank), first.deepspeed, self.world)

    def close(self) -> None:
        if self.trainer is not None:
            self.trainer.close()
        self.trainer = None
        free(self.world.device)

    def call(self, variant: Variant) -> Callable[[], None]:
        """Return a function that runs a step of this variant."""
        shape = ClipShape.parse(variant.bucket)

        def run() -> None:
            trainer = self.trainer
            assert trainer is not None
            trainer.transformer.set_kernel(variant.kernel)
            trainer.transformer.set_checkpointing(variant.checkpointing)
            trainer.set_compiled(variant.compiled == "on")
            activate_kernel(variant.kernel, trainer.device)
            trainer.step(shape, variant.batch_size)

        return run


def measure(
    size: Size, variants: Sequence[Variant], peak: float | None, world: World, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for every variant, in their order."""
    lora_rank = args.lora_rank or size.lora_rank
    rows: dict[Variant, dict[str, Any]] = {}
    for group in group_by_engine(variants, variants[0]):
        engine, start = EngineGroup(size, group[0], lora_rank, world), Timing()
        if attempt(engine.build, world.device, start) is None:
            rows |= {variant: make_row(variant, start, size, 0, peak, None) for variant in group}
            engine.close()
            continue
        assert engine.trainer is not None
        num_lora = engine.trainer.num_lora
        calls = {variant: engine.call(variant) for variant in group}
        timings = interleaved(calls, args.rounds, world.device, engine.build, deadline_of(args.limit_s), args.clock)
        if args.profile and group[0] == variants[0]:
            print_profile(calls[group[0]], world.device)
        engine.close()
        for variant, timing in timings.items():
            baseline = replace(variants[0], bucket=variant.bucket, batch_size=variant.batch_size)
            rows[variant] = make_row(variant, timing, size, num_lora, peak, rows.get(baseline))
    for variant, row in rows.items():
        cfg, shape, mode = engine_config(variant, lora_rank), ClipShape.parse(variant.bucket), variant.checkpointing
        estimate = estimate_bytes(size, cfg, variant.deepspeed, shape, variant.batch_size, mode, world)
        row["estimate_gb"] = round(estimate / 1e9, 3)
    return list(rows.values())


def print_profile(call: Callable[[], None], device: torch.device) -> None:
    """Print the time of one call by operation."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        call()
        wait(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60), flush=True)


def engine_config(variant: Variant, lora_rank: int) -> RunConfig:
    """The run config of a variant."""
    overrides = (
        f"model.quantization={variant.quantization}",
        f"model.fp8_matmul={variant.fp8_matmul}",
        f"train.batch_size={variant.batch_size}",
    )
    return run_config(variant.precision, lora_rank, *overrides)


def make_row(
    variant: Variant, timing: Timing, size: Size, num_lora: int, peak: float | None,
    baseline: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return a variant's measurements and the values derived from them. peak: TFLOP/s, None for no MFU and no floor."""
    model, batch_size = model_of(size), variant.batch_size
    tokens = num_tokens(ClipShape.parse(variant.bucket), model.geometry)
    flops = step_flops(tokens, model.num_layers, model.hidden_size, num_lora)
    row: dict[str, Any] = {"size": size.name, **asdict(variant), "tokens": tokens * batch_size}
    row |= {"counted_tflop": round(batch_size * flops.model_flops / 1e12, 4)}
    if peak:
        # Significant digits: the tiny model's floors are below a millisecond.
        row["floor_s"] = float(f"{batch_size * flops.hardware_flops(variant.checkpointing) / peak / 1e12:.4g}")
    row |= timing.numbers()
    if median_s := timing.median_s:
        row["tokens_per_s"] = round(tokens * batch_size / median_s, 1)
        row["tflops"] = round(batch_size * flops.model_flops / median_s / 1e12, 4)
        if peak:
            row["mfu"] = round(batch_size * flops.model_flops / median_s / peak / 1e12, 4)
        if baseline is None:
            row["to_baseline"] = 1.0
        elif "median_s" in baseline:
            row["to_baseline"] = round(median_s / baseline["median_s"], 4)
    return row


HEAD = ("size", "bucket", "batch", "checkpointing", "kernel", "compile", "type", "quantization", "fp8 matmul",
        "deepspeed", "s/step (min-max)", "/ baseline", "tokens/s", "TFLOP/s", "MFU", "peak GB", "model GB",
        "floor s", "1st call s")  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    text = seconds_text(row)
    share = f"{row['mfu']:.1%}" if "mfu" in row else None
    return [
        row["size"], row["bucket"], row["batch_size"], row["checkpointing"], row["kernel"], row["compiled"],
        row["precision"], row["quantization"], row["fp8_matmul"], row["deepspeed"], text, row.get("to_baseline"),
        row.get("tokens_per_s"), row.get("tflops"), share, row.get("peak_gb"), row["estimate_gb"], row.get("floor_s"),
        row.get("first_s"),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    world = read_world()
    gpu = world.device.type == "cuda"

    def split_commas(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=split_commas, default=["real"] if gpu else ["tiny", "mid"], help=", ".join(SIZES)
    )
    parser.add_argument("--buckets", type=split_commas, help="FRAMESxHEIGHTxWIDTH (default: the size's own)")
    parser.add_argument("--batch-sizes", type=lambda text: [int(item) for item in text.split(",")], default=[1])
    modes = ["full", "selective", "none", "full+offload"]
    parser.add_argument("--checkpointing", type=split_commas, default=modes, help=", ".join(CHECKPOINTING_MODES))
    parser.add_argument("--kernels", type=split_commas, default=["torch"], help="auto, " + ", ".join(ATTENTION_KERNELS))
    parser.add_argument("--compile", type=split_commas, default=["off"], help="off, on")
    parser.add_argument("--quantizations", type=split_commas, default=["none"], help=", ".join(QUANTIZATIONS))
    parser.add_argument("--fp8-matmul", type=split_commas, default=["off"], help="off, on")
    parser.add_argument("--precisions", type=split_commas, default=["bf16" if gpu else "fp32"], help=", ".join(DTYPES))
    parser.add_argument("--deepspeed", type=split_commas, default=["zero2"], help="names of files in ds_configs/")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: for shared machines")
    parser.add_argument("--limit-s", type=float, help="process age after which nothing new is started [s]")
    parser.add_argument("--all", action="store_true", help="measure every combination")
    parser.add_argument("--lora-rank", type=int, help="LoRA rank (default: the size's own, 128 for real)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="peak of this device (default: known for some GPUs)")
    args = parser.parse_args(argv)
    info = machine(world.device)
    join_process_group(world)
    print_machine(info)
    attention_s: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    peak, source = peak_tflops(args.peak_tflops, DTYPES[args.precisions[0]], world.device)
    print(f"peak {peak:.4g} TFLOP/s ({source})" if peak else f"peak unknown ({source})", flush=True)
    for name in args.sizes:
        size = SIZES[name]
        buckets, kernels = args.buckets or [size.bucket], args.kernels
        if "auto" in kernels:
            kernel, attention_s[name] = fastest_kernel(size, buckets, args.precisions[0], world.device)
            kernels = list(dict.fromkeys(kernel if name == "auto" else name for name in kernels))
        choices = {
            "bucket": buckets, "batch_size": args.batch_sizes, "checkpointing": args.checkpointing,
            "kernel": kernels, "compiled": args.compile, "quantization": args.quantizations,
            "fp8_matmul": args.fp8_matmul, "precision": args.precisions, "deepspeed": args.deepspeed,
        }  # fmt: skip
        rows += measure(size, make_variants(choices, args.all), peak, world, args)
    if world.rank == 0:
        print(table(HEAD, [cells(row) for row in rows]))
        print_json(
            "step", info, peak_tflops=round(peak, 4) if peak else None, peak_from=source, clock=args.clock,
            attention_s=attention_s, rows=rows,
        )  # fmt: skip


if __name__ == "__main__":
    main()
    disconnect()
