"""Shared folders, marked and compared; weight files that are not whole."""

import struct

import pytest
import torch
from safetensors.torch import save_file

from cogds.preflight.finding import FAIL, OK
from cogds.preflight.folders import (
    begin_marks,
    judge_marks,
    judge_sources,
    listing,
    look_marks,
    look_sources,
    mark_of,
    remove_marks,
    torn,
    unseen_marks,
)


def rounds(rank_0, others, wait_s=0.0):
    """What rank 0 finds where it has the folders `rank_0`, and the other ranks `others`; and that no mark is left."""
    failed = begin_marks(rank_0, "t")
    marked = [key for key in rank_0 if key not in failed]
    everyone = [
        {"rank": rank, "host": f"n{rank}", **look_marks({key: own[key] for key in marked}, "t", rank, wait_s)}
        for rank, own in enumerate([rank_0, *others])
    ]
    unseen = unseen_marks({key: rank_0[key] for key in marked}, "t", everyone, wait_s)
    for rank, own in enumerate([rank_0, *others]):
        remove_marks(own, "t", range(len(others) + 1) if rank == 0 else [rank])
    return judge_marks(everyone, failed, unseen)


def test_one_folder_for_all_is_made_and_left_empty(tmp_path):
    shared = {"output_dir": str(tmp_path / "new/out"), "data.cache_dir": str(tmp_path / "cache")}
    found = rounds(shared, [shared, shared])
    assert [one.level for one in found] == [OK, OK]
    assert "seen alike by 3 ranks" in found[0].text
    assert [*(tmp_path / "new/out").iterdir(), *(tmp_path / "cache").iterdir()] == []


def test_a_folder_that_only_one_rank_lacks(tmp_path):
    (tmp_path / "b").mkdir()
    found = rounds(
        {"output_dir": str(tmp_path / "a")}, [{"output_dir": str(tmp_path / name)} for name in ("a", "b", "c")]
    )
    assert [one.level for one in found] == [FAIL, FAIL]
    assert (
        f"on rank 2 (n2) {tmp_path}/b is another folder: it lacks what rank 0 wrote; on rank 0 it is" in found[0].text
    )
    assert f"on rank 3 (n3) there is no folder {tmp_path}/c" in found[1].text
    assert not (tmp_path / "c").exists()
    assert list((tmp_path / "b").iterdir()) == []


def test_a_mark_that_rank_0_does_not_see(tmp_path):
    """As where a node sees a copy, or a snapshot, of the folder."""
    shared = {"output_dir": str(tmp_path)}
    everyone = []
    assert begin_marks(shared, "t") == {}
    for rank in (0, 1):
        everyone.append({"rank": rank, "host": "n1", **look_marks(shared, "t", rank, 0.0)})
    mark_of(tmp_path, "t", 1).unlink()
    unseen = unseen_marks(shared, "t", everyone, 0.0)
    assert unseen == {"output_dir": [1]}
    (found,) = judge_marks(everyone, {}, unseen)
    assert (found.level, "on rank 1 (n1) rank 0 does not see what was written" in found.text) == (FAIL, True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    bad = {"output_dir": str(tmp_path / "file/out"), "data.cache_dir": str(tmp_path / "cache")}
    found = rounds(bad, [bad])
    assert [one.level for one in found] == [FAIL, OK]
    assert "output_dir: cannot write" in found[0].text


def test_a_mark_that_comes_late_is_waited_for(tmp_path):
    import threading

    shared = {"output_dir": str(tmp_path)}
    timer = threading.Timer(0.3, lambda: begin_marks(shared, "t"))
    timer.start()
    look = look_marks(shared, "t", 1, 30.0)["folders"]["output_dir"]
    timer.join()
    assert look["seen"]


def test_listings_compare_names_whatever_their_order(tmp_path):
    for folder, names in (("a", "xyz"), ("b", "zyx"), ("c", "xy")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    a, b, c = (listing(str(tmp_path / folder)) for folder in "abc")
    assert a == b
    assert (a["kind"], a["num"]) == ("folder", 3)
    assert a["content"] != c["content"]
    (tmp_path / "file").write_text("one")
    one = listing(str(tmp_path / "file"))
    (tmp_path / "file").write_text("two")
    assert listing(str(tmp_path / "file"))["content"] != one["content"]
    assert listing(str(tmp_path / "nothing"))["kind"] == "nothing"


def test_sources_that_differ_or_are_missing(tmp_path):
    def facts(*contents):
        return [
            {"rank": rank, "host": f"n{rank}", "torn": {},
             "sources": {"data.path": {"path": "/clips", "kind": kind, "num": 3, "content": content}}}
            for rank, (kind, content) in enumerate(contents)
        ]  # fmt: skip

    (alike,) = judge_sources(facts(("folder", "x"), ("folder", "x")))
    assert (alike.level, alike.text) == (OK, "data.path /clips, 3 entries, the same on 2 nodes")
    (other,) = judge_sources(facts(("folder", "x"), ("folder", "y")))
    assert (other.level, other.text.partition(": ")[2]) == (FAIL, "3 entries on rank 0 (n0), 3 entries on rank 1 (n1)")
    (missing,) = judge_sources(facts(("folder", "x"), ("nothing", "No such file")))
    assert missing.text == "data.path /clips cannot be read on rank 1 (n1): No such file"
    looked = look_sources({"data.path": str(tmp_path)}, tmp_path, looks=True)
    assert looked["torn"] == {}
    assert look_sources({}, tmp_path, looks=False) == {"sources": {}, "torn": {}}
    assert judge_sources([{"rank": 0, "host": "n", "sources": {}, "torn": {}}]) == []


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
def test_damaged_weights_are_seen_by_their_header(tmp_path, damage):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(5), "b": torch.zeros(0)}, file)
    assert torn(file) == ""
    file.write_bytes(damage(file.read_bytes()))
    assert torn(file)
    looked = look_sources({}, tmp_path, looks=True)
    (_, found) = judge_sources([{"rank": 0, "host": "n1", **looked}])
    assert (found.level, "weights.safetensors is damaged on rank 0 (n1)" in found.text) == (FAIL, True)
