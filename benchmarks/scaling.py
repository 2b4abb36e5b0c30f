"""Measure how a step scales with tokens, batch size, clips and ranks, and calculate how it scales with GPUs and links.

    python benchmarks/scaling.py [--parts tokens,batch,clips,ranks,paper] [--size mid] [--ranks 1,2] [--rounds 3]

tokens, batch   seconds of a step (full checkpointing) by bucket and by batch size, on this device
clips           microseconds of plan.at(step) by the number of clips
ranks           weak scaling with one clip per rank. Each rank is a process with one thread, with gloo on CPUs
paper           calculated: communication of ZeRO and sequence parallelism for CogVideoX-1.5 at 81x768x1360, over rings
                of links with given bandwidths, without overlap. The step time is an assumption, --step-s

Prints tables, then one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from measuring import (
    DTYPES,
    ROOT,
    SIZES,
    Size,
    Trainer,
    interleaved,
    join_process_group,
    machine,
    model_of,
    print_json,
    print_machine,
    run_config,
    table,
)

from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.plan import Plan
from cogds.distributed.collectives import all_gather
from cogds.distributed.process_group import disconnect
from cogds.distributed.world import World, read_world

BUCKETS = {
    "tiny": ("5x64x64", "17x64x96"),
    "mid": ("5x128x192", "9x192x256", "17x192x256", "33x192x256", "49x256x256"),
    "real": ("49x480x720", "81x480x720", "81x768x1360"),
}
NUM_CLIPS = (1_000, 100_000, 10_000_000)
CHECKPOINTING = "full"


def time_shapes(
    size: Size, precision: str, shapes: Sequence[tuple[str, int]], rounds: int, world: World
) -> list[dict[str, Any]]:
    """Time a step of every (bucket, batch size), in turn, on one engine."""
    trainer = Trainer(size, run_config(precision, size.lora_rank), "zero2", world)
    trainer.transformer.set_checkpointing(CHECKPOINTING)
    timings = interleaved(
        {(bucket, batch): partial(trainer.step, ClipShape.parse(bucket), batch) for bucket, batch in shapes},
        rounds,
        world.device,
    )
    rows = []
    for (bucket, batch), timing in timings.items():
        shape = ClipShape.parse(bucket)
        tokens, flops = num_tokens(shape, trainer.model.geometry) * batch, trainer.flops(shape, batch)
        row = {"bucket": bucket, "batch_size": batch, "tokens": tokens, **timing.numbers()}
        row["counted_tflop"] = round(flops.model_flops / 1e12, 5)
        if median_s := timing.median_s:
            row |= {
                "tokens_per_s": round(tokens / median_s, 1),
                "tflops": round(flops.model_flops / median_s / 1e12, 5),
            }
        rows.append(row)
    trainer.close()
    return rows


def time_plan(num_clips: int, calls: int = 200) -> dict[str, Any]:
    """Time plan.at for clips in 30 buckets and 8 ranks."""
    weights = [1 + number for number in range(30)]
    sizes = [num_clips * weight // sum(weights) for weight in weights]
    sizes[-1] += num_clips - sum(sizes)
    plan, times = Plan(tuple(sizes), (1,) * len(sizes), 8, 1, seed=0), []
    for step in range(calls):
        start = time.thread_time_ns()
        plan.at(step)
        times.append((time.thread_time_ns() - start) / 1000)
    return {"num_clips": sum(sizes), "median_us": round(statistics.median(times), 1), "max_us": round(max(times), 1)}


def run_worker(args: argparse.Namespace, world: World) -> None:
    """Run one rank of the weak scaling, one step per round. Rank 0 prints the seconds of the slowest rank."""
    size = SIZES[args.size]
    trainer = Trainer(size, run_config(args.precision, size.lora_rank), args.deepspeed, world)
    trainer.transformer.set_checkpointing(CHECKPOINTING)
    shape = ClipShape.parse(args.bucket or size.bucket)
    timing = interleaved({"step": lambda: trainer.step(shape)}, args.rounds, world.device)["step"]
    every = all_gather(world, (timing.seconds, timing.error))
    if world.rank == 0:
        slowest = [max(seconds) for seconds in zip(*(seconds for seconds, _ in every))]
        errors = [error for _, error in every if error]
        print(json.dumps({"seconds": slowest, "error": errors[0] if errors else ""}), flush=True)


def time_ranks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure weak scaling with ZeRO-2 and ZeRO-3, in separate processes for each number of ranks."""
    rows: list[dict[str, Any]] = []
    for deepspeed in ("zero2", "zero3"):
        single: float | None = None
        for num_ranks in args.ranks:
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks),
                __file__, "--worker", "--size", args.size, "--precision", args.precision, "--deepspeed", deepspeed,
                "--rounds", str(args.rounds), *(["--bucket", args.bucket] if args.bucket else []),
            ]  # fmt: skip
            # torchrun sets one thread per rank if there are several ranks. Use one thread for a single rank, too.
            done = subprocess.run(
                ["env", "OMP_NUM_THREADS=1", *command], capture_output=True, text=True, timeout=900, cwd=ROOT
            )
            line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith('{"seconds"')), None)
            row: dict[str, Any] = {"deepspeed": deepspeed, "ranks": num_ranks}
            result = json.loads(line) if line else {"seconds": [], "error": done.stderr.strip()[-300:]}
            if result["seconds"]:
                median_s = statistics.median(result["seconds"])
                single = single or median_s
                row |= {"median_s": round(median_s, 4), "min_s": round(min(result["seconds"]), 4)}
                row |= {"max_s": round(max(result["seconds"]), 4), "efficiency": round(single / median_s, 3)}
            else:
                row["error"] = result["error"]
            rows.append(row)
            print(f"  {deepspeed}, {num_ranks} ranks: {row.get('median_s', row.get('error'))} s", flush=True)
    return rows


