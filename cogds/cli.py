"""The command line: `cogds VERB ...`, and launch/VERB.py for launchers.

Arguments are parsed before torch is imported, so that `--help` and every argument error answer at once. All exit codes
are defined in `cogds.errors`.
"""

import argparse
import gc
import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence

import cogds
from cogds.arguments import VERBS, find_config, parse_args, shipped
from cogds.distributed.world import is_launched, read_world
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
from cogds.process.environment import declare_cpu
from cogds.process.log_filters import install_log_filters
from cogds.process.logs import RESULT, configure_logging

DEFAULT_DEEPSPEED = "zero2.json"
DEMO_CONFIG = "demo.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cogds VERB ...` and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"cogds {cogds.__version__}")
        return 0
    return run(lambda: call(words[0], words[1:]))


def usage() -> str:
    """The verbs, one per line."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:{width}}{verb.summary}" for name, verb in VERBS.items())
    return f"usage: cogds VERB ...\n\n{verbs}\n\n`cogds VERB --help` shows the flags of a verb. `cogds --version`"


def launch(verb: str) -> int:
    """Run a verb as launch/VERB.py does, as one rank of those that a launcher started. Returns the exit code."""
    return run(lambda: call(verb, sys.argv[1:], prog=f"launch/{verb}.py", starts_ranks=False))


def call(verb: str, argv: Sequence[str], prog: str = "", starts_ranks: bool = True) -> None:
    """Parse a verb's arguments and run it. prog: the command's name in `--help`.

    starts_ranks: replace this process by DeepSpeed's launcher if several ranks are wanted and no launcher has started
    it. Raises UserError for an unknown verb or argument.
    """
    if verb not in VERBS:
        raise UserError(
            f"command line: unknown verb '{verb}'{did_you_mean(verb, VERBS)}. Choose one of {', '.join(VERBS)}."
        )
    args = parse_args(verb, argv, prog)
    about = VERBS[verb]
    if about.takes_config:
        args.is_demo = args.config is None  # the demo's config, which makes its own model and clips
        named = args.config and find_config(args.config, "run_configs", ".yaml")
        args.config = named or str(shipped("run_configs", DEMO_CONFIG))
        named = args.deepspeed and find_config(args.deepspeed, "ds_configs", ".json")
        args.deepspeed = named or str(shipped("ds_configs", DEFAULT_DEEPSPEED))
    install_log_filters()  # before diffusers and DeepSpeed are imported: some messages come then
    if starts_ranks and about.is_launchable and (launcher := launcher_command(args, argv)):
        sys.stdout.flush()
        os.execv(launcher[0], launcher)
    configure_logging(read_world().rank, RESULT if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    with gc_at_rest():
        module = importlib.import_module(about.module)
    module.main(args)


class gc_at_rest:
    """No garbage is collected inside, and the objects made inside never are.

    Importing torch, diffusers and DeepSpeed makes a million objects that live as long as the process. Searching them
    for garbage took 3 of the 11 seconds that the imports needed (docs/performance.md).
    """

    def __enter__(self) -> None:
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()
        gc.freeze()


def launcher_command(args: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """The command that starts the ranks through DeepSpeed's launcher; [] if this process is to run the verb itself.

    Without --num-gpus and --hostfile, every GPU of this machine is used. A CPU machine gets one rank.
    """
    if is_launched():
        if args.num_gpus or args.hostfile:
            raise UserError(
                "command line: --num-gpus and --hostfile start ranks, but a launcher has started this process already. "
                "Pass them to `cogds` or to that launcher, not to both."
            )
        return []
    num_gpus = _num_gpus()
    num_ranks = args.num_gpus or num_gpus or 1
    if num_ranks == 1 and not args.hostfile:
        return []
    if not num_gpus and not args.hostfile:
        declare_cpu()
    where = ["--hostfile", args.hostfile] if args.hostfile else []
    if args.num_gpus or not args.hostfile:
        where += ["--num_gpus", str(num_ranks)]
    port = args.master_port or (29500 if args.hostfile else _free_port())
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(port)]
    launcher += ["--log_level", "info" if args.verbose else "error"]
    return [*launcher, "--no_local_rank", "--module", "cogds", args.verb, *_without_launcher_flags(argv)]


def _num_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _without_launcher_flags(argv: Sequence[str]) -> list[str]:
    """The words that the ranks get."""
    words, skips = [], False
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if skips or name in ("--num-gpus", "--hostfile", "--master-port"):
            skips = not skips and "=" not in word
        else:
            words.append(word)
    return words


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(function: Callable[[], None]) -> int:
    """The exit code after `function()`. An error that the user can fix is one line; a bug keeps its traceback."""
    try:
        return _run(function)
    finally:
        _flush()


def _run(function: Callable[[], None]) -> int:
    try:
        function()
    except UserError as error:
        if (place := _place(error)) is not None:
            print(f"error{place}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BugReported:
        return EXIT_BUG
    except Interrupted:
        return EXIT_INTERRUPTED
    except RuntimeError as error:
        from cogds.distributed.process_group import is_lost_connection, lost_connection_message  # imports torch

        if not is_lost_connection(error):
            raise
        print(lost_connection_message(read_world(), error), file=sys.stderr)
        return EXIT_HUNG
    return 0


def _flush() -> None:
    """Flush stdout; if its reader is gone, Python's own flush at exit would make the exit code 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _place(error: UserError) -> str | None:
    """Which rank an error names; None if another process reports the same error.

    Before the ranks are is_connected, all ranks of a node read the same input and fail alike: the first one reports.
    Later, an error that is not shared is this rank's own.
    """
    try:
        world = read_world()
    except UserError:  # this is the error that is about to be reported
        return ""
    if error.shared or (world.local_rank and not _is_connected()):
        return None
    return f" on rank {world.rank} ({socket.gethostname()})" if world.rank else ""


def _is_connected() -> bool:
    """Whether this process has joined the process group, without importing torch for the question."""
    group = sys.modules.get("cogds.distributed.process_group")
    return group is not None and group.is_connected()
