"""The command line: `cogds VERB ...`, and launch/VERB.py for launchers.

Arguments and configs are checked before torch is imported, so `--help` and errors answer at once. The exit codes are in
`cogds.errors`.
"""

import argparse
import contextlib
import gc
import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import cogds
from cogds.arguments import VERBS, find_config, pack, parse_args, shipped_config
from cogds.config.deepspeed import load_ds_config
from cogds.config.inputs import data_paths, prompt_files
from cogds.config.loading import load_config
from cogds.config.schema import RunConfig
from cogds.data.storage.location import absolute, is_local_file
from cogds.distributed.hostfile import check_nodes, in_memory, read_hostfile
from cogds.distributed.launcher import LauncherProcess
from cogds.distributed.world import is_launched, read_world, refuse_missing_tasks
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
from cogds.process.activity import activity, reporter
from cogds.process.environment import declare_cpu, set_library_defaults, use_utf8
from cogds.process.log_filters import install_log_filters
from cogds.process.logs import RESULT, configure_logging

DEFAULT_DEEPSPEED = "zero2.json"
DEMO_CONFIG = "demo"


class LauncherEnded(Exception):
    """The launcher has ended, after its ranks have done the work."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


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
    """Return the help text of `cogds` itself, with one line per verb."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:{width}}{verb.summary}" for name, verb in VERBS.items())
    return f"usage: cogds VERB ...\n\n{verbs}\n\nFlags of a verb: cogds VERB --help. Version: cogds --version."


def launch(verb: str) -> int:
    """Run a verb as one rank that a launcher has started, for launch/VERB.py. Returns the exit code."""
    return run(lambda: call(verb, sys.argv[1:], prog=f"launch/{verb}.py", starts_ranks=False))


