"""Host memory for saving and resuming a full fine-tune: the peak of each rank, against its share of the state.

    python benchmarks/full_state.py                       # 0.5 B parameters, ZeRO-3, 2 ranks
    python benchmarks/full_state.py --layers 2 --ranks 2  # a smaller model

Makes a random CogVideoX-1.5 in a temporary folder, builds the engine, and measures the anonymous memory of each rank
while it loads the weights, writes a checkpoint and the exported model, and resumes from the checkpoint. On a CPU, the
state itself is in host memory, too, so the rise over the memory before is what counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

TIMEOUT_S = 1500
CONFIG = {
    "in_channels": 32, "out_channels": 16, "attention_head_dim": 64, "time_embed_dim": 512, "ofs_embed_dim": 512,
    "text_embed_dim": 4096, "sample_width": 300, "sample_height": 300, "sample_frames": 81, "patch_size": 2,
    "patch_size_t": 2, "max_text_seq_length": 226, "use_rotary_positional_embeddings": True, "patch_bias": False,
}  # fmt: skip


def resident_bytes() -> int:
    """Anonymous memory of this process, without the pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


@contextmanager
def measured(results: dict[str, list[float]], name: str) -> Iterator[None]:
    """Record the rise of the memory at the peak of the block, and its duration: [GB, s]."""
    before, peak, is_done, start = resident_bytes(), [0], threading.Event(), time.perf_counter()

    def sample() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], resident_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
        peak[0] = max(peak[0], resident_bytes())
        results[name] = [round((peak[0] - before) / 1e9, 3), round(time.perf_counter() - start, 1)]


def write_model(folder: Path, layers: int, heads: int) -> None:
    """Write a random transformer in bf16, and the other parts of the tiny model of the tests."""
    from diffusers import CogVideoXTransformer3DModel

    from tests.tiny import create_tiny_model

    create_tiny_model(folder)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    transformer = CogVideoXTransformer3DModel(**CONFIG, num_layers=layers, num_attention_heads=heads)
    torch.set_default_dtype(before)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="400MB")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"latent_channels": CONFIG["out_channels"]}))


def work(args: argparse.Namespace) -> None:
    """Measure on one rank, and write the results of all on rank 0."""
    from cogds.distributed.collectives import all_gather, barrier
    from cogds.distributed.deepspeed_internals import make_optimizer_states
    from cogds.distributed.process_group import connect, disconnect
    from cogds.distributed.world import read_world
    from cogds.engine.shards import ShardReader, local_shard, restore_shards, shard_header, shard_name
    from cogds.engine.start import load_for_stage, start_engine
    from cogds.model.full_export import FullExport
    from cogds.process.host_memory import HostBuffer
    from cogds.train.trained_part import add_trained_part, loaded_as_trained
    from tests.jobs import make_job

    world, results = read_world(), {}
    connect(world, TIMEOUT_S)
    job = make_job(
        f"model.path={args.folder / 'model'}", "data.path=unused", "train.method=full", "data.buckets=[9x64x64]",
        deepspeed=args.deepspeed, world=world,
    )  # fmt: skip

    def build():
        transformer = load_for_stage(job.model, job.dtype, job.ds_config, world, trained=loaded_as_trained(job))
        engine = start_engine(transformer, add_trained_part(transformer, job), job.ds_config)
        make_optimizer_states(engine)
        return engine

    checkpoint = args.folder / "step-000001"
    with measured(results, "load and build"):
        engine = build()
    shard = local_shard(engine)
    share = shard.num_bytes
    header = {"num_updates": 0, "num_shards": world.size, **shard_header(engine)}
    barrier(world)
    with measured(results, "save while training waits"):
        shard.write(checkpoint / shard_name(world.rank, world.size))
    barrier(world)
    if args.background:
        with measured(results, "save in the background"):
            buffer = HostBuffer(share)
            local_shard(engine).copy(buffer).write(args.folder / f"copy-{world.rank}.safetensors")
            del buffer
        (args.folder / f"copy-{world.rank}.safetensors").unlink()
    barrier(world)
    export = FullExport(job.model, job.dtype, frozenset(job.targets), 1.0, {})
    with measured(results, "export"), ShardReader(checkpoint, world.size) as reader:
        export.write_files(
            args.folder / "exported", lambda name, size: reader.read("weight", name, 0, size), world.rank, world.size
        )
    barrier(world)
    with measured(results, "resume"):
        restore_shards(engine, checkpoint, header)
    ranks = all_gather(world, {"share": share / 1e9, **results})
    if world.rank == 0:
        parameters = job.memory.transformer.num_parameters
        (args.folder / "results.json").write_text(json.dumps({"parameters": parameters, "ranks": ranks}))
    disconnect()


def main(arguments: list[str] | None = None) -> None:
    """Start the ranks and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--heads", type=int, default=32, help="of 64 channels")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--deepspeed", default="zero3", help="config of ds_configs/")
    parser.add_argument("--background", action="store_true", help="also save from a copy, which takes twice the memory")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.folder:
        work(args)
        return
    with tempfile.TemporaryDirectory(prefix="full-state-") as name:
        folder = Path(name)
        for part in ("step-000001", "exported"):
            (folder / part).mkdir()
        write_model(folder / "model", args.layers, args.heads)
        command = [sys.executable, __file__, "--folder", name, "--deepspeed", args.deepspeed]
        command += ["--background"] if args.background else []
        size = str(args.ranks)
        environment = {**os.environ, "WORLD_SIZE": size, "LOCAL_SIZE": size, "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(args.ranks)
        ]
        codes = [process.wait(TIMEOUT_S) for process in ranks]
        if any(codes):
            sys.exit(f"the ranks ended with {codes}")
        results = json.loads((folder / "results.json").read_text())
    size = f"{results['parameters'] / 1e9:.2f} B parameters"
    print(f"{size}, {args.ranks} ranks, {args.deepspeed}; peak rise [GB] and time [s]")

    for rank, values in enumerate(results["ranks"]):
        share = values.pop("share")
        figures = ", ".join(f"{name} {rise:.2f} ({seconds:.0f} s)" for name, (rise, seconds) in values.items())
        print(f"rank {rank}: share of the state {share:.2f}; {figures}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
