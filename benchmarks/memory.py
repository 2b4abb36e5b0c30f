"""What training CogVideoX-1.5 takes of a GPU's memory, by setting and recompute level. Arithmetic: nothing is measured.

    python benchmarks/memory.py [--bucket 81x768x1360] [--batch-size 1] [--lora-rank 128]

Every setting is one of ds_configs/ as a run resolves it, a number of ranks and a base (`cogds.core.memory`). Prints a
table in GB, CUDA context included, then one line of JSON.
"""

import argparse
from dataclasses import replace

from measuring import SIZES, deepspeed_config, machine, model_of, run_config, say_json, table

from cogds.config.schema import CHECKPOINTING_MODES
from cogds.core.geometry import ClipShape
from cogds.distributed.world import World, read_world
from cogds.train.tuning import memory_model

# A file of ds_configs/, ranks, `model.quantization`.
SETTINGS = (
    ("zero2", 1, "full"), ("zero2", 8, "full"), ("zero2_offload", 1, "full"), ("zero2", 1, "int8"),
    ("zero2", 1, "nf4"), ("zero2_offload", 1, "nf4"), ("zero3", 8, "full"), ("zero3_offload", 1, "full"),
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Reckon, print the table, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--bucket", help="FRAMESxHEIGHTxWIDTH; none: the size's own")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--lora-rank", type=int, help="none: the size's own (128 for the real one)")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    model, shape = model_of(size), ClipShape.parse(args.bucket or size.bucket)
    cfg = run_config("bf16", args.lora_rank or size.lora_rank, f"train.batch_size={args.batch_size}")
    rows = []
    for name, num_ranks, base in SETTINGS:
        ds_config = deepspeed_config(name, cfg, model, World(0, num_ranks, 0, num_ranks))
        memory = replace(memory_model(cfg, ds_config, model, (shape,), num_ranks), quantization=base)
        row = {"deepspeed": name, "ranks": num_ranks, "base": base}
        for level in CHECKPOINTING_MODES:
            row[level] = round(memory.estimate(shape, args.batch_size, level).total_bytes / 1e9, 1)
        row["pinned"] = round(memory.pinned_host_bytes(shape, args.batch_size, "full+offload") / 1e9, 1)
        rows.append(row)
    print(f"{size.name}, {shape}, batch {args.batch_size}, LoRA rank {cfg.lora.rank}, bf16: GB a GPU, by arithmetic")
    head = ("deepspeed", "GPUs", "base", *CHECKPOINTING_MODES, "host memory a GPU of full+offload")
    print(table(head, [list(row.values()) for row in rows]))
    say_json("memory", machine(read_world().device), size=size.name, bucket=str(shape), rows=rows)


if __name__ == "__main__":
    main()
