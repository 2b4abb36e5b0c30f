"""Data and models that differ between nodes, cannot be read, or are damaged."""

import contextlib
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from cogds.preflight.findings import FAIL, OK
from cogds.preflight.sources import assess_sources, find_damage, inspect_sources, summarize_path


def test_summaries_of_folders_compare_names_in_any_order(tmp_path, monkeypatch):
    for name in "xyz":
        (tmp_path / name).touch()
    entries = list(os.scandir(tmp_path))
    summaries = []
    for listing in (entries, entries[::-1], entries[1:]):
        monkeypatch.setattr(os, "scandir", lambda _, listing=listing: contextlib.nullcontext(listing))
        summaries.append(summarize_path(str(tmp_path)))
    assert summaries[0] == summaries[1]
    assert (summaries[0]["kind"], summaries[0]["num"]) == ("folder", 3)
    assert summaries[0]["content"] != summaries[2]["content"]


def test_summaries_of_files_compare_bytes(tmp_path):
    (tmp_path / "file").write_text("old")
    before = summarize_path(str(tmp_path / "file"))
    (tmp_path / "file").write_text("new")
    after = summarize_path(str(tmp_path / "file"))
    assert (before["kind"], before["num"]) == (after["kind"], after["num"]) == ("file", 3)
    assert before["content"] != after["content"]
    assert summarize_path(str(tmp_path / "missing"))["kind"] == "nothing"


def test_sources_that_differ_or_are_missing_name_the_rank():
    def assess(*contents):
        results = [
            {"rank": rank, "host": f"n{rank}", "damaged_files": {},
             "sources": {"data.path": {"path": "/clips", "kind": kind, "num": 3, "content": content}}}
            for rank, (kind, content) in enumerate(contents)
        ]  # fmt: skip
        (finding,) = assess_sources(results)
        assert finding.text.startswith("data.path: ")
        assert "/clips" in finding.text
        return finding

    same = assess(("folder", "x"), ("folder", "x"))
    assert same.level == OK
    assert "3 entries" in same.text
    different = assess(("folder", "x"), ("folder", "y"))
    assert different.level == FAIL
    assert "3 entries on rank 0 (n0), 3 entries on rank 1 (n1)" in different.text
    missing = assess(("folder", "x"), ("nothing", "No such file"))
    assert missing.level == FAIL
    assert "rank 1 (n1)" in missing.text
    assert "No such file" in missing.text


def test_only_the_first_rank_of_a_node_inspects_sources(tmp_path):
    inspected = inspect_sources({"data.path": str(tmp_path)}, tmp_path, is_first_of_node=True)
    assert inspected["sources"].keys() == {"data.path", "model.path"}
    assert inspected["damaged_files"] == {}
    nothing = inspect_sources({}, tmp_path, is_first_of_node=False)
    assert nothing == {"sources": {}, "damaged_files": {}}
    assert assess_sources([{"rank": 0, "host": "n", **nothing}]) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: raw[:20],
        lambda _: b"",
        lambda raw: raw[:8] + b"x" * (len(raw) - 8),
        lambda _: struct.pack("<Q", 2) + b"[]",
        lambda _: b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_damaged_weights_are_recognized_by_their_header(tmp_path, damage):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(5), "b": torch.zeros(0)}, file)
    assert find_damage(file) == ""
    file.write_bytes(damage(file.read_bytes()))
    assert find_damage(file)
    inspected = inspect_sources({}, tmp_path, is_first_of_node=True)
    (_, finding) = assess_sources([{"rank": 0, "host": "n1", **inspected}])
    assert finding.level == FAIL
    assert finding.text.startswith(f"{file}: ")
    assert "rank 0 (n1)" in finding.text


def test_data_behind_a_url_is_checked(file_server):
    (file_server.folder / "clips").mkdir()
    (file_server.folder / "clips/a.mp4").write_text("video")
    folder, file = (summarize_path(f"{file_server.url}/{name}") for name in ("clips", "clips/a.mp4"))
    assert (folder["kind"], folder["num"], file["kind"], file["num"]) == ("folder", 1, "file", 5)
    (file_server.folder / "clips/b.mp4").touch()
    assert summarize_path(f"{file_server.url}/clips")["content"] != folder["content"]
    assert summarize_path(f"{file_server.url}/missing")["kind"] == "nothing"
