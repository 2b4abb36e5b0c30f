"""Environment variables of this process."""

import io
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from cogds.errors import UserError


def use_utf8(environ: MutableMapping[str, str] = os.environ) -> None:
    """Restart this process in Python's UTF-8 mode, unless it uses UTF-8 already. Child processes inherit the mode.

    In a locale such as en_US.ISO-8859-1 or zh_CN.GBK, Python would look for files under names that do not exist, read
    and write files in that encoding, and fail to print some characters.

    Raises:
        UserError: UTF-8 mode is turned off by an option of the interpreter.
    """
    if sys.getfilesystemencoding() == "utf-8":
        for stream in (sys.stdout, sys.stderr):  # file names may contain bytes that are not UTF-8
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return
    if environ.get("PYTHONUTF8") == "1":
        raise UserError(
            f"locale: Python uses {sys.getfilesystemencoding()} for file names, because an option of the interpreter "
            "turns UTF-8 mode off. Remove -X utf8=0, -E or -I, or set LC_ALL=C.UTF-8."
        )
    environ["PYTHONUTF8"] = "1"
    # The bytes of the command line. Not every encoding restores the bytes that it has decoded.
    os.execv(sys.executable, Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1])


def environment_variables(*prefixes: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables whose names start with any of the prefixes, sorted by name."""
    return {name: value for name, value in sorted(environ.items()) if name.startswith(prefixes)}


def command(program: str, module: str, python: str = sys.executable) -> str:
    """Return how to call a program of this Python environment from a shell, even if the environment is not on PATH.

    program: name of its script. module: to run with `python -m` if there is no script.
    """
    script = Path(python).parent / program
    on_path = shutil.which(program)
    if on_path and (not script.exists() or os.path.realpath(on_path) == os.path.realpath(script)):
        return program
    words = [str(script)] if script.exists() else [python, "-m", module]
    return shlex.join(os.path.relpath(word) if Path(word).is_relative_to(Path.cwd()) else word for word in words)


def extensions_folder() -> Path:
    """Return the folder in which torch builds extensions."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")


def openai_api_key() -> str:
    """Return the API key for OpenAI-compatible endpoints, or "" if none is set."""
    return os.environ.get("OPENAI_API_KEY", "")


def make_cublas_deterministic() -> None:
    """Have cuBLAS use fixed workspaces, which its determinism needs. Call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def declare_cpu() -> None:
    """Tell DeepSpeed's launcher that this machine has no GPU. Otherwise its processes warn that they found none."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def set_library_defaults(local_size: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set variables that torch reads when it is imported or at its first allocation, unless the user has set them.

    Call it before torch is imported. local_size: ranks on this machine, which share its cores.
    """
    cores = _num_cores(local_size, environ)
    # Each of several ranks would otherwise use all cores, or a single one under torchrun, which sets 1. AdamW of an
    # offloaded LoRA runs on these threads.
    default = "1" if "TORCHELASTIC_RUN_ID" in environ else None
    if local_size > 1 and environ.get("OMP_NUM_THREADS") in (None, default):
        environ["OMP_NUM_THREADS"] = str(cores)
    # Inductor's own default is up to 32 processes per rank.
    environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(cores, 32)))
    # Clips of many sizes fragment the allocator's memory. The setting fails on WSL2 (pytorch issue 192330). The newer
    # name PYTORCH_ALLOC_CONF is ignored by torch 2.9.1.
    is_set = "PYTORCH_CUDA_ALLOC_CONF" in environ or "PYTORCH_ALLOC_CONF" in environ
    if not is_set and "microsoft" not in platform.release().lower():
        environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _num_cores(local_size: int, environ: Mapping[str, str]) -> int:
    """Return the number of cores of this rank: those that SLURM gives to a task, or its share of the machine's."""
    num_cores = len(os.sched_getaffinity(0))
    per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    # With a launcher inside a task (RANK), the ranks share the task's cores.
    if "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ and per_task.isdecimal():
        return max(1, min(num_cores, int(per_task)))
    return max(1, num_cores // local_size)


def find_ninja(environ: MutableMapping[str, str] = os.environ, python: str = sys.executable) -> None:
    """Extend the PATH so that torch finds ninja, with which it builds DeepSpeed's extensions.

    pip installs ninja beside the interpreter. That folder is not on the PATH if the virtual environment is not active.
    It goes to the end, so that it hides no other program.
    """
    path, folder = environ.get("PATH", os.defpath), Path(python).parent
    if not shutil.which("ninja", path=path) and (folder / "ninja").is_file():
        environ["PATH"] = f"{path}{os.pathsep}{folder}"
