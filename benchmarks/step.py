"""How fast a training step is, by bucket, checkpointing, attention kernel, compilation, quantization and ZeRO.

    python benchmarks/step.py [--sizes tiny,mid | real] [--buckets ...] [--checkpointing ...] [--kernels ...]
        [--compile off,on] [--quantizations none,int8,nf4] [--fp8-matmul off,on] [--precisions bf16,fp32]
        [--deepspeed zero2,zero3] [--all] [--rounds 3]

A step is what training does: the noised first frame through the VAE, noise, forward, backward, clipping, AdamW. Weights
and batches are random numbers, made on the device. On a CPU the models are tiny and mid (0.14 billion parameters), on a
GPU CogVideoX-1.5's real geometry.

The first of every list makes the plain baseline; the other values are varied one at a time, with --all in every
combination. What differs in checkpointing, kernel or compilation runs in one engine, in turn (A B A B); quantization,
precision and stage need an engine of their own, where the baseline's checkpointing, kernel and compilation come again.
A variant that does not fit into memory, or cannot run here, is a row that says so.

TFLOP/s and MFU count the frozen base's forward and backward pass: no weight gradients, no adapter, nothing that is
recomputed (1,479 + 2,529 = 4,008 TFLOP at 81x768x1360). The floor is everything that is computed, adapter and
recomputation included, at the peak rate. Peak memory is the allocator's, beside it what the memory model says (on a
CPU: the process's, and what a GPU would need). Prints a table, then one line of JSON.

--kernels auto: the fastest of those that are here, and what each takes for one block's attention, forward and backward.
--profile: also where the time of one step of the baseline goes, by operation.
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
    join,
    machine,
    model_of,
    peak_tflops,
    run_config,
    say_json,
    say_machine,
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
        """What an engine is built for."""
        return self.quantization, self.fp8_matmul, self.precision, self.deepspeed

    def __str__(self) -> str:
        return " ".join(map(str, asdict(self).values()))


def variants(choices: dict[str, Sequence[Any]], every: bool) -> list[Variant]:
    """The baseline first, then what differs from it in one thing; or, with `every`, all combinations.

    Buckets and batch sizes are always combined with all the rest.
    """
    if every:
        return [Variant(*values) for values in itertools.product(*choices.values())]
    found = []
    for bucket, batch_size in itertools.product(choices["bucket"], choices["batch_size"]):
        plain = Variant(bucket, batch_size, *(values[0] for values in list(choices.values())[2:]))
        found.append(plain)
        for name, values in list(choices.items())[2:]:
            found += [replace(plain, **{name: value}) for value in values[1:]]
    return found


def engines(found: Sequence[Variant], plain: Variant) -> Iterator[list[Variant]]:
    """Variants that one engine runs, the baseline's of each bucket first."""
    for engine in dict.fromkeys(one.engine for one in found):
        own = [one for one in found if one.engine == engine]
        again = [
            replace(one, checkpointing=plain.checkpointing, kernel=plain.kernel, compiled=plain.compiled) for one in own
        ]
        yield list(dict.fromkeys([*again, *own]))


class Measured:
    """One engine and the variants that it runs."""

    def __init__(self, size: Size, first: Variant, lora_rank: int, world: World):
        self.size, self.first, self.lora_rank, self.world = size, first, lora_rank, world
        self.trainer: Trainer | None = None

    def build(self) -> None:
        """A new engine; what an old one held is given back, for after a failure its state is anyone's guess."""
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
        """A step of this variant."""
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
    size: Size,
    found: Sequence[Variant],
    lora_rank: int,
    rounds: int,
    peak: float | None,
    world: World,
    deadline: float | None = None,
    clock: str = "wall",
    profiled: bool = False,
) -> list[dict[str, Any]]:
    """A row for every variant, in their order."""
    rows: dict[Variant, dict[str, Any]] = {}
    for group in engines(found, found[0]):
        measured, start = Measured(size, group[0], lora_rank, world), Timing()
        if attempt(measured.build, world.device, start) is None:
            rows |= {one: row_of(one, start, size, 0, peak, None) for one in group}
            measured.close()
            continue
        assert measured.trainer is not None
        num_lora = measured.trainer.num_lora
        calls = {one: measured.call(one) for one in group}
        timings = interleaved(calls, rounds, world.device, measured.build, deadline, clock)
        if profiled and group[0] == found[0]:
            say_profile(calls[group[0]], world.device)
        measured.close()
        for one, timing in timings.items():
            baseline = replace(found[0], bucket=one.bucket, batch_size=one.batch_size)
            rows[one] = row_of(one, timing, size, num_lora, peak, rows.get(baseline))
    for one, row in rows.items():
        cfg, shape = engine_config(one, lora_rank), ClipShape.parse(one.bucket)
        estimate = estimate_bytes(size, cfg, one.deepspeed, shape, one.batch_size, one.checkpointing, world)
        row["estimate_gb"] = round(estimate / 1e9, 3)
    return list(rows.values())


