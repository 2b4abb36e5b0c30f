"""The command line that all entry points share, and how they end.

deepspeed launch/train.py --deepspeed ds_configs/zero2.json [--config run.yaml] [key.sub=value ...]
"""

import argparse
import base64
import binascii
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cogds.config import help_text
from cogds.errors import (
    EXIT_BUG,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    BugReported,
    Interrupted,
    UserError,
    did_you_mean,
)
from cogds.runtime.chatter import leave_out
from cogds.runtime.world import connected, contact_sentence, lost_contact, read_world

leave_out()  # an entry point imports this before what loads diffusers and DeepSpeed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} on the command line: --help shows what is accepted")


def unpacked(argv: Sequence[str]) -> list[str]:
    """The words of a command line, `--packed=TEXT` replaced by the words in it.

    launch/hostfile.sh packs them, because remote shells split and run what is in a word: TEXT is the base64 (the
    variant for URLs) of the words, each ended by a zero byte. Raises UserError where it is not.
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
                f"--packed={text[:60]} on the command line is damaged: launch/hostfile.sh makes it, nobody else has to"
            )
        words += [os.fsdecode(one) for one in packed.split(b"\0")[:-1]]
    return words


def parse_args(
    argv: Sequence[str], doc: str, add_arguments: Callable[[argparse.ArgumentParser], Any] | None = None
) -> argparse.Namespace:
    """`.deepspeed` and `.config` (paths or None) and `.overrides` (the `key.sub=value` texts, in order).

    doc: the entry point's own sentence for --help. add_arguments: adds its own --flags.
    """
    parser = _Parser(
        usage="%(prog)s [--deepspeed DS.json] [--config RUN.yaml] [key.sub=value ...]",
        description=doc,
        epilog=f"keys of the run config:\n\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--deepspeed", metavar="DS.json", help="the DeepSpeed config")
    parser.add_argument("--config", metavar="RUN.yaml", help="the run config; overrides win over it")
    # The deepspeed launcher adds it. The rank comes from the environment, which every launcher sets.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    if add_arguments:
        add_arguments(parser)
    # Overrides are what is left over, so that they may stand before, between and after the flags.
    args, overrides = parser.parse_known_args(unpacked(argv))
    for text in overrides:
        if text.startswith("-"):
            flag = text.split("=")[0]
            near = did_you_mean(flag, parser._option_string_actions)
            raise UserError(f"unknown flag {flag} on the command line{near}: --help lists flags and keys")
    del args.local_rank
    args.overrides = overrides
    return args


def make_folders(folders: Mapping[str, str]) -> None:
    """Make the folders that a command writes into, key of the config -> folder. Raises UserError where one cannot be
    made or written."""
    for key, folder in folders.items():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{key}: cannot write into {folder} ({reason}): choose another folder") from None


def run(main: Callable[[], None]) -> int:
    """The exit code after main(), see `cogds.errors`. What the user can mend is one line; a bug keeps its traceback."""
    try:
        return _run(main)
    finally:
        _flush()


def _run(main: Callable[[], None]) -> int:
    try:
        main()
    except UserError as error:
        if (place := _place(error)) is not None:
            print(f"error{place}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BugReported:
        return EXIT_BUG
    except Interrupted:
        return EXIT_INTERRUPTED
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        print(contact_sentence(read_world(), error), file=sys.stderr)
        return EXIT_HUNG
    return 0


def _flush() -> None:
    """Python's own flush at the end makes the exit code 120 where nobody reads any more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _place(error: UserError) -> str | None:
    """What an error says of where it happened; None where another process says the same.

    Before the ranks are connected, all ranks of a node read the same input and fail alike: the first of them speaks.
    Later, what is not shared is this rank's own trouble.
    """
    try:
        world = read_world()
    except UserError:  # then this is the error that is about to be told
        return ""
    if error.shared or (world.local_rank and not connected()):
        return None
    return f" on rank {world.rank} ({socket.gethostname()})" if world.rank else ""
