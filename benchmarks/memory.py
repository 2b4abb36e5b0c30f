"""Print the GPU memory for training CogVideoX-1.5, by setting and activation checkpointing mode.

    python benchmarks/memory.py [--bucket 81x768x1360] [--batch-size 1] [--lora-rank 128]

The values are calculated (`cogds.core.memory`), not measured. A setting is a resolved file of ds_configs/, a number of
ranks and a quantization. Prints a table in GB, including the CUDA context, then one line of JSON.
"""

import argparse
from dataclasses import replace

from measuring import SIZES, machine, make_job, model_of, print_json, run_config, table

from cogds.config.schema import CHECKPOINTING_MODES
from cogds.core.geometry import ClipShape
from cogds.distributed.world import World, read_world

# A file of ds_configs/, ranks, `model.quantization`.
SETTINGS = (
    ("zero2", 1, "none"), ("zero2", 8, "none"), ("zero2_offload", 1, "none"), ("zero2", 1, "int8"),
    ("zero2", 1, "nf4"), ("zero2_offload", 1, "nf4"), ("zero3", 8, "none"), ("zero3_offload", 1, "none"),
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Calculate and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--bucket", help="FRAMESxHEIGHTxWIDTH (default: the size's own)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--lora-rank", type=int, help="LoRA rank (default: the size's own, 128 for real)")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    model, shape = model_of(size), ClipShape.parse(args.bucket or size.bucket)
    cfg = run_config("bf16", args.lora_rank or size.lora_rank, f"train.batch_size={args.batch_size}")
    rows = []
    for name, num_ranks, quantization in SETTINGS:
        memory = make_job(cfg, name, model, shape, World(0, num_ranks, 0, num_ranks)).memory
        memory = replace(memory, quantization=quantization)
        row = {"deepspeed": name, "ranks": num_ranks, "quantization": quantization}
        for mode in CHECKPOINTING_MODES:
            row[mode] = round(memory.estimate(shape, args.batch_size, mode).total_bytes / 1e9, 1)
        row["pinned"] = round(memory.pinned_host_bytes(shape, args.batch_size, "full+offload") / 1e9, 1)
        rows.append(row)
    print(f"{size.name}, {shape}, batch {args.batch_size}, LoRA rank {cfg.lora.rank}, bf16: GB per GPU, calculated")
    head = ("deepspeed", "GPUs", "quantization", *CHECKPOINTING_MODES, "host memory per GPU with full+offload")
    print(table(head, [list(row.values()) for row in rows]))
    print_json("memory", machine(read_world().device), size=size.name, bucket=str(shape), rows=rows)


if __name__ == "__main__":
    main()