def say_profile(call: Callable[[], None], device: torch.device) -> None:
    """Where the time of one call goes."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        call()
        wait(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60), flush=True)


def engine_config(variant: Variant, lora_rank: int) -> RunConfig:
    """The run's config."""
    held = (
        f"model.quantization={variant.quantization}",
        f"model.fp8_matmul={variant.fp8_matmul}",
        f"train.batch_size={variant.batch_size}",
    )
    return run_config(variant.precision, lora_rank, *held)


def row_of(
    variant: Variant, timing: Timing, size: Size, num_lora: int, peak: float | None,
    baseline: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """What was measured of a variant, and what arithmetic makes of it. peak: TFLOP/s; None: no MFU, no floor."""
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
        "deepspeed", "s/step (least-most)", "to first", "tokens/s", "TFLOP/s", "MFU", "peak GB", "model GB",
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
    """Measure, print the table, print the line."""
    world = read_world()
    gpu = world.device.type == "cuda"

    def listed(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=listed, default=["real"] if gpu else ["tiny", "mid"], help=", ".join(SIZES))
    parser.add_argument("--buckets", type=listed, help="FRAMESxHEIGHTxWIDTH; none: the size's own")
    parser.add_argument("--batch-sizes", type=lambda text: [int(one) for one in text.split(",")], default=[1])
    modes = ["full", "selective", "none", "full+offload"]
    parser.add_argument("--checkpointing", type=listed, default=modes, help=", ".join(CHECKPOINTING_MODES))
    parser.add_argument("--kernels", type=listed, default=["torch"], help="auto, " + ", ".join(ATTENTION_KERNELS))
    parser.add_argument("--compile", type=listed, default=["off"], help="off, on")
    parser.add_argument("--quantizations", type=listed, default=["none"], help=", ".join(QUANTIZATIONS))
    parser.add_argument("--fp8-matmul", type=listed, default=["off"], help="off, on")
    parser.add_argument("--precisions", type=listed, default=["bf16" if gpu else "fp32"], help=", ".join(DTYPES))
    parser.add_argument("--deepspeed", type=listed, default=["zero2"], help="names of files in ds_configs/")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: for a machine that others use too")
    parser.add_argument("--limit-s", type=float, help="begin nothing new when the process is so old")
    parser.add_argument("--all", action="store_true", help="every combination, not one thing at a time")
    parser.add_argument("--lora-rank", type=int, help="none: the size's own (128 for the real one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of this device; none: known for some GPUs, else measured")
    args = parser.parse_args(argv)
    deadline = deadline_of(args.limit_s)
    facts = machine(world.device)
    join(world)
    say_machine(facts)
    attention_s: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    peak, source = peak_tflops(args.peak_tflops, DTYPES[args.precisions[0]], world.device)
    print(f"peak {peak:.4g} TFLOP/s ({source})" if peak else f"peak unknown ({source})", flush=True)
    for name in args.sizes:
        size = SIZES[name]
        buckets, kernels = args.buckets or [size.bucket], args.kernels
        if "auto" in kernels:
            kernel, attention_s[name] = fastest_kernel(size, buckets, args.precisions[0], world.device)
            kernels = list(dict.fromkeys(kernel if one == "auto" else one for one in kernels))
        choices = {
            "bucket": buckets, "batch_size": args.batch_sizes, "checkpointing": args.checkpointing,
            "kernel": kernels, "compiled": args.compile, "quantization": args.quantizations,
            "fp8_matmul": args.fp8_matmul, "precision": args.precisions, "deepspeed": args.deepspeed,
        }  # fmt: skip
        rank = args.lora_rank or size.lora_rank
        found = variants(choices, args.all)
        rows += measure(size, found, rank, args.rounds, peak, world, deadline, args.clock, args.profile)
    if world.rank == 0:
        print(table(HEAD, [cells(row) for row in rows]))
        say_json(
            "step",
            facts,
            peak_tflops=round(peak, 4) if peak else None,
            peak_from=source,
            clock=args.clock,
            attention_s=attention_s,
            rows=rows,
        )


if __name__ == "__main__":
    main()
    disconnect()
