"""The prepare verb: from long videos to a table of scored and captioned clips. Re-encodes nothing."""

import argparse
import importlib.util
import json
import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cogds.config.loading import load_config
from cogds.config.schema import DataConfig
from cogds.distributed.collectives import on_all_ranks, on_rank0
from cogds.distributed.process_group import connect, disconnect
from cogds.distributed.world import read_world
from cogds.errors import UserError, refuse_to_run
from cogds.files import whole_file
from cogds.formatting import counted, duration
from cogds.prepare.captioning import CaptionOutcome, caption_key, caption_share, write_tasks
from cogds.prepare.captions import DEFAULT_PROMPT, CaptionOptions
from cogds.prepare.clip_table import Prepared, collect, write_clips
from cogds.prepare.scene import CutOptions
from cogds.prepare.sources import write_sources
from cogds.prepare.state import CAPTIONS, WorkFolder
from cogds.prepare.workers import Workers
from cogds.process.environment import openai_api_key
from cogds.process.logs import RESULT
from cogds.process.signals import StopRequest, find_launchers

logger = logging.getLogger(__name__)

# A rank may wait this long for another one that has a longer film.
WAIT_S = 7 * 86_400.0
NUM_SHOWN = 5


def main(args: argparse.Namespace) -> None:
    """Cut, score and caption a dataset, and write the table of its clips."""
    check_libraries(args)
    from cogds.prepare.cutting import cut_share  # needs the libraries

    cfg = load_config(args.config, args.overrides)[0]
    check_dataset(cfg.data, args)
    output = Path(os.path.abspath(os.path.expanduser(args.output)))
    options = CutOptions(
        threshold=None if args.no_cuts else args.threshold,
        min_s=args.min_scene,
        max_s=args.max_scene or math.inf,
        scores=args.scores,
    )
    caption_options = read_caption_options(args)
    workers = Workers(cfg.data.num_workers, args.file_timeout, int(cfg.data.decode_memory_gb * 1e9))
    world = read_world()
    StopRequest(find_launchers()).listen()  # results are kept
    if world.size > 1:
        connect(world, WAIT_S, cfg.network)
    folder = on_rank0(world, partial(write_sources, cfg.data, output, options, world.size))
    shares = on_all_ranks(world, partial(cut_share, folder, world.rank, options, workers))
    failures = {key: reason for share in shares for key, reason in share.items()}
    outcomes: list[CaptionOutcome] = []
    if caption_options:
        write = partial(_write_caption_tasks, folder, failures, caption_options, world.size)
        on_rank0(world, write)
        outcomes = on_all_ranks(world, partial(caption_share, folder, world.rank, caption_options, workers))
    on_rank0(world, partial(_finish, folder, output, failures, caption_options, options.scores))
    disconnect()
    report_captions(outcomes)


def check_libraries(args: argparse.Namespace) -> None:
    """Raise UserError if a library is missing that these arguments need."""
    needed = {"scenedetect": True, "cv2": True, "rapidocr": "text" in args.scores, "openai": bool(args.caption_url)}
    for library, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(library) is None:
            raise UserError(f"cogds prepare: the library {library} is not installed. Run `pip install cogds[prepare]`.")


def check_dataset(data: DataConfig, args: argparse.Namespace) -> None:
    """Raise UserError if the command line and the config name no dataset, or several."""
    if data.sets:
        raise UserError(f"data.sets: {len(data.sets)} datasets. Prepare each by itself, with data.path and --output.")
    if args.is_demo and not any(word.startswith("data.path=") for word in args.overrides):
        raise UserError("data.path: not set. Pass a folder, list or table of videos: data.path=...")


def read_caption_options(args: argparse.Namespace) -> CaptionOptions | None:
    """The options of captioning; None if it is not asked for."""
    if not args.caption_url:
        if args.caption_model:
            raise UserError("--caption-url: not set, but --caption-model is. Pass the URL of the endpoint too.")
        return None
    if not args.caption_model:
        raise UserError("--caption-model: not set, but --caption-url is. Pass the name of the endpoint's model too.")
    return CaptionOptions(
        url=args.caption_url,
        model=args.caption_model,
        prompt=args.caption_prompt or DEFAULT_PROMPT,
        num_frames=args.caption_frames,
        num_requests=args.caption_requests,
        timeout_s=args.caption_timeout,
        api_key=openai_api_key(),
    )


def _write_caption_tasks(
    folder: WorkFolder, failures: dict[bytes, str], options: CaptionOptions, num_ranks: int
) -> None:
    write_tasks(folder, collect(folder, failures).scenes, options, num_ranks)


def _finish(
    folder: WorkFolder,
    output: Path,
    failures: dict[bytes, str],
    caption_options: CaptionOptions | None,
    scores: Sequence[str],
) -> None:
    prepared = collect(folder, failures)
    captions = [scene.source["caption"] for scene in prepared.scenes]
    if caption_options:
        known = folder.read_results(CAPTIONS)
        keys = [caption_key(scene, caption_options) for scene in prepared.scenes]
        captions = [known[key]["caption"] if key in known else None for key in keys]
    num_duplicates = write_clips(output, prepared.scenes, captions, scores)
    _summarize(prepared, num_duplicates, folder, output)


def _summarize(prepared: Prepared, num_duplicates: int, folder: WorkFolder, output: Path) -> None:
    clips_s = sum(scene.length_s or 0.0 for scene in prepared.scenes)
    logger.log(
        RESULT,
        f"{counted(prepared.num_sources, 'file')}, {counted(len(prepared.scenes), 'scene')}, {duration(clips_s)} of "
        f"{duration(prepared.source_s)}",
    )
    if prepared.num_short:
        logger.log(RESULT, f"{counted(prepared.num_short, 'scene')} left out because of --min-scene")
    if num_duplicates:
        logger.log(RESULT, f"{counted(num_duplicates, 'near duplicate')}, see the column duplicate_of")
    folder.unusable.unlink(missing_ok=True)
    if prepared.unusable:
        with whole_file(folder.unusable) as partial_file, partial_file.open("w", encoding="utf-8") as file:
            for path, reason in prepared.unusable:
                file.write(json.dumps({"path": path, "reason": reason}) + "\n")
        for path, reason in prepared.unusable[:NUM_SHOWN]:
            logger.warning("%s: %s", path, reason)
        logger.warning("%s damaged or unusable, see %s", counted(len(prepared.unusable), "file"), folder.unusable)
    logger.log(RESULT, f"table: {output}")


def report_captions(outcomes: Sequence[CaptionOutcome]) -> None:
    """Raise UserError if scenes have no caption. The table is written, and the next run asks for those only."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        raise UserError(errors[0])
    num_failures = sum(outcome.num_failures for outcome in outcomes)
    if num_failures:
        reason = next(outcome.reason for outcome in outcomes if outcome.num_failures)
        raise UserError(
            f"--caption-url: {counted(num_failures, 'scene')} without a caption ({reason}). Start the same command "
            "again, which asks only for these."
        )


if __name__ == "__main__":
    refuse_to_run("cogds.prepare.main", "prepare")
