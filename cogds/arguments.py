"""The arguments of every verb. This module and the config schema are all that `--help` imports: no torch.

args = parse_args("train", ["--config", "run.yaml", "train.num_steps=100"])
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
from cogds.errors import UserError, did_you_mean

# Formats of `export`: merged ones hold full weights.
MERGED_FORMATS = ("merged", "comfyui-merged")
EXPORT_FORMATS = ("diffusers", "comfyui", "comfyui-wrapper", *MERGED_FORMATS)
EXPORT_DTYPES = ("bf16", "fp16", "fp32")
PRECISIONS = ("bf16", "fp32")
# The checks of `preflight` that can be skipped, in the order of its table.
PREFLIGHT_CHECKS = ("versions", "tools", "sources", "disk", "gpu", "network", "folders", "exchange", "step")

PACKAGE = Path(cogds.__file__).parent


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}. See `{self.prog} --help`.")


@dataclass(frozen=True)
class Verb:
    """A command. takes_config: reads a run config, `--config` and `key=value` words. is_launchable: runs on several
    ranks. module: the module that holds its `main(args)`."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    takes_config: bool = True
    is_launchable: bool = False


def shipped(folder: str, name: str) -> Path:
    """A config that comes with cogds, in the installed package or in the checkout.

    folder: "ds_configs" or "run_configs".
    """
    installed = PACKAGE / folder / name
    checkout = PACKAGE.parent / {"ds_configs": "ds_configs", "run_configs": "launch/configs"}[folder] / name
    return installed if installed.is_file() else checkout


def find_config(text: str, folder: str, suffix: str) -> str:
    """The path that `--config` or `--deepspeed` names: a file, or the bare name of a config that comes with cogds."""
    named = shipped(folder, text + suffix)
    return str(named) if "/" not in text and not Path(text).exists() and named.is_file() else text


def parse_args(verb: str, argv: Sequence[str], prog: str = "") -> argparse.Namespace:
    """Parse a verb's command line.

    Flags may be written with underscores. For a verb that takes a config, the words that are not flags become
    `.overrides`, the `key=value` texts in their order, and may stand anywhere. Raises UserError for an unknown flag and
    for a word that is not accepted.
    """
    about = VERBS[verb]
    parser = _Parser(
        prog=prog or f"cogds {verb}",
        description=about.summary,
        epilog=f"keys of the run config:\n\n{help_text()}" if about.takes_config else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if about.takes_config:
        parser.usage = "%(prog)s [--config RUN.yaml] [flags] [key.sub=value ...]"
        parser.add_argument(
            "--config",
            metavar="RUN.yaml",
            help="run config (file or shipped name); key=value words win over it",
        )
        parser.add_argument("--deepspeed", metavar="DS.json", help="DeepSpeed config (file or shipped name)")
    # DeepSpeed's launcher adds it. Ranks are read from the environment, which every launcher sets.
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)
    about.add_arguments(parser)
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quiet", action="store_true", help="print warnings, errors and the result only")
    level.add_argument("--verbose", action="store_true", help="also print debug messages")
    args, words = parser.parse_known_args([_with_dashes(word) for word in unpacked(argv)])
    del args.local_rank
    flags = [flag for flag in parser._option_string_actions if flag != "--local-rank"]
    for word in words:
        if word.startswith("-") and (not about.takes_config or "=" not in word or word.startswith("--")):
            raise UserError(
                f"command line: unknown flag {word.partition('=')[0]}{_nearest_flag(word, flags)}. "
                f"See `{parser.prog} --help`."
            )
        if not about.takes_config:
            raise UserError(f"command line: unexpected argument '{word}'. See `{parser.prog} --help`.")
        if "=" not in word and word.endswith((".yaml", ".yml", ".json")):
            flag = "--deepspeed" if word.endswith(".json") else "--config"
            raise UserError(f"command line: '{word}' is not KEY=VALUE. Pass the file as {flag} {word}.")
    if about.takes_config:
        args.overrides = words
    args.verb = verb
    return args


