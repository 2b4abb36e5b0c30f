"""The elastic matrix: a run is saved in one layout and resumed in another, for every pair of layouts.

    python tests/dist/elastic.py --folder DIR [--pairs covering|all] [--method lora|full]

A layout is a number of ranks and a shipped DeepSpeed config, on the tiny model in float32. Gradient accumulation is set
to four clips per step, so every layout trains the same clips with the same captions (of three), condition modes (of
five, for a LoRA) and noise, and the losses must be those of the uninterrupted run. Prints a table and a line of JSON.
The exit code is 1 if a pair fails.

For each number of ranks, the processes are forked once to save and once to resume, and run all jobs.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RANKS, CONFIGS = (1, 2, 4), ("zero1", "zero2", "zero3", "zero3_offload")
LAYOUTS = list(itertools.product(RANKS, CONFIGS))
# There are 11 clips, so the layout changes in the second epoch, and the run ends in the third.
SAVED, LAST, CLIPS_PER_STEP = 4, 8, 4
TOLERANCE = 2e-5
METHODS = {
    "lora": [
        "lora.rank=3",
        "lora.alpha=5",
        "optimizer.lr=1e-2",
        "conditioning.modes={first: 0.2, first_last: 0.2, prefix: 0.2, suffix: 0.2, none: 0.2}",
    ],
    "full": ["train.method=full", "optimizer.lr=1e-4"],
}
FULL_LAYOUTS = list(itertools.product(RANKS, ("zero2", "zero3", "zero3_offload")))


def covering():
    """Return pairs in which every layout saves and resumes, with every change of ranks and every change of config."""
    pairs = [
        ((ranks, ds), (RANKS[(i + 1) % len(RANKS)], CONFIGS[(j + i + 1) % len(CONFIGS)]))
        for i, ranks in enumerate(RANKS)
        for j, ds in enumerate(CONFIGS)
    ]
    return pairs + [((ranks, "zero2"), (RANKS[i - 1], "zero3")) for i, ranks in enumerate(RANKS)]


def full_covering():
    """Return some pairs of layouts for full fine-tuning: other ranks, stages and offload, up and down."""
    return [((1, "zero3"), (4, "zero2")), ((4, "zero3_offload"), (2, "zero3"))]


def name(layout):
    return f"{layout[0]}x{layout[1]}"


def overrides(folder, layout, output, *more):
    return [
        f"model.path={folder / 'model'}", f"data.path={folder / 'clips.jsonl'}", f"data.cache_dir={folder / 'cache'}",
        "data.buckets=[9x64x64]", "data.num_workers=0", f"output_dir={folder / output}", "train.precision=fp32",
        f"train.gradient_accumulation_steps={CLIPS_PER_STEP // layout[0]}", f"train.num_steps={LAST}",
        "optimizer.warmup_steps=2", f"checkpoint.every={SAVED}", "metrics.progress_bar=false", "eval.every=null", *more,
    ]  # fmt: skip


def work(jobs):
    """Train the jobs one after another in a rank. A job is a DeepSpeed config and overrides."""
    from cogds.distributed.process_group import connect, disconnect
    from cogds.distributed.world import read_world
    from cogds.process.signals import StopRequest
    from cogds.train.trainer import Trainer
    from tests.jobs import make_job

    world = read_world()
    connect(world, 300)
    for deepspeed, words in jobs:
        job = make_job(*words, config=ROOT / "tests/tiny.yaml", deepspeed=deepspeed, world=world)
        Path(job.cfg.output_dir).mkdir(parents=True, exist_ok=True)
        Trainer(job, StopRequest()).run()
    disconnect()


def launch(server, num_ranks, jobs, folder, timeout_s):
    """Run the jobs on `num_ranks` ranks. Raises if one fails."""
    from tests.conftest import free_port

    port, output = free_port(), folder / f"{num_ranks}.log"
    codes = server.run(__file__, ["--jobs", json.dumps(jobs)], num_ranks, timeout_s, port, ROOT, output)
    if any(code != 0 for code in codes):
        raise RuntimeError(f"{num_ranks} ranks ended with {codes}:\n{output.read_text()[-6000:]}")


def losses(folder):
    from cogds.metrics.jsonl import step_lines

    return [line["train/loss"] for line in step_lines((folder / "metrics.jsonl").read_text())]


def visits(checkpoint, step, last):
    """Return the positions that a run draws from `step` to `last`, according to the plan in a checkpoint."""
    from cogds.core.plan import Origin, Plan

    fields = json.loads((checkpoint / "state.json").read_text())["plan"]
    plan = Plan(**fields | {"origin": Origin(**fields["origin"])})
    return [
        position
        for number in range(step, last)
        for micro_batch in plan.at(number)
        for part in micro_batch.parts
        for position in range(part.start, part.start + part.num_draws)
    ]


def run_matrix(folder, pairs, timeout_s=3600, method="lora"):
    """Return `{(source, target): largest difference of a loss}` and a list of errors."""
    from tests.drawn import draw_clips
    from tests.tiny import create_tiny_model
    from tests.warm import Server

    create_tiny_model(folder / "model")
    for seed in (0, 1):
        draw_clips(folder / f"clips/{seed}", seed)
        (folder / f"clips/{seed}/image_0.png").unlink()
    (folder / "clips/1/clip_5.mp4").unlink()
    rows = [
        {"file_name": str(path), "captions": [path.with_suffix(".txt").read_text(), "a shape", f"shape {number}"]}
        for number, path in enumerate(sorted((folder / "clips").glob("*/*.mp4")))
    ]
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = {source for source, _ in pairs} | {LAYOUTS[0]}
    server = Server()
    for ranks in RANKS:
        jobs = [
            (ds, overrides(folder, (ranks, ds), name((ranks, ds)), *METHODS[method]))
            for r, ds in sorted(sources)
            if r == ranks
        ]
        if jobs:
            launch(server, ranks, jobs, folder, timeout_s)
    for ranks in RANKS:
        jobs = []
        for source, target in pairs:
            if target[0] == ranks:
                saved = folder / name(source) / f"checkpoints/step-{SAVED:06d}"
                output = f"{name(source)}-to-{name(target)}"
                jobs.append(
                    (target[1], overrides(folder, target, output, f"checkpoint.resume={saved}", *METHODS[method]))
                )
        if jobs:
            launch(server, ranks, jobs, folder, timeout_s)
    server.close()
    reference = losses(folder / name(LAYOUTS[0]))
    assert len(reference) == LAST
    differences, errors = {}, []
    for source, target in pairs:
        output = folder / f"{name(source)}-to-{name(target)}"
        resumed = losses(output)
        assert len(resumed) == LAST - SAVED
        differences[source, target] = max(abs(a - b) for a, b in zip(resumed, reference[SAVED:]))
        if not differences[source, target] <= TOLERANCE:  # also true for NaN
            errors.append(f"{name(source)} to {name(target)}: losses {resumed} instead of {reference[SAVED:]}")
        before = visits(folder / name(source) / f"checkpoints/step-{SAVED:06d}", 0, SAVED)
        after = visits(output / f"checkpoints/step-{LAST:06d}", SAVED, LAST)
        if sorted(before + after) != list(range(LAST * CLIPS_PER_STEP)):
            errors.append(f"{name(source)} to {name(target)}: trained {before} and then {after}")
    return differences, errors


def table(differences):
    """Return a Markdown table: rows save, columns resume."""
    targets = sorted({target for _, target in differences})
    lines = ["| saved by | " + " | ".join(map(name, targets)) + " |", "|---" * (len(targets) + 1) + "|"]
    for source in sorted({source for source, _ in differences}):
        cells = [f"{differences[source, t]:.0e}" if (source, t) in differences else "" for t in targets]
        lines.append(f"| {name(source)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="empty folder for all files")
    parser.add_argument("--pairs", choices=("covering", "all"), default="all")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jobs:
        work(args.jobs)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    layouts, chosen = (LAYOUTS, covering) if args.method == "lora" else (FULL_LAYOUTS, full_covering)
    pairs = chosen() if args.pairs == "covering" else list(itertools.product(layouts, layouts))
    differences, errors = run_matrix(args.folder.resolve(), pairs, method=args.method)
    print(table(differences))
    print(json.dumps({"pairs": len(differences), "wrong": errors, "largest_difference": max(differences.values())}))
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
