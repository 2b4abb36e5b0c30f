"""Measure 8-bit Adam (bitsandbytes) under ZeRO: losses and weights of a full fine-tune, against float32 Adam.

    python -m pip install --target quant --no-deps bitsandbytes
    PYTHONPATH=quant python benchmarks/adam_8bit.py --folder DIR [--steps 60] [--layouts zero1x1 zero2x1 ...]

A layout is a ZeRO stage and a number of ranks. The shapes model trains on the demo's clips with both optimizers, in the
product, with the same clips and noise. With one rank and ZeRO-2, there are two more runs: at half of the steps, the
8-bit moments are unpacked to float32 and packed again, as a resume from a checkpoint in float32 would do, with the same
blocks or, as in another layout, with blocks that begin elsewhere. Prints a table and a line of JSON.

The checkpoints of these runs have no usable moments. Only their weights are read.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

LAYOUTS = ("zero1x1", "zero2x1", "zero3x1", "zero1x2", "zero2x2", "zero3x2")
BLOCK = 256  # elements that share a scale, in bitsandbytes
SHIFT = 100  # elements before the first block of another layout
TIMEOUT_S = 2400
REPACKED = {"repacked": 0, "repacked, other blocks": SHIFT}


def pack(value: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and the scales of a moment."""
    import bitsandbytes.functional as F

    codes, state = F.quantize_blockwise(value, code=code, blocksize=BLOCK)
    return codes, state.absmax