def _with_dashes(word: str) -> str:
    """`--num_gpus=8` -> `--num-gpus=8`; other words stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _nearest_flag(word: str, flags: Sequence[str]) -> str:
    """` (did you mean --config?)`, or "" if no flag is near."""
    name = word.partition("=")[0]
    if len(name) == 2 and (same := [flag for flag in flags if flag.startswith(f"-{name}")]):
        return f" (did you mean '{same[0]}'?)"
    return did_you_mean(name, flags)


def unpacked(argv: Sequence[str]) -> list[str]:
    """The words of a command line with each `--packed=TEXT` replaced by the words in it.

    launch/hostfile.sh packs them, because remote shells split and expand words. TEXT is the URL-safe base64 of the
    words, each ended by a zero byte. Raises UserError if it is not.
    """
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
                f"command line: --packed={text[:60]} is damaged. Only launch/hostfile.sh writes this flag: start the "
                "run again."
            )
        words += [os.fsdecode(part) for part in packed.split(b"\0")[:-1]]
    return words


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _new_file(text: str) -> Path:
    """A file in a folder that exists."""
    file = Path(text)
    if not file.parent.is_dir():
        raise UserError(f"command line: no such directory: {file.parent}. Create it, or choose another file.")
    return file


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{number:g} is not above 0")
    return number


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def _launcher_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("launching, if no launcher started this command")
    group.add_argument("--num-gpus", metavar="N", type=_count, help="ranks to start on this machine (all GPUs)")
    group.add_argument("--hostfile", metavar="FILE", help="hosts to start on, as `deepspeed --hostfile` takes them")
    group.add_argument("--master-port", metavar="PORT", type=_count, help="port the ranks meet at (a free one)")


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="prepare data, model and engine and try the largest bucket; train and save nothing",
    )
    _launcher_arguments(parser)


def _encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stats", action="store_true", help="print what the cache holds and exit")
    parser.add_argument("--verify", action="store_true", help="read the whole cache, remove damaged entries and exit")
    parser.add_argument("--retry", action="store_true", help="read files again that failed before")
    parser.add_argument("--prune", action="store_true", help="remove all entries that this run's dataset does not use")
    _launcher_arguments(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-gpus", metavar="N", type=_count, default=1, help="GPUs of the run (1)")
    parser.add_argument("--gpu-memory", metavar="GB", type=_positive, default=80.0, help="memory of one GPU [GB] (80)")
    parser.add_argument(
        "--html", metavar="REPORT.html", type=_new_file, help="also write the report as a page with plots and pictures"
    )


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", metavar="LORA", help="LoRA file or folder; without it, the base model is evaluated")
    parser.add_argument("--lora-alpha", metavar="ALPHA", type=_positive, help="alpha of a LoRA file that has none")
    parser.add_argument("--all", action="store_true", help="evaluate every clip, not only eval.num_clips")
    _launcher_arguments(parser)


def _sample(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="base model: hub id or diffusers folder")
    add(
        "--lora",
        action="append",
        nargs="+",
        metavar=("LORA", "WEIGHT"),
        help="LoRA file or folder, and its weight (1); may be repeated",
    )
    add("--lora-alpha", metavar="ALPHA", type=_positive, help="alpha of LoRA files that have none")
    add(
        "--lora-scale",
        type=_finite,
        nargs="+",
        default=[1.0],
        help="strength of the LoRAs (1, as trained); several make one video each and a grid",
    )
    add("--image", action="append", help="first frame, resized to cover the size and cropped; may be repeated")
    add("--prompt", action="append", help="prompt; may be repeated, with as many images or one for all")
    add(
        "--list",
        metavar="FILE",
        help=".csv or .jsonl file with prompt, image, size and seed, or a text file with one prompt per line",
    )
    add("--output", default="sample.mp4", help="mp4 to write; for several videos, the folder (sample.mp4)")
    add("--size", metavar="FxHxW", help="frames, height and width [pixels] (the LoRA's bucket that fits the image)")
    add("--fps", type=_positive, help="frame rate [frames/s] (the LoRA's)")
    add("--steps", type=_count, default=50, help="denoising steps (50)")
    add("--guidance", type=_finite, default=6.0, help="classifier-free guidance; 1 turns it off (6)")
    add("--seed", type=int, nargs="+", default=[0], help="seeds of the noise; several make one video each (0)")
    add("--precision", choices=PRECISIONS, help="precision of the weights (bf16 on a GPU, fp32 on a CPU)")
    add(
        "--offload",
        nargs="?",
        const="model",
        choices=("model", "sequential"),
        help="keep only the running part (model, slower) or layer (sequential, much slower) on the GPU",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("lora", nargs="+", metavar="LORA", help="LoRA file or folder, and its weight (1); several to merge them")
    add("--to", required=True, choices=EXPORT_FORMATS, help="format")
    add("--output", required=True, metavar="FOLDER", help="new folder; its name becomes the LoRA's")
    add("--model", help="base model: hub id or diffusers folder (the model that the LoRA was trained on)")
    add("--lora-alpha", metavar="ALPHA", type=_positive, help="alpha of LoRA files that have none")
    add("--scale", type=_finite, default=1.0, help="strength (1, as trained)")
    add("--dtype", choices=EXPORT_DTYPES, help="number format (the LoRA's; if merged, the model's)")
    add(
        "--pipeline",
        choices=("link", "copy"),
        help="with --to merged: write a whole pipeline folder that links or copies the model's other parts",
    )
    add("--sample", metavar="MP4", help="video for the model card (one that the run made)")
    add("--push-to", metavar="OWNER/NAME", help="upload the folder to the hub as a private repository")
    add("--public", action="store_true", help="make the uploaded repository public")


def _probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clips", metavar="N", type=_count, default=16, help="clips to measure (16)")
    parser.add_argument("--timesteps", metavar="N", type=_count, default=3, help="timesteps per clip (3)")


def _preflight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip",
        metavar="CHECK[,CHECK...]",
        default="",
        help=f"checks to leave out, of {', '.join(PREFLIGHT_CHECKS)}",
    )
    parser.add_argument(
        "--wait", metavar="S", type=_positive, default=60.0, help="how long to wait for other ranks [s] (60)"
    )
    _launcher_arguments(parser)


VERBS = {
    "train": Verb("Train a LoRA of CogVideoX with DeepSpeed.", _train, "cogds.train.main", is_launchable=True),
    "encode": Verb(
        "Encode a dataset's clips and captions into data.cache_dir before training, or maintain that cache.",
        _encode,
        "cogds.encode.main",
        is_launchable=True,
    ),
    "report": Verb(
        "Report what a run will train and what it needs. Loads no weights and needs no GPU.",
        _report,
        "cogds.report.main",
    ),
    "evaluate": Verb(
        "Print the evaluation losses of a model, with or without a LoRA, as one line of JSON.",
        _evaluate,
        "cogds.evaluate",
        is_launchable=True,
    ),
    "sample": Verb("Make videos from images and prompts.", _sample, "cogds.sample", takes_config=False),
    "export": Verb("Convert a LoRA for other tools, or merge it.", _export, "cogds.export", takes_config=False),
    "probe": Verb(
        "Measure which scale of the image latents a base model expects, on the run's own clips.",
        _probe,
        "cogds.probe",
    ),
    "preflight": Verb(
        "Check on all ranks, in about a minute, whether a run can start.",
        _preflight,
        "cogds.preflight.main",
        is_launchable=True,
    ),
    "demo": Verb(
        "Train a tiny model on clips that cogds draws, to see a whole run on any machine.",
        _train,
        "cogds.train.main",
        is_launchable=True,
    ),
}
