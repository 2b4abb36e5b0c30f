"""The software of every node: versions, this project's own files, decoders, and what compiles."""

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
from cogds.distributed.world import World
from cogds.preflight.finding import FAIL, OK, WARN, Facts, Finding, at, differing, who
from cogds.process.environment import environment_variables

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy")
IMPORT_LIMIT_S = 60.0
STALE_LOCK_S = 600.0


def code_digest(root: Path) -> str:
    """Changes with any file that decides what is run."""
    state = hashlib.blake2b(digest_size=6)
    for pattern in ("cogds/**/*.py", "launch/**/*.py", "launch/**/*.yaml", "ds_configs/*.json"):
        for path in sorted(root.glob(pattern)):
            state.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def _driver() -> str:
    """The NVIDIA driver's version, "none" where there is no driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    match = re.search(r"Kernel Module\D*([\d.]+)", text)
    return match.group(1) if match else "unknown"


def look_versions() -> Facts:
    """`versions`: name -> text, of this rank."""
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
    versions["driver"] = _driver()
    versions["code of cogds"] = code_digest(Path(cogds.__file__).parent.parent)
    return {"versions": versions}


def judge_versions(facts: list[Facts]) -> list[Finding]:
    """Everything is of one version on all ranks. Only drivers may differ, which is worth a warning."""
    found = []
    for name in dict.fromkeys(name for one in facts for name in one["versions"]):
        text = differing(facts, at("versions", name, default="none"))
        if text:
            found.append(Finding("versions", WARN if name == "driver" else FAIL, f"{name}: {text}"))
    alike = ", ".join(f"{name} {version}" for name, version in facts[0]["versions"].items() if version != "none")
    return found or [Finding("versions", OK, alike)]


def needs_compiler(device_type: str, ds_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed compiles at the start: its all-reduce on CPUs, and an optimizer that is not torch's."""
    optimizer = ds_config["optimizer"]
    own = str(optimizer["type"]).lower() in ("adam", "adamw", "lion") and not optimizer["params"].get("torch_adam")
    return device_type == "cpu" or own


def _cannot_import(module: str) -> str:
    """Why a module cannot be imported, in a process of its own, as a broken library may take its process with it."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {IMPORT_LIMIT_S:g} s"
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return last[0] if done.returncode else ""


def _locks() -> list[str]:
    """Lock files that a killed compilation left: whoever needs that op next waits for them for ever."""
    folder = Path(
        environment_variables("TORCH_EXTENSIONS_DIR").get("TORCH_EXTENSIONS_DIR")
        or Path.home() / ".cache/torch_extensions"
    )
    now = time.time()
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    return [str(path) for path in locks if now - path.stat().st_mtime > STALE_LOCK_S]


def look_tools(world: World, decoder: str, ds_config: dict[str, Any]) -> Facts:
    """`broken`: module -> why; `missing`: programs; `locks`: files. One rank a node looks."""
    if world.local_rank:
        return {"broken": {}, "missing": [], "locks": []}
    modules = ["av", "decord"] if decoder == "decord" else ["av"]
    broken = {module: why for module in modules if (why := _cannot_import(module))}
    missing = []
    if needs_compiler(world.device.type, ds_config):
        # torch looks for ninja beside the interpreter's scripts too, once it is on the path.
        near = Path(sys.executable).parent / "ninja"
        missing = [name for name in ("g++",) if not shutil.which(name)]
        missing += [] if shutil.which("ninja") or near.exists() else ["ninja"]
    return {"broken": broken, "missing": missing, "locks": _locks()}


def judge_tools(facts: list[Facts]) -> list[Finding]:
    """Decoders can be imported, and a compiler is there where DeepSpeed needs one."""
    found = []
    for one in facts:
        for module, why in one["broken"].items():
            found.append(Finding("tools", FAIL, f"{module} cannot be imported on {who([one])}: {why}"))
        if one["missing"]:
            names = " and ".join(one["missing"])
            found.append(Finding("tools", FAIL, f"{names}, which DeepSpeed compiles with, is missing on {who([one])}"))
        if one["locks"]:
            found.append(
                Finding(
                    "tools", WARN, f"left by a killed compilation on {who([one])}, and later runs wait for it: "
                    f"{', '.join(one['locks'])}: delete it unless something compiles right now",
                )
            )  # fmt: skip
    return found or [Finding("tools", OK, "decoders can be imported, and what DeepSpeed compiles with is there")]
