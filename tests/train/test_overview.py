"""What TensorBoard shows of a run besides curves. A failure is only logged."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cogds.train.overview
from cogds.data.loading.dataset import BadClip, Batch, Choice
from cogds.metrics.figures import CELL
from cogds.train.overview import SAMPLES_PER_CLIP, SHEET_CLIPS, FirstBatchLogger, log_overview


class Vae:
    """Decodes to gray, or raises an error."""

    dtype, use_tiling = torch.float32, False

    def __init__(self, error):
        self.error, self.was_tiled = error, []

    def enable_tiling(self):
        self.use_tiling = True

    def decode(self, latents):
        self.was_tiled.append(self.use_tiling)
        if self.error:
            raise self.error
        assert latents.shape == (1, 2, 3, 4, 4)
        return SimpleNamespace(sample=latents.new_zeros(1, 3, 9, 32, 32))


@pytest.fixture
def shown():
    return []


def make_logger(shown, vae, show_batches=0, show_clips=0):
    cfg = SimpleNamespace(
        metrics=SimpleNamespace(show_clips=show_clips, show_batches=show_batches),
        train=SimpleNamespace(num_steps=9),
        data=SimpleNamespace(fps=16.0),
    )
    index = [
        SimpleNamespace(shape="9x32x48", captions=[SimpleNamespace(text=f"{start} {noun}") for start in ("a", "the")])
        for noun in ("cat", "dog", "cow")
    ]
    run = SimpleNamespace(cfg=cfg, first_step=4, world=SimpleNamespace(data_rank=0), data=SimpleNamespace(index=index))
    monitor = SimpleNamespace(
        add_video=lambda step, name, frames, fps: shown.append((step, name, frames.shape, fps)),
        add_image=lambda step, name, pixels: shown.append((step, name, pixels)),
        add_text=lambda *_: None,
    )
    builder = SimpleNamespace(vae=vae, device=torch.device("cpu"))
    return FirstBatchLogger(run, builder, monitor)


@pytest.mark.parametrize(
    "error", [None, RuntimeError("CUDA out of memory\nand more"), ValueError("odd"), torch.OutOfMemoryError()]
)
def test_the_first_batches_are_decoded_and_a_failure_is_only_logged(shown, error, capsys):
    vae = Vae(error)
    batch_logger = make_logger(shown, vae, 2)
    batch = Batch({"moments": torch.zeros(1, 4, 3, 4, 4)})
    before = torch.get_rng_state()
    for step in range(4, 9):
        batch_logger.log(step, SimpleNamespace(slots_of=lambda _: range(3, 4)), batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert vae.was_tiled == [True, True]
    assert vae.use_tiling is False
    if error:
        stderr = capsys.readouterr().err
        warnings = [line for line in stderr.splitlines() if line.startswith("warning: ")]
        assert all(type(error).__name__ in line for line in warnings)
        assert [f"step {n} " in line for n, line in zip((5, 6), warnings, strict=True)] == [True, True]
        assert stderr.count("Traceback") == 2
        assert shown == []
    else:
        assert shown == [(step, "data/decoded/3", (9, 32, 32, 3), 16.0) for step in (5, 6)]


def frames(num):
    """Return first frames with the gray levels 60, 120, ..."""
    return (torch.arange(1, num + 1, dtype=torch.uint8) * 60)[:, None, None, None].repeat(1, 3, 32, 48)


@pytest.fixture
def sheets(monkeypatch):
    """The gray levels and captions of each contact sheet."""
    sheets = []

    def contact_sheet(images, captions):
        sheets.append(([int(image.mean()) for image in images], list(captions)))
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(cogds.train.overview, "contact_sheet", contact_sheet)
    return sheets


def test_a_replacement_clip_has_the_caption_that_it_is_trained_with_and_images_are_copies(shown, sheets):
    batch_logger, tensors = make_logger(shown, None, show_clips=3), {"first_frame": frames(2)}
    batch_logger.log(4, None, Batch(tensors, (BadClip(0, "a", "odd"),), (Choice(2, 0), Choice(1, 1))))
    assert sheets == []
    assert sum(image.nbytes for image in batch_logger._frames) == 2 * CELL * 240 * 3
    tensors["first_frame"].zero_()
    batch_logger.log(5, None, Batch({"first_frame": frames(2)}, (), (Choice(0, 0), Choice(1, 0))))
    assert sheets == [([60, 120, 60], ["9x32x48  a cow", "9x32x48  the dog", "9x32x48  a cat"])]
    assert [call[:2] for call in shown] == [(6, "data/first_frames")]
    batch_logger.log(6, None, Batch({"first_frame": frames(2)}, (), (Choice(0, 0), Choice(1, 0))))
    assert len(shown) == 1
    assert batch_logger._frames == batch_logger._captions == []


@pytest.mark.parametrize("num_rows, num_samples", [(3, 5), (2, 3 * SAMPLES_PER_CLIP)])
def test_every_clip_is_shown_once(shown, sheets, num_rows, num_samples):
    """Although 16 are wanted, there are three, and rank 0 may train fewer."""
    batch_logger = make_logger(shown, None, show_clips=16)
    batch_logger._run.cfg.train.num_steps = 99
    for step in range(4, 40):
        row = (step // 2) % num_rows
        batch_logger.log(step, None, Batch({"first_frame": frames(row + 1)[row:]}, (), (Choice(row, 0),)))
    ((grays, captions),) = sheets
    assert sorted(captions) == sorted(f"9x32x48  a {noun}" for noun in ("cat", "dog", "cow")[:num_rows])
    assert len(set(grays)) == num_rows
    assert [step for step, *_ in shown] == [4 + num_samples]


def test_many_clips_are_shown_in_several_sheets(shown, sheets):
    batch_logger = make_logger(shown, None, show_clips=SHEET_CLIPS + 1)
    index = batch_logger._run.data.index
    index += index[:1] * SHEET_CLIPS
    choices = tuple(Choice(row, 0) for row in range(len(index)))
    batch_logger.log(4, None, Batch({"first_frame": frames(4)[:1].repeat(len(index), 1, 1, 1)}, (), choices))
    assert [len(captions) for _, captions in sheets] == [SHEET_CLIPS, 1]
    assert [name for _, name, _ in shown if name] == ["data/first_frames", "data/first_frames/2"]


def test_an_image_that_fails_is_logged_once_and_is_not_fatal(shown, monkeypatch, capsys):
    monkeypatch.setattr(cogds.train.overview, "contact_sheet", lambda *_: 1 / 0)
    batch_logger = make_logger(shown, None, show_clips=1)
    for step in (4, 5):
        batch_logger.log(step, None, Batch({"first_frame": frames(1)}, (), (Choice(0, 0),)))
    assert shown == batch_logger._frames == []
    stderr = capsys.readouterr().err
    assert stderr.count("warning: ") == stderr.count("Traceback") == 1
    assert "ZeroDivisionError" in stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_chart_that_fails_is_logged_by_rank_0(monkeypatch, capsys, rank):
    for name in ("to_yaml", "hparams"):
        monkeypatch.setattr(cogds.train.overview, name, lambda _: "")
    monkeypatch.setattr(cogds.train.overview, "draw_bucket_shares", lambda _: 1 / 0)
    monitor = SimpleNamespace(**dict.fromkeys(("add_text", "add_hparams", "add_image"), lambda *_: None))
    run = SimpleNamespace(cfg=None, ds_config={}, first_step=0, world=SimpleNamespace(rank=rank))
    log_overview(run, monitor)
    stderr = capsys.readouterr().err
    assert stderr.count("warning: ") == stderr.count("Traceback") == (rank == 0)
