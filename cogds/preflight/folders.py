"""The folders that all ranks share: there, and the same folder from everywhere.

Rank 0 leaves a mark in each folder that the run writes into, every other rank looks for it and leaves its own, and
rank 0 looks for those. All marks are removed again. What is only read is compared by names and sizes.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cogds.errors import UserError
from cogds.job import make_folders
from cogds.preflight.finding import FAIL, OK, Facts, Finding, at, by_value, who

LOOK_EVERY_S = 0.2
MAX_ENTRIES = 200_000
WHOLE_FILE_BYTES = 64_000_000


def mark_of(folder: str | Path, token: str, rank: int) -> Path:
    """The file that a rank leaves in a folder."""
    return Path(folder) / f".preflight-{token}-{rank}"


def leave_mark(folder: str, token: str, rank: int) -> str:
    """Leave this rank's mark; returns why it could not be left."""
    try:
        mark_of(folder, token, rank).write_text(token)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def begin_marks(folders: Mapping[str, str], token: str) -> dict[str, str]:
    """Rank 0's part: make the folders, as the run does, and mark them. Returns key -> why it failed."""
    failed = {}
    for key, folder in folders.items():
        try:
            make_folders({key: folder})
        except UserError as error:
            failed[key] = str(error)
            continue
        if why := leave_mark(folder, token, 0):
            failed[key] = f"{key}: cannot write into {folder} ({why})"
    return failed


def absent_marks(folder: str, token: str, ranks: Iterable[int], wait_s: float) -> list[int]:
    """The ranks whose mark does not show up within `wait_s`: network disks tell of new files with a delay."""
    deadline, left = time.monotonic() + wait_s, set(ranks)
    while True:
        try:
            names = set(os.listdir(folder))  # unlike a look at one name, it makes the client ask anew
        except OSError:
            names = set()
        left = {rank for rank in left if mark_of(folder, token, rank).name not in names}
        if not left or time.monotonic() > deadline:
            return sorted(left)
        time.sleep(LOOK_EVERY_S)


def look_marks(folders: Mapping[str, str], token: str, rank: int, wait_s: float) -> Facts:
    """The other ranks' part. `folders`: key -> {path, resolved, there, seen, error}."""
    looks: dict[str, Any] = {}
    absent = dict.fromkeys(folders, True)
    deadline = time.monotonic() + wait_s
    for key, folder in folders.items():
        absent[key] = bool(absent_marks(folder, token, [0], max(0.0, deadline - time.monotonic())))
    for key, folder in folders.items():
        there = Path(folder).is_dir()
        looks[key] = {
            "path": folder,
            "resolved": str(Path(folder).resolve()),
            "there": there,
            "seen": not absent[key],
            # A folder that is not the shared one is left as it is.
            "error": leave_mark(folder, token, rank) if there and not absent[key] else "",
        }
    return {"folders": looks}


def remove_marks(folders: Mapping[str, str], token: str, ranks: Iterable[int]) -> None:
    """Take the marks away, whoever left them."""
    for folder in folders.values():
        for rank in ranks:
            try:
                mark_of(folder, token, rank).unlink(missing_ok=True)
            except OSError:
                continue  # what could be written and not be removed is nothing that a run stumbles over


def judge_marks(facts: list[Facts], failed: Mapping[str, str], unseen: Mapping[str, Sequence[int]]) -> list[Finding]:
    """Every folder is one and the same. failed: rank 0's own trouble; unseen: ranks whose marks rank 0 did not see."""
    found = [Finding("folders", FAIL, why) for why in failed.values()]
    for key, first in facts[0]["folders"].items():
        bad = []
        for one in facts[1:]:
            look = one["folders"][key]
            if not look["there"]:
                bad.append((one, f"there is no folder {look['resolved']}"))
            elif not look["seen"]:
                bad.append((one, f"{look['resolved']} is another folder: it lacks what rank 0 wrote"))
            elif look["error"]:
                bad.append((one, f"cannot write into {look['resolved']} ({look['error']})"))
            elif one["rank"] in unseen.get(key, ()):
                bad.append((one, f"rank 0 does not see what was written into {look['resolved']}"))
        for what, group in by_value([{**one, "what": text} for one, text in bad], lambda one: one["what"]):
            note = "" if first["resolved"] in what else f"; on rank 0 it is {first['resolved']}"
            found.append(
                Finding("folders", FAIL, f"{key} is not shared: on {who(group)} {what}{note}: give an absolute path "
                        "that all nodes share")
            )  # fmt: skip
        if not bad:
            seen = f", seen alike by {len(facts)} ranks" if len(facts) > 1 else ", can be written"
            found.append(Finding("folders", OK, f"{key} {first['resolved']}{seen}"))
    return found


