"""The data and the model that the run reads: readable, complete, and the same on every node."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cogds.data.storage.access import is_folder, list_folder, stamp
from cogds.data.storage.location import absolute, is_url
from cogds.preflight.findings import FAIL, OK, Finding, RankResult, describe_ranks, group_by_value
from cogds.preflight.folders import MARKER_PREFIX

MAX_ENTRIES = 200_000
MAX_HASHED_BYTES = 64_000_000
MAX_LISTED_FILES = 3


def summarize_path(path: str) -> dict[str, Any]:
    """Summarize a file or folder, also at a URL, for comparison between nodes.

    Returns:
        kind: "folder", "file", or "nothing" if it cannot be read.
        num: number of entries or bytes.
        content: digest of the file's bytes or of the folder's names in any order; the reason if it cannot be read. For
            a large file it is the size alone, for a large folder it is empty.
    """
    try:
        if is_url(path):
            return _summarize_url(path)
        if os.path.isfile(path):
            size = os.path.getsize(path)
            digest = (
                hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() if size <= MAX_HASHED_BYTES else ""
            )
            return {"kind": "file", "num": size, "content": f"{size} {digest}"}
        num, total = 0, 0
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(MARKER_PREFIX):
                    continue
                num += 1
                # A sum of digests, because every file system lists the names in its own order.
                name_digest = hashlib.blake2b(os.fsencode(entry.name), digest_size=8).digest()
                total = (total + int.from_bytes(name_digest, "big")) % 2**64
                if num >= MAX_ENTRIES:
                    return {"kind": "folder", "num": num, "content": ""}
        return {"kind": "folder", "num": num, "content": f"{total:016x}"}
    except OSError as error:
        return {"kind": "nothing", "num": 0, "content": error.strerror or str(error)}


def _summarize_url(url: str) -> dict[str, Any]:
    if is_folder(url):
        names = "\0".join(item.name for item in list_folder(url))
        digest = hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return {"kind": "folder", "num": names.count("\0") + bool(names), "content": digest}
    size, version = stamp(url)
    return {"kind": "file", "num": size, "content": f"{size} {version}"}


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size of every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def find_damage(file: Path) -> str:
    """Return why a safetensors file is not complete, or "". Reads only its header."""
    try:
        safe_open(file, "pt", backend="pread")
    except (SafetensorError, OSError) as error:
        return str(error)
    return ""


def inspect_sources(
    data_paths: Mapping[str, str], model_path: Path, is_first_of_node: bool, compare_weights: bool = True
) -> RankResult:
    """Return `sources` (config key -> path and summary) and `damaged_files` (weight file -> reason).

    compare_weights: whether all nodes must hold the weights already.

    Only the first rank of each node looks; the result of the others is empty.
    """
    if not is_first_of_node:
        return {"sources": {}, "damaged_files": {}}
    sources = {key: {"path": path, **summarize_path(absolute(path))} for key, path in data_paths.items()}
    sizes = file_sizes(model_path)
    weights = [name for name in sizes if name.endswith(".safetensors")]
    if not compare_weights:
        sizes = {name: size for name, size in sizes.items() if name not in weights}
    text = json.dumps(sizes, sort_keys=True).encode()
    sources["model.path"] = {
        "path": str(model_path),
        "kind": "folder",
        "num": len(sizes),
        "content": hashlib.blake2b(text, digest_size=8).hexdigest(),
    }
    files = [model_path / name for name in weights]
    return {"sources": sources, "damaged_files": {str(file): reason for file in files if (reason := find_damage(file))}}


def _size(source: Mapping[str, Any]) -> str:
    return f"{source['num']:,} {'bytes' if source['kind'] == 'file' else 'entries'}"


def assess_sources(results: list[RankResult]) -> list[Finding]:
    """Data and model must be readable, complete, and the same on every node."""
    findings, nodes = [], [result for result in results if result["sources"]]
    for key in nodes[0]["sources"] if nodes else ():
        if not all(key in node["sources"] for node in nodes):
            continue  # the configs differ, which the check `config` reports
        path = nodes[0]["sources"][key]["path"]
        groups = group_by_value(nodes, [node["sources"][key]["content"] for node in nodes])
        unreadable = [node for node in nodes if node["sources"][key]["kind"] == "nothing"]
        if unreadable:
            source = unreadable[0]["sources"][key]
            text = (
                f"{key}: cannot read {source['path']} on {describe_ranks(unreadable)} ({source['content']}). Mount it "
                "under the same path on all nodes, or check the address and the access."
            )
            findings.append(Finding("sources", FAIL, text))
        elif len(groups) > 1:
            listed = ", ".join(f"{_size(group[0]['sources'][key])} on {describe_ranks(group)}" for _, group in groups)
            text = f"{key}: the content of {path} differs between nodes: {listed}. Use the same copy on all nodes."
            findings.append(Finding("sources", FAIL, text))
        else:
            same = f", the same on {len(nodes)} nodes" if len(nodes) > 1 else ""
            findings.append(Finding("sources", OK, f"{key}: {path}, {_size(nodes[0]['sources'][key])}{same}"))
    for node in nodes:
        for file, reason in list(node["damaged_files"].items())[:MAX_LISTED_FILES]:
            text = f"{file}: damaged on {describe_ranks([node])}: {reason}. Download the model again."
            findings.append(Finding("sources", FAIL, text))
    return findings
