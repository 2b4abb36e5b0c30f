"""Whether the folders that the run writes to are the same folder on every rank, and writable.

Rank 0 writes a marker file into each folder. Every other rank looks for it and writes its own, and rank 0 looks for
those. In the end all marker files are deleted.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogds.data.storage.access import list_folder, remove, write_bytes
from cogds.data.storage.location import is_url, join
from cogds.errors import UserError
from cogds.files import make_folders
from cogds.preflight.findings import FAIL, OK, Finding, RankResult, describe_ranks, group_by_value

POLL_S = 0.2
MARKER_PREFIX = ".preflight-"


def marker_path(folder: str | Path, token: str, rank: int) -> str:
    """Return the path or URL of a rank's marker file in a folder. token: unique per preflight."""
    return join(str(folder), marker_name(token, rank))


def marker_name(token: str, rank: int) -> str:
    """Return the name of a rank's marker file."""
    return f"{MARKER_PREFIX}{token}-{rank}"


def write_marker(folder: str, token: str, rank: int) -> str:
    """Write a marker file. Returns the reason if it cannot be written, else ""."""
    try:
        write_bytes(marker_path(folder, token, rank), token.encode())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def create_folders(folders: Mapping[str, str], token: str) -> dict[str, str]:
    """Create the folders as the run does and write rank 0's marker files. Returns the errors by config key."""
    errors = {}
    for key, folder in folders.items():
        try:
            if not is_url(folder):
                make_folders({key: folder})
        except UserError as error:
            errors[key] = str(error)
            continue
        if reason := write_marker(folder, token, 0):
            errors[key] = f"{key}: cannot write to {folder} ({reason}). Use a folder that you may write to."
    return errors


def find_missing_markers(folder: str, token: str, ranks: Iterable[int], wait_s: float) -> list[int]:
    """Return the ranks whose marker files do not appear within `wait_s`. Network disks show new files with a delay."""
    deadline, missing = time.monotonic() + wait_s, set(ranks)
    while True:
        try:
            # A lookup of a single name may be answered from the NFS client's cache.
            names = {item.name for item in list_folder(folder)}
        except OSError:
            names = set()
        missing = {rank for rank in missing if marker_name(token, rank) not in names}
        if not missing or time.monotonic() > deadline:
            return sorted(missing)
        time.sleep(POLL_S)


def inspect_folders(folders: Mapping[str, str], token: str, rank: int, wait_s: float) -> RankResult:
    """Look for rank 0's marker files and write this rank's own.

    Returns:
        `folders`: config key -> {path, resolved, exists, is_marker_visible, error}.
    """
    states: dict[str, Any] = {}
    deadline = time.monotonic() + wait_s
    is_visible = {
        key: not find_missing_markers(folder, token, [0], max(0.0, deadline - time.monotonic()))
        for key, folder in folders.items()
    }
    for key, folder in folders.items():
        # A server has no folders. If it is another one, or does not answer, the marker file is not there.
        exists = is_url(folder) or Path(folder).is_dir()
        states[key] = {
            "path": folder,
            "resolved": folder if is_url(folder) else str(Path(folder).resolve()),
            "exists": exists,
            "is_marker_visible": is_visible[key],
            # Nothing is written to a folder that is not the shared one. A server says why it does not show the file.
            "error": write_marker(folder, token, rank) if exists and (is_visible[key] or is_url(folder)) else "",
        }
    return {"folders": states}


def find_unseen_ranks(
    folders: Mapping[str, str], token: str, results: Sequence[RankResult], wait_s: float
) -> dict[str, list[int]]:
    """Return, by config key, the ranks that wrote a marker file that rank 0 does not see. Runs on rank 0."""
    deadline, unseen = time.monotonic() + wait_s, {}
    for key, folder in folders.items():
        states = {result["rank"]: result["folders"][key] for result in results}
        written = [rank for rank, state in states.items() if state["is_marker_visible"] and not state["error"]]
        unseen[key] = find_missing_markers(folder, token, written, max(0.0, deadline - time.monotonic()))
    return unseen


def remove_markers(folders: Mapping[str, str], token: str, ranks: Iterable[int]) -> None:
    """Delete the marker files of these ranks."""
    for folder in folders.values():
        for rank in ranks:
            try:
                remove(marker_path(folder, token, rank))
            except OSError:
                continue  # a leftover marker file does not disturb a run


def assess_folders(
    results: list[RankResult], errors: Mapping[str, str], unseen: Mapping[str, Sequence[int]]
) -> list[Finding]:
    """Every folder must be the same one on all ranks.

    Args:
        results: of `inspect_folders`.
        errors: of `create_folders`.
        unseen: of `find_unseen_ranks`.
    """
    findings = [Finding("folders", FAIL, error) for error in errors.values()]
    for key, first in results[0]["folders"].items():
        problems = []
        for result in results[1:]:
            state = result["folders"][key]
            path = state["resolved"]
            if not state["exists"]:
                problem = f"there is no folder {path}"
            elif state["error"]:
                problem = f"cannot write to {path} ({state['error']})"
            elif not state["is_marker_visible"]:
                problem = f"{path} is a different folder: it lacks the file that rank 0 wrote"
            elif result["rank"] in unseen.get(key, ()):
                problem = f"rank 0 does not see the file written to {path}"
            else:
                continue
            problems.append({**result, "problem": problem})
        for problem, group in group_by_value(problems, [result["problem"] for result in problems]):
            on_rank0 = "" if first["resolved"] in problem else f"; on rank 0 it is {first['resolved']}"
            text = (
                f"{key}: not shared on {describe_ranks(group)}: {problem}{on_rank0}. Use an absolute path to a folder "
                "that all nodes share."
            )
            findings.append(Finding("folders", FAIL, text))
        if not problems:
            note = f"the same on {len(results)} ranks" if len(results) > 1 else "writable"
            findings.append(Finding("folders", OK, f"{key}: {first['resolved']}, {note}"))
    return findings
