"""Pruning a cache that several datasets share: what is shown, asked and removed."""

import io
import shutil
import sys

import pytest

import cogds.encode.pruning
from cogds.data.cache.maintenance import stats
from cogds.encode.encoder import encode_dataset
from cogds.encode.pruning import prune_unused
from cogds.errors import UserError
from tests.drawn import draw_clips
from tests.jobs import make_job


class Terminal(io.StringIO):
    def isatty(self):
        return True


def encode(model, folder, cache_dir, name, buckets="9x32x48, 1x32x32"):
    job = make_job(
        f"model.path={model}", f"data.path={folder / name}", f"data.cache_dir={cache_dir}", f"data.buckets=[{buckets}]",
        "data.num_workers=0", "train.precision=fp32", "eval.every=null",
    )  # fmt: skip
    return job, encode_dataset(job)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """The clips of `mine` and `theirs`, and a cache with both, and with clips of `mine` with other buckets."""
    folder = tmp_path_factory.mktemp("pruning")
    for name in ("theirs", "mine"):
        draw_clips(folder / name, seed=len(name))
        encode(tiny_model, folder, folder / "cache", name)
    encode(tiny_model, folder, folder / "cache", "mine", "9x32x32, 1x32x32")
    return folder


@pytest.fixture
def shared(tiny_model, folder, tmp_path):
    """The job and data of `mine`, with a copy of the cache."""
    shutil.copytree(folder / "cache", tmp_path / "cache")
    return encode(tiny_model, folder, tmp_path / "cache", "mine")


def counts(job):
    return {kind: numbers["entries"] for kind, numbers in stats(job.cfg.data.cache_dir).items()}


def test_without_a_terminal_it_is_shown_what_would_go_and_nothing_is_removed(shared, folder, capsys, monkeypatch):
    job, data = shared
    before = counts(job)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match=r"^--prune: .*--yes"):
        prune_unused(job, data, is_confirmed=False)
    assert counts(job) == before
    own, theirs = capsys.readouterr().out.splitlines()[1:]
    assert own.startswith(f"  {folder / 'mine'} (this dataset, with other settings): 6 clips, about ")
    assert theirs.startswith(f"  {folder / 'theirs'}: 7 clips and 7 captions, about ")


@pytest.mark.parametrize("answer, removes", [("y\n", True), ("YES\n", True), ("n\n", False), ("", False)])
def test_on_a_terminal_it_asks(shared, monkeypatch, answer, removes):
    job, data = shared
    before = counts(job)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    prune_unused(job, data, is_confirmed=False)
    assert counts(job)["clips"] == (7 if removes else before["clips"])
    assert data.index.path.exists()


def test_nothing_is_asked_if_nothing_goes_or_with_yes(shared, monkeypatch):
    job, data = shared
    monkeypatch.setattr(cogds.encode.pruning, "_ask", lambda: pytest.fail("asked"))
    prune_unused(job, data, is_confirmed=True)
    assert counts(job)["clips"] == 7
    prune_unused(job, data, is_confirmed=False)
    assert counts(job)["clips"] == 7


def test_entries_of_no_index_are_shown_as_such(shared, capsys):
    job, data = shared
    for path in data.index.path.parent.iterdir():
        if not path.name.startswith(data.index.path.stem):
            path.unlink()
    prune_unused(job, data, is_confirmed=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  no dataset that was encoded here: 13 clips")
