"""Pruning a cache that several datasets share: what is shown, asked and removed."""

import io
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


@pytest.fixture
def shared(tiny_model, tmp_path):
    """The job and data of `mine`, whose cache also has clips of `theirs` and clips of `mine` with other buckets."""

    def encode(name, buckets):
        draw_clips(tmp_path / name, seed=len(name))
        job = make_job(
            f"model.path={tiny_model}", f"data.path={tmp_path / name}", f"data.cache_dir={tmp_path / 'cache'}",
            f"data.buckets=[{buckets}]", "data.num_workers=0", "train.precision=fp32", "eval.every=null",
        )  # fmt: skip
        return job, encode_dataset(job)

    encode("theirs", "9x32x48, 1x32x32")
    encode("mine", "9x32x32, 1x32x32")
    return encode("mine", "9x32x48, 1x32x32")


def counts(job):
    return {kind: numbers["entries"] for kind, numbers in stats(job.cfg.data.cache_dir).items()}


def test_without_a_terminal_it_is_shown_what_would_go_and_nothing_is_removed(shared, tmp_path, capsys, monkeypatch):
    job, data = shared
    before = counts(job)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match=r"^--prune: .*--yes"):
        prune_unused(job, data, is_confirmed=False)
    assert counts(job) == before
    own, theirs = capsys.readouterr().out.splitlines()[1:]
    assert own.startswith(f"  {tmp_path / 'mine'} (this dataset, with other settings): 6 clips, about ")
    assert theirs.startswith(f"  {tmp_path / 'theirs'}: 7 clips and 7 captions, about ")


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
