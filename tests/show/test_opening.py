from types import SimpleNamespace

import pytest
import torch

from cogds.data.dataset import Batch
from cogds.show.opening import FirstBatches


class Vae:
    """Decodes to grey, or has no memory left."""

    dtype, use_tiling = torch.float32, False

    def __init__(self, fails):
        self.fails, self.was_tiled = fails, []

    def enable_tiling(self):
        self.use_tiling = True

    def decode(self, latents):
        self.was_tiled.append(self.use_tiling)
        if self.fails:
            raise RuntimeError("CUDA out of memory\nand more")
        assert latents.shape == (1, 2, 3, 4, 4)
        return SimpleNamespace(sample=latents.new_zeros(1, 3, 9, 32, 32))


@pytest.fixture
def shown():
    return []


def first_batches(shown, vae, show_batches):
    cfg = SimpleNamespace(
        monitor=SimpleNamespace(show_clips=0, show_batches=show_batches),
        train=SimpleNamespace(num_steps=9),
        data=SimpleNamespace(fps=16.0),
    )
    run = SimpleNamespace(cfg=cfg, first_step=4, world=SimpleNamespace(data_rank=0))
    monitor = SimpleNamespace(animation=lambda step, name, frames, fps: shown.append((step, name, frames.shape, fps)))
    builder = SimpleNamespace(vae=vae, device=torch.device("cpu"))
    return FirstBatches(run, builder, monitor, shown.append)


@pytest.mark.parametrize("fails", [False, True])
def test_batches_are_decoded_for_so_many_steps_and_what_fails_stops_nothing(shown, fails):
    vae = Vae(fails)
    first = first_batches(shown, vae, 2)
    batch = Batch({"moments": torch.zeros(1, 4, 3, 4, 4)})
    before = torch.get_rng_state()
    for step in range(4, 9):
        first.look(step, SimpleNamespace(slots_of=lambda _: range(3, 4)), batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert vae.was_tiled == [True, True]
    assert vae.use_tiling is False
    if fails:
        assert shown == [f"the batch of step {n} could not be decoded (CUDA out of memory)" for n in (5, 6)]
    else:
        assert shown == [(step, "data/decoded/3", (9, 32, 32, 3), 16.0) for step in (5, 6)]
