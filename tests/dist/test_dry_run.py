"""The flags `--dry-run` and `--quiet`."""

import shlex
from pathlib import Path

import pytest
from PIL import Image

from cogds.arguments import parse_args
from cogds.data.cache.maintenance import stats

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture
def words(workshop, tiny_model):
    return [
        "--deepspeed", "ds_configs/zero2.json", f"model.path={tiny_model}", f"data.path={workshop / 'clips'}",
        "data.buckets=[17x64x96, 9x96x64, 9x64x64, 1x64x64]", "train.num_steps=2", "train.precision=fp32",
        "data.num_workers=0", "lora.rank=4",
    ]  # fmt: skip


def test_a_dry_run_shows_the_summary_and_writes_nothing(run_train, words, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    done = run_train(
        *words, "--dry-run", f"output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", "eval.every=1",
        "eval.held_out=0.3", "sample.every=1",
        f"sample.prompts=[{{prompt: a cat, image: {tmp_path / 'cat.png'}}}]", launcher="warm",
    )  # fmt: skip
    for text in ("rank 4", "to_q, to_k, to_v, to_out.0", "memory check: 17x64x96, batch 1", str(tmp_path / "run")):
        assert text in done.stdout
    assert done.stdout.splitlines()[-1].startswith("dry run:")
    assert not (tmp_path / "run").exists()
    cache = stats(tmp_path / "cache")  # only the empty caption, which every step needs
    assert {kind: counts["entries"] for kind, counts in cache.items() if counts["entries"]} == {"captions": 1}


def test_quiet_prints_only_the_result(run_train, workshop, tiny_model, words, tmp_path):
    done = run_train(
        *words, "eval.every=null", "--quiet", f"output_dir={tmp_path / 'run'}",
        f"data.cache_dir={workshop / 'cache'}", launcher="warm", ranks=1,
    )  # fmt: skip
    lora = tmp_path / "run/lora/step-000002"
    lines = done.stdout.splitlines()
    assert lines[0] == f"LoRA: {lora}"
    assert lines[1].startswith("watch: ")
    assert lines[1].endswith(f"tensorboard --logdir {tmp_path / 'run/tensorboard'}")
    # Ready to run: with a clip and its caption.
    program, _, words = lines[2].removeprefix("next: ").partition(" sample ")
    assert program.endswith("cogds")
    args = parse_args("sample", shlex.split(words))
    assert (args.model, args.lora) == (str(tiny_model), [[str(lora)]])
    caption = Path(args.image[0]).with_suffix(".txt").read_text().strip()
    assert args.prompt == [caption]
    assert len(lines) == 3
    assert lora.is_dir()