def listing(path: str) -> dict[str, Any]:
    """What stands at a path, to be compared: names in a folder, in whatever order, or a file's bytes.

    {"kind": "folder", "file" or "nothing", "num": entries or bytes, "content": a digest, "" where there is too much,
    or why nothing can be read}.
    """
    try:
        if os.path.isfile(path):
            size = os.path.getsize(path)
            # A larger file is not read for this: the same size will have to do.
            whole = (
                hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() if size <= WHOLE_FILE_BYTES else ""
            )
            return {"kind": "file", "num": size, "content": f"{size} {whole}"}
        num, total = 0, 0
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".preflight-"):
                    continue
                num += 1
                # Added up, because every file system has its own order.
                digest = hashlib.blake2b(os.fsencode(entry.name), digest_size=8).digest()
                total = (total + int.from_bytes(digest, "big")) % 2**64
                if num >= MAX_ENTRIES:
                    return {"kind": "folder", "num": num, "content": ""}
        return {"kind": "folder", "num": num, "content": f"{total:016x}"}
    except OSError as error:
        return {"kind": "nothing", "num": 0, "content": error.strerror or str(error)}


def sizes(folder: Path) -> dict[str, int]:
    """Size of every file below a folder, by its name in it."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def torn(file: Path) -> str:
    """Why a safetensors file is not whole, "" where it is. Only its header is read."""
    try:
        safe_open(file, "pt", backend="pread")
    except (SafetensorError, OSError) as error:
        return str(error)
    return ""


def look_sources(data_paths: Mapping[str, str], model_path: Path, looks: bool) -> Facts:
    """`sources`: key -> listing; `torn`: weight files that are not whole. looks: one rank a node does."""
    if not looks:
        return {"sources": {}, "torn": {}}
    sources = {key: {"path": path, **listing(path)} for key, path in data_paths.items()}
    model = sizes(model_path)
    text = json.dumps(model, sort_keys=True).encode()
    sources["model.path"] = {
        "path": str(model_path), "kind": "folder", "num": len(model),
        "content": hashlib.blake2b(text, digest_size=8).hexdigest(),
    }  # fmt: skip
    files = [model_path / name for name in model if name.endswith(".safetensors")]
    return {"sources": sources, "torn": {str(file): why for file in files if (why := torn(file))}}


def _amount(source: Mapping[str, Any]) -> str:
    return f"{source['num']:,} {'bytes' if source['kind'] == 'file' else 'entries'}"


def judge_sources(facts: list[Facts]) -> list[Finding]:
    """What is read is there, whole, and the same on every node."""
    found, looked = [], [one for one in facts if one["sources"]]
    for key in looked[0]["sources"] if looked else ():
        if not all(key in one["sources"] for one in looked):
            continue  # their configs differ, which is told elsewhere
        groups = by_value(looked, at("sources", key, "content"))
        nothing = [one for one in looked if one["sources"][key]["kind"] == "nothing"]
        if nothing:
            source = nothing[0]["sources"][key]
            found.append(
                Finding(
                    "sources", FAIL, f"{key} {source['path']} cannot be read on {who(nothing)}: {source['content']}"
                )
            )
        elif len(groups) > 1:
            listed = ", ".join(f"{_amount(of[0]['sources'][key])} on {who(of)}" for _, of in groups)
            path = looked[0]["sources"][key]["path"]
            found.append(Finding("sources", FAIL, f"{key} {path} differs between nodes in content: {listed}"))
        else:
            source = looked[0]["sources"][key]
            nodes = f", the same on {len(looked)} nodes" if len(looked) > 1 else ""
            found.append(Finding("sources", OK, f"{key} {source['path']}, {_amount(source)}{nodes}"))
    for one in looked:
        for file, why in list(one["torn"].items())[:3]:
            found.append(Finding("sources", FAIL, f"{file} is damaged on {who([one])}: {why}; fetch the model again"))
    return found


def unseen_marks(folders: Mapping[str, str], token: str, facts: Sequence[Facts], wait_s: float) -> dict[str, list[int]]:
    """Rank 0's last part: of each folder, the ranks that left a mark which does not show up here."""
    deadline, unseen = time.monotonic() + wait_s, {}
    for key, folder in folders.items():
        marked = [one["rank"] for one in facts if one["folders"][key]["seen"] and not one["folders"][key]["error"]]
        unseen[key] = absent_marks(folder, token, marked, max(0.0, deadline - time.monotonic()))
    return unseen
