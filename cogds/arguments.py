"""The command-line arguments of every verb.

    args = parse_args("train", ["--config", "run.yaml", "train.num_steps=100"])

`--help` imports this module and the config schema only, so it does not wait for torch.
"""

import argparse
import base64
import binascii
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import cogds
from cogds.config.reference import help_text
from cogds.core.flops import GPUS
from cogds.errors import UserError, did_you_mean

# Formats of `export`. The merged ones contain full weights.
MERGED_FORMATS = ("merged", "comfyui-merged")
EXTRACTED = "lora"  # a LoRA of a fine-tuned model
EXPORT_FORMATS = ("diffusers", "comfyui", "comfyui-wrapper", *MERGED_FORMATS)
EXPORT_DTYPES = ("bf16", "fp16", "fp32")
PRECISIONS = ("bf16", "fp32")
# Checks of `preflight` that can be skipped, in the order of its table.
PREFLIGHT_CHECKS = ("versions", "tools", "sources", "disk", "gpu", "network", "folders", "exchange", "step")

# Scores of `prepare`.
SCORES = ("motion", "sharpness", "text", "duplicates")

# Run configs for `--config recipe:NAME`, in launch/configs/recipes.
RECIPES = ("style", "character", "motion")
RECIPE_PREFIX = "recipe:"
# Where `init` asks that a LoRA will be used.
USES = ("diffusers", "comfyui", "both")

PACKAGE = Path(cogds.__file__).parent


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}. See `{self.prog} --help`.")


@dataclass(frozen=True)
class Verb:
    """A command.

    module: has its `main(args)`. takes_config: accepts --config, --deepspeed and `key=value` words. is_launchable: can
    run on several ranks.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    takes_config: bool = True
    is_launchable: bool = False


def shipped_config(folder: str, name: str) -> Path:
    """Return the path of a config that comes with cogds, in the installed package or in the checkout.

    folder: "ds_configs" or "run_configs".
    """
    installed = PACKAGE / folder / name
    checkout = PACKAGE.parent / {"ds_configs": "ds_configs", "run_configs": "launch/configs"}[folder] / name
    return installed if installed.is_file() else checkout


def find_config(text: str, folder: str, suffix: str) -> str:
    """Return the path that a `--config` or `--deepspeed` value means: a file, or the name of a shipped config.

    Raises UserError for an unknown recipe.
    """
    if text.startswith(RECIPE_PREFIX):
        name = text.removeprefix(RECIPE_PREFIX)
        if name not in RECIPES:
            choices = ", ".join(f"{RECIPE_PREFIX}{recipe}" for recipe in RECIPES)
            raise UserError(f"--config {text}: no such recipe{did_you_mean(name, RECIPES)}. Choose one of {choices}.")
        return str(shipped_config("run_configs", f"recipes/{name}.yaml"))
    config = shipped_config(folder, text + suffix)
    return str(config) if "/" not in text and not Path(text).exists() and config.is_file() else text


def parse_args(verb: str, argv: Sequence[str], prog: str = "") -> argparse.Namespace:
    """Parse a verb's command line.

    Flags may be written with underscores. For a verb that takes a config, the other words are `key=value` texts: they
    may be anywhere between the flags, and are returned in order as `.overrides`. Raises UserError for an unknown flag
    or an unexpected word.
    """
    spec = VERBS[verb]
    parser = _Parser(
        prog=prog or f"cogds {verb}",
        description=spec.summary,
        epilog=f"keys of the run config:\n\n{help_text()}" if spec.takes_config else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if spec.takes_config:
        parser.usage = "%(prog)s [--config RUN.yaml] [flags] [key.sub=value ...]"
        parser.add_argument(
            "--config",
            action="append",
            metavar="RUN.yaml",
            help="run config: a file, the name of one that comes with cogds, or recipe:style, recipe:character or "
            "recipe:motion; repeatable, later files override earlier ones, and key=value words override all",
        )
        parser.add_argument(
            "--deepspeed",
            metavar="DS.json",
            help="DeepSpeed config: a file, or the name of one that comes with cogds (zero2)",
        )
    # DeepSpeed's launcher adds this flag. cogds reads the rank from the environment, which every launcher sets.
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)
    spec.add_arguments(parser)
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quiet", action="store_true", help="print only warnings, errors and results")
    level.add_argument("--verbose", action="store_true", help="also print debug messages")
    args, words = parser.parse_known_args([_with_dashes(word) for word in unpack(argv)])
    del args.local_rank
    flags = [flag for flag in parser._option_string_actions if flag != "--local-rank"]
    for word in words:
        if word.startswith("-") and (not spec.takes_config or "=" not in word or word.startswith("--")):
            raise UserError(
                f"command line: unknown flag {word.partition('=')[0]}{_nearest_flag(word, flags)}. "
                f"See `{parser.prog} --help`."
            )
        if not spec.takes_config:
            raise UserError(f"command line: unexpected argument '{word}'. See `{parser.prog} --help`.")
        if "=" not in word and word.endswith((".yaml", ".yml", ".json")):
            flag = "--deepspeed" if word.endswith(".json") else "--config"
            raise UserError(f"command line: '{word}' is not KEY=VALUE. Pass the file as {flag} {word}.")
    if spec.takes_config:
        args.overrides = words
    args.verb = verb
    return args


def _with_dashes(word: str) -> str:
    """Return `--num-gpus=8` for `--num_gpus=8`. Words that are not flags are not changed."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _nearest_flag(word: str, flags: Sequence[str]) -> str:
    """Return ` (did you mean '--config'?)`, or "" if no flag is similar."""
    name = word.partition("=")[0]
    if len(name) == 2 and (matches := [flag for flag in flags if flag.startswith(f"-{name}")]):
        return f" (did you mean '{matches[0]}'?)"
    return did_you_mean(name, flags)


