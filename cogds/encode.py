"""Encode a dataset before it is trained, or look after what was encoded."""

import argparse
import json
import sys
from pathlib import Path

from cogds.cli import make_folders, parse_args
from cogds.config import load_config, replace
from cogds.data.upkeep import VerifyReport, prune, stats, verify
from cogds.errors import refuse_to_run
from cogds.model.load import find_model
from cogds.prepare.demo import make_demo, only_own_demo
from cogds.prepare.desk import NO_CAPTION, EncodingNames
from cogds.prepare.encoding import prepare
from cogds.prepare.survey import make_buckets
from cogds.runtime.interrupt import Interrupt, find_launchers
from cogds.runtime.world import connect, disconnect, on_rank0, read_world
from cogds.wording import counted


def main(default_config: Path, argv: list[str] | None = None) -> None:
    """Encode what the run's dataset lacks, so that training starts at once; or look after the cache."""
    args = parse_args(
        sys.argv[1:] if argv is None else argv,
        "Encode a dataset's clips and captions into data.cache_dir; a second run does only what is left.",
        _add_arguments,
    )
    cfg, _ = load_config(args.config or str(default_config), args.overrides)
    if not args.config:
        cfg = only_own_demo(cfg, args.overrides)
    cfg = replace(cfg, {"data.encode": "cached"})
    cache_dir = cfg.data.cache_dir
    if args.stats:
        print(json.dumps(stats(cache_dir), indent=2))
        return
    if args.verify:
        print_verified(verify(cache_dir, show_progress=True))
        return
    world = read_world()
    make_demo(cfg)
    model = find_model(cfg.model.path, cfg.model.revision)
    buckets = make_buckets(cfg, model)
    Interrupt(find_launchers()).listen()  # every entry is kept as soon as it is made: nothing needs saving
    connect(world, cfg.train.timeout_s, cfg.network)
    on_rank0(world, lambda: make_folders({"data.cache_dir": cache_dir}))
    if args.retry:
        on_rank0(world, lambda: prune(cache_dir, failed=True, shard_bytes=int(cfg.data.shard_gb * 1e9)))
    data = prepare(cfg, model, buckets, world, retry=args.retry)
    if world.rank == 0:
        apart = f", and {len(data.held_out)} to be evaluated only" if data.held_out is not None else ""
        print(f"{counted(len(data.index), 'clip')} encoded in {cache_dir}{apart}")
        if data.unusable.num:
            print(f"{counted(data.unusable.num, 'clip')} not usable, see {data.unusable.file}: {data.unusable.text()}")
        if args.prune:
            kinds = {"clips": "clip_key", "captions": "caption_key"}
            keep = {kind: set().union(*(one.keys(name) for one in data.indices)) for kind, name in kinds.items()}
            names, of_no_clip = EncodingNames(cfg, model), [NO_CAPTION, *(one.prompt for one in cfg.sample.prompts)]
            keep["captions"] |= {names.caption(text).hex() for text in of_no_clip}
            pruned = prune(cache_dir, keep, shard_bytes=int(cfg.data.shard_gb * 1e9))
            for path in set(data.index.path.parent.iterdir()):
                if not path.name.startswith(tuple(one.path.stem for one in data.indices)):
                    path.unlink(missing_ok=True)
            print(
                f"removed {counted(pruned.num_entries, 'entry')}, {pruned.num_bytes / 1e9:.3f} GB; merged "
                f"{counted(pruned.num_merged, 'small shard')}"
            )
    disconnect()


def print_verified(report: VerifyReport) -> None:
    """What a look at every entry found, for people."""
    for one in report.damaged:
        print(f"removed {one.kind}/{one.place} {one.key}: {one.reason}")
    print(
        f"{counted(report.num_entries, 'entry')} whole ({report.num_bytes / 1e9:.3f} GB), "
        f"{counted(report.num_failures, 'clip')} not decodable, {len(report.damaged)} damaged and removed: the next "
        "run encodes them anew"
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stats", action="store_true", help="print what the cache holds, and do nothing else")
    parser.add_argument(
        "--verify", action="store_true", help="read the whole cache, remove what is damaged, and do nothing else"
    )
    parser.add_argument("--retry", action="store_true", help="try files again that could not be read before")
    parser.add_argument("--prune", action="store_true", help="remove all that this run's dataset does not use")


if __name__ == "__main__":
    refuse_to_run("cogds.encode", "encode")
