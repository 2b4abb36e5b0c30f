"""The probe finds the convention that weights were made for, and says so where nothing can be found."""

import json
from types import SimpleNamespace

import pytest
import torch

import cogds.probe
from cogds.cli import call
from cogds.core.conditioning import image_latent_scale
from cogds.core.geometry import ClipShape
from cogds.data.video.drawn import draw_clips
from cogds.errors import UserError
from cogds.model.load import find_model, load_transformer, load_vae
from cogds.probe import NO_IMAGE, Scores, builders_of, facts, first_frames, judge, measure, report
from tests.train.test_step import make_builder

SHAPE, NUM_CLIPS = ClipShape.parse("9x64x64"), 6


class NoText:
    """Stands in for the text encoder."""

    def encode(self, _):
        return torch.zeros(32, 32)


@pytest.fixture(scope="module")
def model(tiny_model):
    return find_model(str(tiny_model))


@pytest.fixture(scope="module")
def vae(model):
    return load_vae(model, torch.float32, "cpu")


@pytest.fixture(scope="module")
def batches(vae):
    """Clips of still pictures, as the cache has them, by the clip's key."""
    found = {}
    for number in range(NUM_CLIPS):
        draw = torch.Generator().manual_seed(number)
        coarse = torch.randint(0, 256, (1, 3, 8, 8), generator=draw).float()
        picture = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").round()
        video = (picture / 127.5 - 1)[:, :, None].expand(-1, -1, SHAPE.frames, -1, -1)
        with torch.no_grad():
            moments = vae.encode(video).latent_dist.parameters[0]
        found[f"{number:032x}"] = {
            "moments": moments, "first_frame": picture[0].to(torch.uint8), "text_states": torch.zeros(32, 32)
        }  # fmt: skip
    return found


def all_builders(model, vae):
    plain = make_builder(model, NoText(), vae).conditioning
    return builders_of(lambda one: make_builder(model, NoText(), vae, image_latents=one.image_latents), plain)


@pytest.fixture
def probe(model, vae, batches, monkeypatch):
    """`probe(forward, timesteps)`: scores and the loss of zeros."""
    monkeypatch.setattr(cogds.probe, "read_encoded", lambda _, clip: batches[clip.clip_key])
    builders = all_builders(model, vae)
    clips = [SimpleNamespace(clip_key=key, shape=SHAPE) for key in batches]

    def run(forward, timesteps=(166, 500, 833)):
        return measure(forward, builders, clips, None, timesteps, 0)

    return run


def made_for(convention, builder):
    """Weights in a formula: all they know of the clip is its first frame, taken from image latents of this scale."""
    ratio = 0.7 / image_latent_scale(0.7, True, convention)

    def forward(inputs):
        noisy, image = inputs["hidden_states"].chunk(2, dim=2)
        abar = builder.alphas_cumprod[inputs["timestep"]].float()
        clean = torch.zeros_like(noisy)
        clean[:, first_frames(SHAPE, builder)] = ratio * image[:, :1]
        return (abar.sqrt() * noisy - clean) / (1 - abar).sqrt()

    return forward


@pytest.mark.parametrize("convention", ["pipeline", "scaled", "unscaled"])
def test_each_convention_is_found(model, vae, probe, convention):
    scores, zeros = probe(made_for(convention, make_builder(model, NoText(), vae)))
    verdict = judge(scores, zeros)
    assert verdict.convention == convention
    scales = {name: image_latent_scale(0.7, True, name) for name in ("pipeline", "scaled", "unscaled")}
    told = report(scores, zeros, verdict, scales, NUM_CLIPS, "pipeline")
    assert f"the weights expect '{convention}'" in "\n".join(told)
    assert any("set conditioning.image_latents=" in line for line in told) is (convention != "pipeline")
    assert json.loads(json.dumps(facts(scores, zeros, verdict, scales, NUM_CLIPS, [1])))["verdict"] == convention


def test_random_weights_tell_nothing(model, probe):
    transformer = load_transformer(model, torch.float32)
    verdict = judge(*probe(lambda inputs: transformer(**inputs)[0]))
    assert verdict.convention is None
    assert "not trained" in verdict.because