def pack(words: Sequence[str]) -> str:
    """Return the words as one `--packed=TEXT`, which remote shells do not split or expand.

    TEXT is the URL-safe base64 encoding of the words, each followed by a zero byte. launch/hostfile.sh does the same.
    """
    return "--packed=" + base64.urlsafe_b64encode(b"".join(os.fsencode(word) + b"\0" for word in words)).decode()


def unpack(argv: Sequence[str]) -> list[str]:
    """Replace each `--packed=TEXT` of a command line by the words in it. Raises UserError if a TEXT is damaged."""
    words: list[str] = []
    for word in argv:
        flag, _, text = word.partition("=")
        if flag != "--packed":
            words.append(word)
            continue
        try:
            packed = base64.b64decode(text.encode(), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            packed = b"?"
        if packed and not packed.endswith(b"\0"):
            raise UserError(
                f"command line: --packed={text[:60]} is damaged. Start the run again with launch/hostfile.sh or "
                "`cogds --hostfile`, which write this flag."
            )
        words += [os.fsdecode(part) for part in packed.split(b"\0")[:-1]]
    return words


def _positive_int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _new_file(text: str) -> Path:
    """Parse the path of a file to write. Its folder must exist."""
    file = Path(text)
    if not file.parent.is_dir():
        raise UserError(f"command line: no such directory: {file.parent}. Create it, or choose another file.")
    return file


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return number


def _positive_float(text: str) -> float:
    if (number := _finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{number:g} is not above 0")
    return number


def _scores(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip() and name.strip() != "none")
    for name in names:
        if name not in SCORES:
            raise argparse.ArgumentTypeError(
                f"unknown score '{name}'{did_you_mean(name, SCORES)}; choose from {', '.join(SCORES)}, or none"
            )
    return tuple(name for name in SCORES if name in names)


def _launcher_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("launching (only if no launcher started this command)")
    group.add_argument(
        "--num-gpus", metavar="N", type=_positive_int, help="ranks to start on each machine, one per GPU (all GPUs)"
    )
    group.add_argument("--hostfile", metavar="FILE", help="hosts to start on, in the format of `deepspeed --hostfile`")
    group.add_argument(
        "--master-port", metavar="PORT", type=_positive_int, help="port that the ranks connect to (a free port)"
    )


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="prepare data, model and engine, train the largest bucket once, and stop without saving anything",
    )
    _launcher_arguments(parser)


def _encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stats", action="store_true", help="print what the cache holds and exit")
    parser.add_argument("--json", action="store_true", help="with --stats: print it as JSON")
    parser.add_argument("--verify", action="store_true", help="read the whole cache, remove damaged entries and exit")
    parser.add_argument("--retry", action="store_true", help="retry files that failed before")
    parser.add_argument(
        "--prune", action="store_true", help="show the entries that this run's dataset does not use, and remove them"
    )
    parser.add_argument("--yes", action="store_true", help="with --prune: remove them without a question")
    _launcher_arguments(parser)


def _prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--output",
        metavar="CLIPS.parquet",
        default="clips.parquet",
        help="table of clips to write, for data.path (clips.parquet)",
    )
    add("--no-cuts", action="store_true", help="take each video as one scene")
    add(
        "--threshold",
        metavar="X",
        type=_positive_float,
        default=3.0,
        help="change of a frame relative to its neighbors that is a cut; lower finds more (3)",
    )
    add("--min-scene", metavar="S", type=_positive_float, default=1.0, help="shorter scenes are left out [s] (1)")
    add(
        "--max-scene",
        metavar="S",
        type=_positive_float,
        help="longer scenes are split evenly [s] (no limit)",
    )
    add(
        "--scores",
        metavar="SCORE[,SCORE...]",
        type=_scores,
        default=SCORES,
        help=f"scores to compute: {', '.join(SCORES)}; or none (all)",
    )
    add(
        "--file-timeout",
        metavar="S",
        type=_positive_float,
        default=14_400.0,
        help="time limit for one file; a slower file is unusable [s] (14400)",
    )
    group = parser.add_argument_group("captions (the API key is read from OPENAI_API_KEY)")
    add = group.add_argument
    add("--caption-url", metavar="URL", help="base URL of an OpenAI-compatible endpoint: http://localhost:8000/v1")
    add("--caption-model", metavar="NAME", help="vision-language model of the endpoint")
    add("--caption-prompt", metavar="TEXT", help="instruction for the model (asks for one detailed paragraph)")
    add("--caption-frames", metavar="N", type=_positive_int, default=8, help="frames sent per scene (8)")
    add("--caption-requests", metavar="N", type=_positive_int, default=4, help="simultaneous requests per rank (4)")
    add("--caption-timeout", metavar="S", type=_positive_float, default=120.0, help="time limit of a request [s] (120)")
    _launcher_arguments(parser)


