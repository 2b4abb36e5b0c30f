"""The prepare verb: from long videos to a table of scored and captioned clips. Re-encodes nothing."""

import argparse
import importlib.util
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cogds.config.loading import load_config
from cogds.config.schema import DataConfig
from cogds.data.storage.location import display_name, is_url
from cogds.distributed.collectives import on_all_ranks, on_rank0
from cogds.distributed.process_group import connect, disconnect
from cogds.distributed.run_lock import hold_run_lock
from cogds.distributed.world import World, read_world
from cogds.errors import UserError, refuse_to_run
from cogds.files import whole_file
from cogds.formatting import counted, duration
from cogds.prepare.captioning import CaptionOutcome, caption_key, caption_share, write_tasks
from cogds.prepare.captions import DEFAULT_PROMPT, CaptionOptions
from cogds.prepare.clip_table import Prepared, PreparedScene, collect, write_clips
from cogds.prepare.scene import CutOptions
from cogds.prepare.sources import make_work_folder, write_sources
from cogds.prepare.state import CAPTIONS, WorkFolder, read_table
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
    cfg = load_config(args.config, args.overrides)[0]
    check_dataset(cfg.data)
    request = read_request(cfg.data, args)
    world = read_world()
    StopRequest(find_launchers()).listen()  # results are kept
    if world.size > 1:
        connect(world, WAIT_S, cfg.network)
    prepare(cfg.data, request, world)
    disconnect()


@dataclass(frozen=True)
class Request:
    """What to prepare and how. captions: None: the sources' own captions are kept."""

    output: Path
    cut: CutOptions
    captions: CaptionOptions | None
    workers: Workers


def prepare(data: DataConfig, request: Request, world: World) -> None:
    """Prepare a dataset and write the table. Collective. Raises UserError if scenes could not be captioned."""
    folder = on_rank0(world, partial(make_work_folder, data, request.output))
    with hold_run_lock(world, folder.path, key="--output"):
        outcomes = _prepare(data, request, world, folder)
    report_captions(outcomes)


def _prepare(data: DataConfig, request: Request, world: World, folder: WorkFolder) -> list[CaptionOutcome]:
    from cogds.prepare.cutting import cut_share  # imports the libraries of the extra

    cut, workers, options = request.cut, request.workers, request.captions
    on_rank0(world, partial(write_sources, folder, data, cut, world.size))
    shares = on_all_ranks(world, partial(cut_share, folder, world.rank, cut, workers))
    failures = {key: reason for share in shares for key, reason in share.items()}
    outcomes: list[CaptionOutcome] = []
    if options:
        on_rank0(world, partial(write_tasks, folder, options, world.size))
        outcomes = on_all_ranks(world, partial(caption_share, folder, world.rank, options, workers))
    on_rank0(world, partial(_finish, folder, request, failures))
    return outcomes


def check_libraries(args: argparse.Namespace) -> None:
    """Raise UserError if a library is missing that these arguments need."""
    needed = {"scenedetect": True, "cv2": True, "rapidocr": "text" in args.scores, "openai": bool(args.caption_url)}
    for library, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(library) is None:
            raise UserError(f"cogds prepare: the library {library} is not installed. Run `pip install cogds[prepare]`.")


def check_dataset(data: DataConfig) -> None:
    """Raise UserError if no dataset is named, or several."""
    if data.sets:
        raise UserError(f"data.sets: {len(data.sets)} datasets. Prepare each by itself, with data.path and --output.")
    if not data.path or data.draw_demo_clips:  # without --config, it is the demo's
        raise UserError("data.path: not set. Pass a folder, list or table of videos: data.path=...")


def read_request(data: DataConfig, args: argparse.Namespace) -> Request:
    """The request of a command line. Raises UserError if its arguments contradict each other."""
    if is_url(args.output):
        raise UserError(f"--output: {args.output} is a URL. Write the table to a folder, and upload it.")
    if args.max_scene is not None and args.max_scene < args.min_scene:
        raise UserError(f"--max-scene: {args.max_scene:g} s is below --min-scene, {args.min_scene:g} s. Raise it.")
    return Request(
        output=Path(os.path.abspath(os.path.expanduser(args.output))),
        cut=CutOptions(
            threshold=None if args.no_cuts else args.threshold,
            min_s=args.min_scene,
            max_s=args.max_scene or math.inf,
            scores=args.scores,
        ),
        captions=_caption_options(args),
        workers=Workers(data.num_workers, args.file_timeout, int(data.decode_memory_gb * 1e9)),
    )


def _caption_options(args: argparse.Namespace) -> CaptionOptions | None:
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


def _finish(folder: WorkFolder, request: Request, failures: dict[bytes, str]) -> None:
    prepared = collect(folder, failures)
    captions = [_own_captions(scene) for scene in prepared.scenes]
    if request.captions:
        known = folder.read_results(CAPTIONS)
        keys = [caption_key(scene, request.captions) for scene in prepared.scenes]
        captions = [[known[key]["caption"]] if key in known else [] for key in keys]
    extras = read_table(folder.extras)
    assert extras is not None
    num_duplicates = write_clips(request.output, prepared, captions, request.cut.scores, extras)
    _summarize(prepared, num_duplicates, folder, request.output)


def _own_captions(scene: PreparedScene) -> list[str]:
    source = scene.source
    return [] if source["caption"] is None else [source["caption"], *source["more_captions"]]


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
                file.write(json.dumps({"path": display_name(path), "reason": reason}) + "\n")
        for path, reason in prepared.unusable[:NUM_SHOWN]:
            logger.warning("%s: %s", display_name(path), reason)
        logger.warning("%s, see %s", counted(len(prepared.unusable), "problem"), folder.unusable)
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
