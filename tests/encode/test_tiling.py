"""Which buckets are encoded in tiles: by the smallest GPU, alike on all ranks and after a resume."""

import dataclasses

import pytest
import torch

from cogds.core.geometry import ClipShape
from cogds.core.memory import CUDA_CONTEXT_BYTES
from cogds.core.vae_memory import COGVIDEOX_VAE, vae_encode_bytes
from cogds.encode import encoder, tiling
from cogds.encode.encoder import encode_dataset
from cogds.encode.tiling import choose_tiling
from tests.drawn import draw_clips
from tests.jobs import make_job
from tests.published_model import FULL

SHORT = ClipShape(81, 480, 720)
HUGE = ClipShape(17, 1536, 2400)  # the VAE cannot encode it whole
CPU = None


@pytest.fixture
def choose(tiny_model, monkeypatch):
    """`choose(gpus, *overrides)`: tiles of the published VAE on ranks with GPUs of these sizes [bytes]; None: a CPU."""

    def run(gpus, *overrides, saved=None):
        monkeypatch.setattr(tiling, "gpu_memory", lambda _: gpus[0])
        monkeypatch.setattr(tiling, "all_gather", lambda *_: gpus)
        job = make_job(f"model.path={tiny_model}", "data.path=clips", "train.precision=bf16", *overrides)
        job = dataclasses.replace(job, buckets=(SHORT, FULL, HUGE))
        job.model.__dict__["vae_size"] = COGVIDEOX_VAE
        return choose_tiling(job, saved).tiled

    return run


def test_the_smallest_gpu_decides(choose):
    """The limit is 92% of its memory, without the CUDA context and the VAE's weights."""
    assert choose([80e9, 80e9]) == {HUGE}
    assert choose([80e9, 24e9]) == choose([24e9, 80e9]) == {FULL, HUGE}
    assert choose([8e9]) == {SHORT, FULL, HUGE}
    needed = vae_encode_bytes(FULL, False) + CUDA_CONTEXT_BYTES + 2 * COGVIDEOX_VAE.num_parameters
    assert choose([1.001 * needed / 0.92]) == {HUGE}
    assert choose([0.999 * needed / 0.92]) == {FULL, HUGE}
    assert choose([30e9], "train.precision=fp32") == {FULL, HUGE}


def test_without_a_gpu_and_on_the_fly_the_limit_is_a_constant(choose):
    assert choose([CPU]) == choose([CPU, CPU], "train.precision=fp32") == {FULL, HUGE}
    assert choose([80e9], "data.encode=on_the_fly") == {FULL, HUGE}


def test_the_config_decides_on_any_gpu(choose):
    for gpus in ([80e9], [8e9], [CPU]):
        assert choose(gpus, "data.vae_tiling=on") == {SHORT, FULL, HUGE}
        assert choose(gpus, "data.vae_tiling=off") == frozenset()


def test_a_resumed_run_keeps_its_tiles(choose):
    saved = {"step": 3, "tiled": [str(SHORT)]}
    assert choose([80e9], saved=saved) == {SHORT}
    assert choose([80e9], "data.vae_tiling=off", saved=saved) == frozenset()
    assert choose([80e9], saved={"step": 3}) == {FULL, HUGE}  # of a version without GPU-dependent tiles
    assert choose([80e9], saved={}) == {HUGE}


@pytest.mark.slow
def test_keys_and_encodings_have_the_same_tiles(tiny_model, tmp_path, monkeypatch):
    draw_clips(tmp_path / "clips")
    is_tiled, encode = [], encoder.encode_pixels

    def encode_pixels(vae, pixels, tiled):
        is_tiled.append((tuple(pixels.shape[:3]), tiled))
        return encode(vae, pixels, tiled)

    monkeypatch.setattr(encoder, "encode_pixels", encode_pixels)
    job = make_job(
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.buckets=[9x64x96, 9x96x64, 1x64x64]", "data.num_workers=0", "train.precision=fp32", "eval.every=null",
    )  # fmt: skip
    tiles = {ClipShape(9, 64, 96)}
    whole, tiled = (encode_dataset(dataclasses.replace(job, tiled=frozenset(chosen))) for chosen in ((), tiles))
    before, after = ([data.index[row] for row in range(len(data.index))] for data in (whole, tiled))
    keys = {clip.clip_key for clip in before}
    assert {clip.shape for clip in after if clip.clip_key not in keys} == tiles  # the others are in the cache
    sizes = torch.tensor(whole.index.sizes).sum(1).tolist()
    assert [called for called in is_tiled if called[1]] == [((9, 64, 96), True)] * sizes[0]
    assert len(is_tiled) == sum(sizes) + sizes[0]