def unpack(codes: torch.Tensor, scales: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Return a moment in float32."""
    import bitsandbytes.functional as F

    return F.dequantize_blockwise(codes.view(-1), absmax=scales, code=code, blocksize=BLOCK)


def repack(state: dict[str, Any], shift: int) -> None:
    """Unpack the moments and pack them again. shift: of another layout's blocks, in which they are packed first."""
    for number in (1, 2):
        codes, scales, code = (state[f"{key}{number}"] for key in ("state", "absmax", "qmap"))
        value = unpack(codes, scales, code)
        if shift:
            value = torch.cat([unpack(*pack(part, code), code) for part in (value[:shift], value[shift:])])
        new_codes, new_scales = pack(value, code)
        codes.copy_(new_codes)
        scales.copy_(new_scales)


def engine_starter(optimizer: str, repacked_at: int | None, shift: int, record: dict[str, Any]) -> Callable[..., Any]:
    """Return a `start_engine` that trains with an optimizer of torch or bitsandbytes.

    repacked_at: step after which the moments are packed again. record: gets the largest change of a weight in each
    step, in learning rates.
    """
    import deepspeed

    def make(parameters: Sequence[torch.Tensor], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
        if optimizer == "float32":
            return torch.optim.AdamW(parameters, **settings)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)

    def start(transformer: Any, parameters: Sequence[torch.nn.Parameter], ds_config: Mapping[str, Any]) -> Any:
        config = {**copy.deepcopy(dict(ds_config)), "zero_allow_untested_optimizer": True}
        given = config.pop("optimizer")["params"]
        settings = {key: given[key] for key in ("lr", "betas", "eps", "weight_decay")}
        engine, *_ = deepspeed.initialize(
            model=transformer,
            model_parameters=list(parameters),
            optimizer=lambda trained: make(trained, settings),
            config=config,
        )
        basic, changes = engine.basic_optimizer, record.setdefault("changes", [])
        step = basic.step

        def measured_step(*args: Any, **kwargs: Any) -> Any:
            masters = [master for group in basic.param_groups for master in group["params"]]
            before, rate = [master.detach().clone() for master in masters], basic.param_groups[0]["lr"]
            result = step(*args, **kwargs)
            distances = [(master.detach() - old).abs().max().item() for master, old in zip(masters, before)]
            changes.append(max(distances) / rate if rate else 0.0)
            if len(changes) == repacked_at:
                for master in masters:
                    repack(basic.state[master], shift)
            return result

        basic.step = measured_step
        return engine

    return start


def work(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Train the jobs one after another in a rank."""
    import cogds.train.trainer
    from cogds.distributed.process_group import connect, disconnect
    from cogds.distributed.world import read_world
    from cogds.process.signals import StopRequest
    from tests.jobs import make_job

    world = read_world()
    connect(world, 300)
    for job in jobs:
        record: dict[str, Any] = {}
        output = Path(job["output"])
        cogds.train.trainer.start_engine = engine_starter(job["optimizer"], job["repacked_at"], job["shift"], record)
        resolved = make_job(
            *job["words"], config=ROOT / "launch/configs/demo.yaml", deepspeed=job["deepspeed"], world=world
        )
        output.mkdir(parents=True, exist_ok=True)
        cogds.train.trainer.Trainer(resolved, StopRequest()).run()
        (output / f"rank-{world.rank}.json").write_text(json.dumps(record))
    disconnect()


def make_jobs(folder: Path, layouts: Sequence[str], steps: int) -> dict[int, list[dict[str, Any]]]:
    """Return the runs of each number of ranks."""
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for layout in layouts:
        deepspeed, ranks = layout.split("x")
        kinds: dict[str, tuple[str, int | None, int]] = {"float32": ("float32", None, 0), "8-bit": ("8-bit", None, 0)}
        if layout == "zero2x1":
            kinds |= {name: ("8-bit", steps // 2, shift) for name, shift in REPACKED.items()}
        for name, (optimizer, repacked_at, shift) in kinds.items():
            output = folder / f"{layout} {name}"
            words = [
                f"data.path={folder / 'clips'}", "data.draw_demo_clips=false", f"data.cache_dir={folder / 'cache'}",
                f"output_dir={output}",
                f"train.num_steps={steps}", f"train.gradient_accumulation_steps={2 // int(ranks)}", "eval.every=null",
                "sample.every=null", f"checkpoint.every={steps}", "metrics.show_clips=0", "data.num_workers=0",
                "train.method=full", "optimizer.lr=5e-4", "metrics.progress_bar=false",
            ]  # fmt: skip
            jobs[int(ranks)].append(
                {"optimizer": optimizer, "repacked_at": repacked_at, "shift": shift, "deepspeed": deepspeed,
                 "output": str(output), "words": words}
            )  # fmt: skip
    return jobs


def read_run(folder: Path, steps: int) -> tuple[list[float], dict[str, torch.Tensor], float]:
    """Return the losses of a run, its final float32 weights, and the largest change of a weight in a step."""
    from cogds.engine.shards import ShardReader
    from cogds.metrics.jsonl import step_lines

    losses = [line["train/loss"] for line in step_lines((folder / "metrics.jsonl").read_text())]
    checkpoint = folder / f"checkpoints/step-{steps:06d}"
    header = json.loads((checkpoint / "state.json").read_text())
    with ShardReader(checkpoint, header["num_shards"]) as reader:
        weights = {name: reader.read("weight", name, 0, math.prod(shape)) for name, shape in header["shapes"].items()}
    records = [json.loads(file.read_text())["changes"] for file in folder.glob("rank-*.json")]
    return losses, weights, max(map(max, records))


def distance(weights: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> float:
    """Return the distance between two sets of weights."""
    return math.sqrt(sum((weights[name] - others[name]).square().sum().item() for name in weights))


def compare(folder: Path, layouts: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Return a row per run with 8-bit Adam: against float32 Adam in the same layout, or without packing again."""
    from cogds.model.load import SHAPES_MODEL, find_model, load_transformer

    base = load_transformer(find_model(SHAPES_MODEL), torch.float32, torch.device("cpu"))
    before = {name: weight.detach().flatten() for name, weight in base.named_parameters()}
    rows = []
    for layout in layouts:
        pairs = [("8-bit", "float32")]
        pairs += [(name, "8-bit") for name in REPACKED] if layout == "zero2x1" else []
        for name, reference in pairs:
            losses, weights, change = read_run(folder / f"{layout} {name}", steps)
            expected, others, other_change = read_run(folder / f"{layout} {reference}", steps)
            errors = [abs(loss / other - 1) for loss, other in zip(losses, expected, strict=True)]
            way = distance(others, {key: before[key] for key in others})
            rows.append(
                {
                    "layout": layout, "run": name, "against": reference, "mean": sum(errors) / steps,
                    "max": max(errors), "weights": distance(weights, others) / way, "change": change,
                    "change_of_other": other_change, "final": statistics.mean(losses[-20:]),
                    "final_of_other": statistics.mean(expected[-20:]),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Run all layouts, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="empty folder for all files")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jobs:
        work(args.jobs)
        return
    from cogds.shapes.clips import demo_scenes, write_clips
    from tests.conftest import free_port
    from tests.warm import Server

    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_clips(folder / "clips", demo_scenes())
    server = Server()
    for ranks, jobs in make_jobs(folder, args.layouts, args.steps).items():
        if jobs:
            log = folder / f"{ranks}.log"
            codes = server.run(__file__, ["--jobs", json.dumps(jobs)], ranks, TIMEOUT_S, free_port(), ROOT, log)
            if any(code != 0 for code in codes):
                sys.exit(f"{ranks} ranks ended with {codes}; see {log}")
    server.close()
    rows = compare(folder, args.layouts, args.steps)
    print("| layout | run | against | loss: mean error | largest | weights: distance / way | step / lr | last losses |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['layout']} | {row['run']} | {row['against']} | {row['mean']:.1e} | {row['max']:.1e} | "
            f"{row['weights']:.2%} | {row['change']:.2f} / {row['change_of_other']:.2f} | "
            f"{row['final']:.4f} / {row['final_of_other']:.4f} |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