def _init(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("clips", metavar="CLIPS", help="folder, list or table of clips")
    add("--learn", choices=RECIPES, help="what to learn (asks)")
    add("--use", choices=USES, help="where the LoRA will be used (asks)")
    add(
        "--memory", metavar="GB", help="memory of one GPU [GB], or its name, such as h100 (this machine's GPU, or asks)"
    )
    add("--trigger", metavar="WORD", help="word to put before every caption, which calls what was learned")
    add("--model", help="base model: hub id or diffusers folder (zai-org/CogVideoX1.5-5B-I2V)")
    add("--output", metavar="RUN.yaml", default="run.yaml", help="config to write (run.yaml)")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-gpus", metavar="N", type=_positive_int, default=1, help="GPUs of the run (1)")
    parser.add_argument("--gpu", choices=GPUS, help="estimate the time on this GPU, which also sets its memory")
    parser.add_argument(
        "--gpu-memory", metavar="GB", type=_positive_float, help="memory of one GPU [GB] (80, or that of --gpu)"
    )
    parser.add_argument(
        "--html", metavar="REPORT.html", type=_new_file, help="also write the report as a page with plots and images"
    )


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", metavar="LORA", help="LoRA file or folder (none: the base model)")
    parser.add_argument(
        "--lora-alpha", metavar="ALPHA", type=_positive_float, help="alpha of a LoRA file that does not record it"
    )
    parser.add_argument("--all", action="store_true", help="evaluate all clips, not only eval.num_clips")
    parser.add_argument("--json", action="store_true", help="print the losses by model and tag as one line of JSON")
    _launcher_arguments(parser)


def _sample(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="base model: hub id or diffusers folder")
    add(
        "--lora",
        action="append",
        nargs="+",
        metavar=("LORA", "WEIGHT"),
        help="LoRA file or folder and its weight (1); repeatable",
    )
    add("--lora-alpha", metavar="ALPHA", type=_positive_float, help="alpha of LoRA files that do not record it")
    add(
        "--lora-scale",
        type=_finite,
        nargs="+",
        default=[1.0],
        help="strength of the LoRAs (1, as trained); one video for each, and a grid",
    )
    add(
        "--image",
        action="append",
        help="image of the first frame, or a video that begins with it, resized and cropped to the size; repeatable; "
        "none for text-to-video models",
    )
    add("--last-image", metavar="FILE", help="image of the last frame, fitted as the first; for all prompts")
    add("--video", metavar="FILE", help="video that the new one continues, or leads up to; without --image")
    add(
        "--video-at",
        choices=("start", "end"),
        default="start",
        help="start: begin with the last frames of --video; end: end with its first frames (start)",
    )
    add(
        "--context",
        metavar="LENGTH",
        help="how much of a video is continued: latent frames (3) or seconds (1.5s) (as the LoRA was trained, or 2)",
    )
    add(
        "--keyframe",
        action="append",
        nargs=2,
        metavar=("SECONDS", "FILE"),
        help="image of the frame at a time; repeatable",
    )
    add("--control", metavar="FILE", help="control video, for a LoRA that was trained with them; for all prompts")
    add("--loop", action="store_true", help="end at the first frame, and write all but that, to repeat seamlessly")
    add(
        "--segments",
        metavar="N",
        type=_positive_int,
        default=1,
        help="clips in one long video; each continues the one before (1)",
    )
    add("--prompt", action="append", help="prompt; repeatable, with one image for each or one for all")
    add(
        "--list",
        metavar="FILE",
        help="prompts: a .csv or .jsonl file with prompt, image, size, seed, last_image, video; or a text file, one "
        "prompt per line",
    )
    add(
        "--output",
        help="mp4 file to write, or the folder for several videos; none may exist (sample.mp4, sample-2.mp4, ...)",
    )
    add(
        "--size",
        metavar="FxHxW",
        help="frames, height and width [px] (the LoRA's bucket that crops the image least; without an image, the "
        "largest)",
    )
    add("--fps", type=_positive_float, help="frame rate [frames/s] (as the LoRA was trained)")
    add("--steps", type=_positive_int, default=50, help="denoising steps (50)")
    add("--guidance", type=_finite, default=6.0, help="classifier-free guidance scale; 1 turns it off (6)")
    add("--seed", type=int, nargs="+", default=[0], help="seeds of the noise; one video for each (0)")
    add("--precision", choices=PRECISIONS, help="precision of the weights (bf16 on a GPU, fp32 on a CPU)")
    add(
        "--offload",
        nargs="?",
        const="model",
        choices=("model", "sequential"),
        help="keep only the active model (model, slower) or layer (sequential, much slower) on the GPU",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "lora",
        nargs="+",
        metavar="LORA",
        help="LoRA file or folder and its weight (1); several are merged; with --to lora: a fine-tuned model",
    )
    add("--to", required=True, choices=(*EXPORT_FORMATS, EXTRACTED), help="output format")
    add("--output", required=True, metavar="FOLDER", help="folder to create; its name becomes the name of the LoRA")
    add("--model", help="base model: hub id or diffusers folder (as the LoRA was trained)")
    add("--lora-alpha", metavar="ALPHA", type=_positive_float, help="alpha of LoRA files that do not record it")
    add("--rank", metavar="R", type=_positive_int, help="with --to lora: rank of the LoRA (64)")
    add("--scale", type=_finite, default=1.0, help="strength (1, as trained)")
    add("--dtype", choices=EXPORT_DTYPES, help="precision of the file (as the LoRA's, or the model's if merged)")
    add(
        "--pipeline",
        choices=("link", "copy"),
        help="with --to merged: write a whole pipeline folder that links or copies the other parts of the model",
    )
    add("--sample", metavar="MP4", help="video for the model card (a video from the run)")
    add("--push-to", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub as a private repository")
    add("--public", action="store_true", help="make the uploaded repository public")


def _gallery(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="output_dir of a run")
    add("--output", metavar="PAGE.html", type=_new_file, help="page to write (RUN/gallery.html)")
    add("--embed", action="store_true", help="put the videos into the page, which can then be moved and sent")


def _probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clips", metavar="N", type=_positive_int, default=16, help="clips to measure (16)")
    parser.add_argument("--timesteps", metavar="N", type=_positive_int, default=3, help="timesteps per clip (3)")


def _preflight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip",
        metavar="CHECK[,CHECK...]",
        default="",
        help=f"checks to skip: {', '.join(PREFLIGHT_CHECKS)}",
    )
    parser.add_argument(
        "--wait", metavar="S", type=_positive_float, default=60.0, help="time to wait for other ranks [s] (60)"
    )
    _launcher_arguments(parser)


VERBS = {
    "init": Verb(
        "Write a run config for a folder of clips, after three questions.", _init, "cogds.init", takes_config=False
    ),
    "prepare": Verb(
        "Cut videos into scenes, score and caption them, and write a table of clips.",
        _prepare,
        "cogds.prepare.main",
        is_launchable=True,
    ),
    "train": Verb(
        "Train a LoRA or the weights of CogVideoX with DeepSpeed.", _train, "cogds.train.main", is_launchable=True
    ),
    "encode": Verb(
        "Encode clips and captions into data.cache_dir before training, or maintain that cache.",
        _encode,
        "cogds.encode.main",
        is_launchable=True,
    ),
    "report": Verb(
        "Report what a run will train and the memory and time it needs. Needs no GPU.",
        _report,
        "cogds.report.main",
    ),
    "evaluate": Verb(
        "Compare the evaluation loss of the base model with and without a LoRA.",
        _evaluate,
        "cogds.evaluate",
        is_launchable=True,
    ),
    "sample": Verb("Generate videos from prompts and first frames.", _sample, "cogds.sample", takes_config=False),
    "gallery": Verb(
        "Write a page with the videos of a run, steps beside prompts, and its loss curve.",
        _gallery,
        "cogds.gallery",
        takes_config=False,
    ),
    "export": Verb("Convert a LoRA for other tools, or merge it.", _export, "cogds.export", takes_config=False),
    "probe": Verb(
        "Measure which scale of image latents a base model expects, on the run's own clips.",
        _probe,
        "cogds.probe",
    ),
    "preflight": Verb(
        "Check on all ranks, in about a minute, that a run can start.",
        _preflight,
        "cogds.preflight.main",
        is_launchable=True,
    ),
    "demo": Verb(
        "Teach a tiny model a new motion and show the videos: a complete run on any machine.",
        _train,
        "cogds.demo",
        is_launchable=True,
    ),
}
