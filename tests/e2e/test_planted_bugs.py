"""A bug in the code that opens clips ends every command with its traceback and code 1, and is not blamed on a clip."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.drawn import draw_clips

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SCRIPT = ROOT / "tests/e2e/planted_script.py"

# A PyAV that no longer has an argument or a name that the worker processes use.
PYAV = """
__version__ = "19.0.1"

class error:
    class FFmpegError(Exception):
        pass

def open(*_, **__):
    raise {error}("planted")
"""


@pytest.fixture
def start(tiny_model, tmp_path, warm):
    """Run a script of launch/ on its own clips. error: the exception that opening a video raises in the workers."""
    draw_clips(tmp_path / "clips")
    arguments = [
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}", "data.buckets=[17x64x96, 9x96x64, 1x64x64]", "data.num_workers=1",
        "train.precision=fp32", "train.num_steps=4", "eval.every=null", "sample.every=null",
    ]  # fmt: skip

    def run(verb, *words, error=None, ranks=1):
        folder = tmp_path / (error or "nothing")
        folder.mkdir(exist_ok=True)
        if error:
            (folder / "av.py").write_text(PYAV.format(error=error))
        return warm(SCRIPT, [folder, ROOT / f"launch/{verb}.py", *arguments, *words], ranks=ranks)

    return run


def is_a_bug(done, error: str) -> bool:
    """Whether a command ended with the workers' traceback, and reported no unusable clips."""
    assert done.returncode == 1, done.stdout[-4000:]
    assert 'media.py", line' in done.stdout
    assert f"\n{error}: planted" in done.stdout
    assert "unusable" not in done.stdout
    return True


@pytest.mark.parametrize("error", ["TypeError", "AttributeError"])
def test_a_bug_while_clips_are_scanned(start, tmp_path: Path, error: str) -> None:
    assert is_a_bug(start("report", error=error), error)
    assert is_a_bug(start("encode", error=error, ranks=2), error)
    assert not list(tmp_path.rglob("*.parquet"))  # no clip is recorded as unusable
    assert start("report").returncode == 0


@pytest.mark.parametrize("verb, mode", [("encode", "cached"), ("train", "on_the_fly")])
def test_a_bug_while_clips_are_decoded(start, verb: str, mode: str) -> None:
    words = (f"data.encode={mode}", *(["--deepspeed", "ds_configs/zero2.json"] if verb == "train" else []))
    assert start("report", *words).returncode == 0  # scanned: known to be usable
    assert is_a_bug(start(verb, *words, error="TypeError", ranks=2), "TypeError")