@dataclass(frozen=True)
class Links:
    """Links between GPUs.

    gpu_gb_s: bandwidth of one GPU within its node; node_gb_s: bandwidth out of a node, shared by its GPUs; hop_us:
    latency of one hop.
    """

    name: str
    gpus_a_node: int
    gpu_gb_s: float
    node_gb_s: float
    hop_us: float = 5.0

    def ring_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-gather or reduce-scatter of num_bytes in total. Each link carries (N - 1) / N of them."""
        if num_gpus == 1:
            return 0.0
        rate = self.gpu_gb_s if num_gpus <= self.gpus_a_node else min(self.gpu_gb_s, self.node_gb_s)
        return num_bytes * (num_gpus - 1) / num_gpus / rate / 1e9 + (num_gpus - 1) * self.hop_us / 1e6

    def exchange_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-to-all with num_bytes on each GPU. Traffic that leaves a node shares the node's links."""
        if num_gpus == 1:
            return 0.0
        inside = min(num_gpus, self.gpus_a_node)
        seconds = num_bytes * (inside - 1) / num_gpus / self.gpu_gb_s / 1e9
        if num_gpus > self.gpus_a_node:
            leaving = num_bytes * (num_gpus - self.gpus_a_node) / num_gpus * self.gpus_a_node
            seconds = max(seconds, leaving / self.node_gb_s / 1e9)
        return seconds + self.hop_us / 1e6


LINKS = (
    Links("8 GPUs a node, 450 GB/s each; 8 x 400 Gb/s out of a node", 8, 450.0, 400.0),
    Links("8 GPUs a node, 450 GB/s each; 1 x 100 Gb/s out of a node", 8, 450.0, 12.5),
)
BASE_BYTES, LORA_BYTES, NUM_LAYERS, WIDTH, TOKENS = 2 * 5_571_594_880, 2 * 132_120_576, 42, 3072, 45_106


def communication_s(way: str, num_gpus: int, links: Links, sequence: int = 1) -> float:
    """Seconds of all communication in a step of the real model in bf16, without overlap.

    zero1, zero2: reduce-scatter of the LoRA's gradients, all-gather of its new weights. zero3: all-gather of the base
    and the LoRA, block by block, before the forward and the backward pass, and reduce-scatter of the gradients.
    sequence, with zero2: all-to-all of queries, keys, values and output in every block, in the forward pass, the
    recomputation and the backward pass.
    """
    lora_s = 2 * links.ring_s(LORA_BYTES, num_gpus)
    if way == "zero3":
        block_s = links.ring_s((BASE_BYTES + LORA_BYTES) / NUM_LAYERS, num_gpus)
        return 2 * NUM_LAYERS * block_s + links.ring_s(LORA_BYTES, num_gpus)
    if way == "sequence":
        rank_bytes = TOKENS / sequence * WIDTH * 2
        return lora_s + 3 * 4 * NUM_LAYERS * links.exchange_s(rank_bytes, sequence)
    return lora_s


