"""The command line that all entry points share, and how they end.

deepspeed launch/train.py --deepspeed ds_configs/zero2.json [--config run.yaml] [key.sub=value ...]
"""

import argparse
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cogds.config import help_text
from cogds.errors import UserError, did_you_mean
from cogds.runtime.world import connected, read_world


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} on the command line: --help shows what is accepted")


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
    args, overrides = parser.parse_known_args(list(argv))
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
    """The exit code after main(). A UserError is one line and code 2; anything else keeps its traceback."""
    try:
        main()
    except UserError as error:
        if (place := _place(error)) is not None:
            print(f"error{place}: {error}", file=sys.stderr)
        return 2
    return 0


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