def call(verb: str, argv: Sequence[str], prog: str = "", starts_ranks: bool = True) -> None:
    """Parse a verb's arguments and run it. Raises UserError for an unknown verb, or wrong arguments or configs.

    prog: name of the command in `--help`. starts_ranks: if several ranks are wanted and no launcher has started this
    process, run DeepSpeed's launcher instead, and raise LauncherEnded at its end.
    """
    if verb not in VERBS:
        raise UserError(
            f"command line: unknown verb '{verb}'{did_you_mean(verb, VERBS)}. Choose one of {', '.join(VERBS)}."
        )
    use_utf8()
    args = parse_args(verb, argv, prog)
    spec = VERBS[verb]
    if spec.takes_config:
        configs = choose_configs(args)
        if verb == "train" and configs == [DEMO_CONFIG]:
            spec = VERBS["demo"]  # which judges the LoRA after training
        args.config = [find_config(text, "run_configs", ".yaml") for text in configs]
        ds_config = args.deepspeed and find_config(args.deepspeed, "ds_configs", ".json")
        args.deepspeed = ds_config or str(shipped_config("ds_configs", DEFAULT_DEEPSPEED))
        # For their errors only. The verb reads both again.
        cfg, _ = load_config(args.config, args.overrides)
        load_ds_config(args.deepspeed)
        if verb != "preflight":  # which reports the nodes that lack a path
            check_inputs(config_inputs(cfg, args))
    check_inputs(flag_inputs(args))
    if spec.is_launchable and not (starts_ranks and (args.num_gpus or args.hostfile)):
        refuse_missing_tasks()
    install_log_filters()  # some libraries log while they are imported
    if starts_ranks and spec.is_launchable and (launcher := launcher_command(args, argv)):
        sys.stdout.flush()
        raise LauncherEnded(LauncherProcess(launcher).wait())
    world = read_world()
    set_library_defaults(world.local_size)
    configure_logging(world.rank, RESULT if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    if logging.getLogger("cogds").isEnabledFor(logging.INFO):
        reporter.start()
    with activity("loading libraries"), gc_disabled():
        module = importlib.import_module(spec.module)
    try:
        with activity(f"cogds {verb}"):
            module.main(args)
    finally:
        reporter.stop()


def check_inputs(paths: Iterable[tuple[str, str]]) -> None:
    """Raise UserError if a local file or folder does not exist, before anything slow. paths: with their key or flag."""
    for key, path in paths:
        if is_local_file(path) and not os.path.exists(absolute(path)):
            raise UserError(f"{key}: no such file or folder: {path}. Check the spelling, or the mount.")


def flag_inputs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the files and folders that a verb without a run config will read."""
    if args.verb == "init":
        return [("CLIPS", args.clips)]
    if args.verb == "sample":
        return [*(("--image", path) for path in args.image or []), *([("--list", str(args.list))] if args.list else [])]
    return []


def config_inputs(cfg: RunConfig, args: argparse.Namespace) -> Iterable[tuple[str, str]]:
    """Return the files and folders that a run config names and the verb will read."""
    paths = {} if _only_reads_cache(args) else data_paths(cfg)
    if cfg.data.draw_demo_clips:  # created if it does not exist
        paths.pop("data.path", None)
    if args.verb in ("train", "report", "demo"):
        paths |= prompt_files(cfg)
    return paths.items()


def choose_configs(args: argparse.Namespace) -> list[str]:
    """Return the run configs of a command line.

    The demo's config is used only if it is asked for: by the demo verb, by `cogds train` without any config and key,
    and by `cogds preflight` to check a machine. Raises UserError if neither a config nor a model is named, and if the
    demo is given a config, a model or clips.
    """
    configs, given = args.config or [], {text.partition("=")[0] for text in args.overrides}
    needs_model = args.verb != "prepare" and not _only_reads_cache(args)
    if args.verb == "demo":
        own = ["--config"] * bool(configs) + sorted(given & {"model.path", "data.path", "data.sets"})
        if own:
            raise UserError(f"{own[0]}: the demo has its own config, model and clips. Use `cogds train` for yours.")
        return [DEMO_CONFIG]
    if configs or (needs_model and "model.path" in given):
        return configs
    if needs_model and (given or args.verb not in ("train", "preflight")):
        raise UserError(
            "command line: neither --config nor model.path is given. Pass one of them. `cogds init CLIPS` writes a "
            "config, and `cogds demo` runs the demo."
        )
    return [DEMO_CONFIG]


def _only_reads_cache(args: argparse.Namespace) -> bool:
    """Whether the verb reads neither a model nor clips, only data.cache_dir."""
    return getattr(args, "stats", False) or getattr(args, "verify", False)


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """Turn off garbage collection for a block, and exclude the objects that exist at its end from later collections.

    Importing torch, diffusers and DeepSpeed makes a million objects that live as long as the process. Searching them
    for garbage took 3 of the 11 seconds that the imports needed (docs/performance.md).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def launcher_command(args: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """Return the command that starts the ranks with DeepSpeed's launcher, or [] if this process runs the verb itself.

    Without --num-gpus and --hostfile, there is one rank per GPU of this machine, or a single rank without GPUs.
    """
    if is_launched():
        if args.num_gpus or args.hostfile:
            raise UserError(
                "command line: --num-gpus and --hostfile start ranks, but a launcher has already started this process. "
                "Pass them only to that launcher."
            )
        return []
    # The ranks report their own errors, and `LauncherProcess` those that they cannot report.
    log_level = "info" if args.verbose else "error" if args.hostfile else "critical"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", log_level]
    words = _without_launcher_flags(argv)
    if args.hostfile:
        hosts = read_hostfile(args.hostfile)
        check_nodes(hosts)
        # DeepSpeed would start the ranks of a single node on this machine, whatever the node's name.
        launcher += ["--hostfile", in_memory(hosts), "--force_multi", "--no_ssh_check", "--master_addr", hosts[0].name]
        words = [pack(words)]
    else:
        num_gpus = _num_gpus()
        if (args.num_gpus or num_gpus or 1) == 1:
            return []
        if not num_gpus:
            declare_cpu()
        launcher += ["--num_gpus", str(args.num_gpus or num_gpus)]
    if args.hostfile and args.num_gpus:
        launcher += ["--num_gpus", str(args.num_gpus)]
    launcher += ["--master_port", str(args.master_port or (29500 if args.hostfile else _free_port()))]
    return [*launcher, "--no_local_rank", "--module", "cogds", args.verb, *words]


def _num_gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _without_launcher_flags(argv: Sequence[str]) -> list[str]:
    """Return the arguments for the ranks."""
    words, skip_value = [], False
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if skip_value or name in ("--num-gpus", "--hostfile", "--master-port"):
            skip_value = not skip_value and "=" not in word
        else:
            words.append(word)
    return words


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(function: Callable[[], None]) -> int:
    """Run `function` and return the exit code. A UserError is printed as one line; a bug keeps its traceback."""
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
    except LauncherEnded as end:
        return end.code
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
    """Flush stdout. If its reader is gone, discard the output: Python's flush at exit would make the exit code 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _place(error: UserError) -> str | None:
    """Return ` on rank R (HOST)`, "" for rank 0, or None if another process reports the error.

    Before the ranks are connected, all ranks of a node read the same input and fail alike, so only the first reports.
    Later, an error that is not shared is this rank's own.
    """
    try:
        world = read_world()
    except UserError:  # the very error that is being reported
        return ""
    if error.shared or (world.local_rank and not _is_connected()):
        return None
    return f" on rank {world.rank} ({socket.gethostname()})" if world.rank else ""


def _is_connected() -> bool:
    """Whether this process has joined the process group. Does not import torch."""
    group = sys.modules.get("cogds.distributed.process_group")
    return group is not None and group.is_connected()