def on_paper(step_s: float) -> list[dict[str, Any]]:
    """Communication by method, GPUs and links, for a step with compute time `step_s`, divided by the sequence size."""
    rows = []
    for links in LINKS:
        for num_gpus in (8, 16, 32, 64, 128, 256, 512):
            for way, sequence in (("zero2", 1), ("zero3", 1), ("sequence", 2), ("sequence", 4), ("sequence", 8)):
                seconds, compute_s = communication_s(way, num_gpus, links, sequence), step_s / sequence
                name = way if sequence == 1 else f"sequence {sequence}, zero2"
                rows.append(
                    {"links": links.name, "gpus": num_gpus, "way": name, "communication_s": round(seconds, 4),
                     "share_if_not_overlapped": round(seconds / (seconds + compute_s), 4)}
                )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    world = read_world()
    gpu = world.device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["tokens", "batch", "clips", "ranks", "paper"]
    parser.add_argument("--parts", type=lambda text: text.split(","), default=every, help=", ".join(every))
    parser.add_argument("--size", default="real" if gpu else "mid", choices=SIZES)
    parser.add_argument("--bucket", help="bucket for weak scaling (default: the size's own)")
    parser.add_argument("--precision", default="bf16" if gpu else "fp32", choices=DTYPES)
    parser.add_argument("--batch-sizes", type=lambda text: [int(item) for item in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--ranks", type=lambda text: [int(item) for item in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-s", type=float, default=12.0, help="assumed compute time of a step for paper [s]")
    parser.add_argument("--deepspeed", default="zero2", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        join_process_group(world)
        run_worker(args, world)
        return
    info = machine(world.device)
    print_machine(info)
    size, result = SIZES[args.size], {}
    if "tokens" in args.parts or "batch" in args.parts:
        join_process_group(world)
        shapes = [(bucket, 1) for bucket in BUCKETS[size.name]] if "tokens" in args.parts else []
        smallest = min(BUCKETS[size.name], key=lambda text: num_tokens(ClipShape.parse(text), model_of(size).geometry))
        if "batch" in args.parts:
            shapes += [(smallest, batch) for batch in args.batch_sizes if (smallest, batch) not in shapes]
        rows = result["shapes"] = time_shapes(size, args.precision, shapes, args.rounds, world)
        head = ("bucket", "batch", "tokens", "s/step", "tokens/s", "counted TFLOP", "TFLOP/s", "peak GB")
        names = ("bucket", "batch_size", "tokens", "median_s", "tokens_per_s", "counted_tflop", "tflops", "peak_gb")
        print(table(head, [[row.get(name, row.get("error")) for name in names] for row in rows]))
    if "clips" in args.parts:
        rows = result["clips"] = [time_plan(num_clips) for num_clips in NUM_CLIPS]
        print(table(("clips", "plan.at, median us", "max us"), [list(row.values()) for row in rows]))
    if "ranks" in args.parts:
        rows = result["ranks"] = time_ranks(args)
        names = ("deepspeed", "ranks", "median_s", "min_s", "max_s", "efficiency")
        print(table(("deepspeed", "ranks", "s/step", "min", "max", "efficiency"),
                    [[row.get(name) for name in names] for row in rows]))  # fmt: skip
    if "paper" in args.parts:
        rows = result["paper"] = on_paper(args.step_s)
        print(f"calculated, not measured: CogVideoX-1.5 at 81x768x1360, assuming {args.step_s:g} s compute per clip")
        for links in LINKS:
            own = [row for row in rows if row["links"] == links.name]
            ways, gpus = list(dict.fromkeys(row["way"] for row in own)), sorted({row["gpus"] for row in own})
            print(links.name)
            cells = [
                [num, *(f"{row['communication_s']:.3f} s, {row['share_if_not_overlapped']:.1%}" for row in own
                        if row["gpus"] == num)]
                for num in gpus
            ]  # fmt: skip
            print(table(("GPUs", *ways), cells))
        result["links"] = [asdict(links) for links in LINKS]
    print_json("scaling", info, size=size.name, precision=args.precision, checkpointing=CHECKPOINTING, **result)


if __name__ == "__main__":
    main()
    disconnect()
