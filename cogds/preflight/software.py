"""The software of each rank: package versions, the code of cogds, video decoders, and the compiler."""

import hashlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import cogds
from cogds.config.deepspeed import compiles_extension
from cogds.distributed.world import World
from cogds.model.cudnn import cudnn_version
from cogds.preflight.findings import (
    FAIL,
    OK,
    WARN,
    Finding,
    RankResult,
    describe_differences,
    describe_ranks,
)
from cogds.process.environment import extensions_folder, find_ninja
from cogds.process.extension_locks import find_locks

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy")
IMPORT_TIMEOUT_S = 60.0
STALE_LOCK_S = 600.0


def code_digest(root: Path) -> str:
    """Return a digest of all files of a checkout that affect a run."""
    state = hashlib.blake2b(digest_size=6)
    for pattern in ("cogds/**/*.py", "launch/**/*.py", "launch/**/*.yaml", "ds_configs/*.json"):
        for path in sorted(root.glob(pattern)):
            state.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def _driver_version() -> str:
    """Return the version of the NVIDIA driver, "none" without a driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    match = re.search(r"Kernel Module\D*([\d.]+)", text)
    return match.group(1) if match else "unknown"


def inspect_versions() -> RankResult:
    """Return `versions` of this rank: name -> version."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    versions["torch"] = torch.__version__
    versions["CUDA"] = str(torch.version.cuda or "none")
    if torch.cuda.is_available():
        nccl: Any = torch.cuda.nccl.version()
        versions["NCCL"] = ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)
        versions["cuDNN"] = str(cudnn_version())
    versions["driver"] = _driver_version()
    versions["cogds code"] = code_digest(Path(cogds.__file__).parent.parent)
    return {"versions": versions}


def assess_versions(results: list[RankResult]) -> list[Finding]:
    """All ranks must have the same versions. Different drivers are only a warning."""
    findings = []
    for name in dict.fromkeys(name for result in results for name in result["versions"]):
        if differences := describe_differences(results, [result["versions"].get(name, "none") for result in results]):
            findings.append(Finding("versions", WARN if name == "driver" else FAIL, f"{name}: {differences}"))
    common = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items() if version != "none")
    return findings or [Finding("versions", OK, common)]


def find_import_error(module: str) -> str:
    """Import a module in a child process, which a broken library may crash. Returns the error, or ""."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"the import took longer than {IMPORT_TIMEOUT_S:g} s"
    last_line = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return last_line[0] if done.returncode else ""


def _find_stale_locks() -> list[str]:
    """Return the lock files of killed builds. Every later build of the same extension waits for its lock forever."""
    now = time.time()
    return [str(lock) for lock in find_locks(extensions_folder()) if now - lock.stat().st_mtime > STALE_LOCK_S]


def inspect_tools(world: World, decoder: str, ds_config: dict[str, Any]) -> RankResult:
    """Return the problems of this node: `broken_modules` (module -> error), `missing_programs` and `stale_locks`.

    Only the first rank of each node looks; the result of the others is empty.
    """
    if world.local_rank:
        return {"broken_modules": {}, "missing_programs": [], "stale_locks": []}
    modules = ["av", "decord"] if decoder == "decord" else ["av"]
    broken = {module: error for module in modules if (error := find_import_error(module))}
    missing = []
    if compiles_extension(ds_config):
        find_ninja()
        missing = [name for name in ("g++", "ninja") if not shutil.which(name)]
    return {"broken_modules": broken, "missing_programs": missing, "stale_locks": _find_stale_locks()}


def assess_tools(results: list[RankResult]) -> list[Finding]:
    """Every node must be able to import the decoders and, if DeepSpeed needs to, to compile."""
    findings = []
    for result in results:
        node = describe_ranks([result])
        for module, error in result["broken_modules"].items():
            text = f"{module}: the import fails on {node}: {error}. Reinstall it there."
            findings.append(Finding("tools", FAIL, text))
        if result["missing_programs"]:
            programs = " and ".join(result["missing_programs"])
            text = f"{programs}: not found on {node}. Install what is missing: DeepSpeed compiles extensions with it."
            findings.append(Finding("tools", FAIL, text))
        if result["stale_locks"]:
            text = (
                f"{', '.join(result['stale_locks'])}: left by a killed build on {node}; later builds wait for it. "
                "Delete it unless a build is running."
            )
            findings.append(Finding("tools", WARN, text))
    return findings or [Finding("tools", OK, "decoders can be imported; no compiler or build tool is missing")]