def test_the_first_frame_is_seen_through_the_noise(model, vae, batches):
    """The formula's own convention gives the clip's first latent frame back, whose decoded colours are compared."""
    seen = []

    def decode(latents):
        seen.append(latents)
        return SimpleNamespace(sample=torch.full((1, 3, 1, 64, 64), 0.5))  # 191.25 of 255

    decoder = SimpleNamespace(config=vae.config, dtype=vae.dtype, encode=vae.encode, decode=decode)
    builder = make_builder(model, NoText(), decoder)
    (key, batch), *_ = batches.items()
    batch = {name: value[None] for name, value in batch.items()}
    forward, clip = made_for("pipeline", builder), SimpleNamespace(clip_key=key, shape=SHAPE)
    scores, _ = cogds.probe._scores(forward, builder, batch, clip, [100, 500, 900], 0, without=False)
    clean = batch["moments"][:, :8, 0]
    assert (seen[0][:, :, 0] - clean).abs().mean() < 0.1 * clean.abs().mean()
    means = batch["first_frame"][0].float().mean(dim=(1, 2))
    assert scores.brightness == pytest.approx(191.25 - means.mean().item(), abs=1e-3)
    assert scores.colour == pytest.approx((191.25 - means).abs().mean().item(), abs=1e-3)


def test_weights_that_use_no_image_tell_nothing():
    same = [(0.5, 0.3)] * 4
    verdict = judge(scores_of(pipeline=same, scaled=same, unscaled=same, no_image=same), [1.0] * 4)
    assert verdict.convention is None
    assert "do not use it" in verdict.because


def scores_of(**first):
    return {
        name.replace("_", " "): [Scores(whole, loss, 0.0, 0.0) for whole, loss in losses]
        for name, losses in first.items()
    }


def test_a_difference_within_its_error_is_no_answer():
    noisy = [0.2, 0.4, 0.1, 0.5]
    scores = scores_of(
        pipeline=[(1, 0.3), (1, 0.3), (1, 0.3), (1, 0.3)], scaled=[(1, one + 0.01) for one in noisy],
        unscaled=[(1, 0.5)] * 4, no_image=[(1, 0.9)] * 4,
    )  # fmt: skip
    verdict = judge(scores, [1.0] * 4)
    assert (verdict.convention, verdict.best) == (None, "pipeline")
    assert "'pipeline' and 'scaled' differ by less than 2 standard errors" in verdict.because
    assert verdict.differences["scaled"].mean == pytest.approx(0.01)


def test_the_whole_clip_may_contradict():
    scores = scores_of(
        pipeline=[(0.9, 0.3)] * 4, scaled=[(0.8, 0.4)] * 4, unscaled=[(0.9, 0.5)] * 4, no_image=[(1, 0.9)] * 4
    )
    assert "the whole clip better with 'scaled'" in judge(scores, [1.0] * 4).because
    assert judge({**scores, "scaled": scores["unscaled"]}, [1.0] * 4).convention == "pipeline"


def test_conventions_that_are_one_number_are_measured_once(model):
    """Where a VAE does not ask for the inverse, the pipeline's scale is that of trainers."""
    same = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.7, invert_scale_latents=False))
    assert list(all_builders(model, same)) == ["pipeline", "unscaled"]


def test_the_command(tiny_model, tmp_path, capsys):
    draw_clips(tmp_path / "clips")
    common = [
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.buckets=[9x64x64]", "train.precision=fp32",
    ]  # fmt: skip
    call("probe", [*common, "--config", "launch/configs/demo.yaml", "--clips", "4", "--timesteps", "1",
                                  "model.create_tiny=false", "data.draw_demo_clips=false"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert "cannot tell: " in lines[-2]
    found = json.loads(lines[-1])
    assert (found["verdict"], found["num_clips"], found["timesteps"]) == (None, 4, [500])
    assert found["first_loss"].keys() == {"pipeline", "scaled", "unscaled", NO_IMAGE}
    with pytest.raises(UserError, match=r"^--clips: 2 "):
        call("probe", ["--config", "launch/configs/demo.yaml", "--clips", "2"])
