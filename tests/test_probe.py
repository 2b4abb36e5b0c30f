"""The probe finds the convention that weights were trained with, or gives no verdict."""

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
from cogds.probe import NO_IMAGE, Measurement, Scores, first_frame_slice, judge, make_builders, measure, report, to_json
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
    """Cache entries of still clips, by clip key."""
    entries = {}
    for number in range(NUM_CLIPS):
        draw = torch.Generator().manual_seed(number)
        coarse = torch.randint(0, 256, (1, 3, 8, 8), generator=draw).float()
        picture = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").round()
        video = (picture / 127.5 - 1)[:, :, None].expand(-1, -1, SHAPE.frames, -1, -1)
        with torch.no_grad():
            moments = vae.encode(video).latent_dist.parameters[0]
        entries[f"{number:032x}"] = {
            "moments": moments, "first_frame": picture[0].to(torch.uint8), "text_states": torch.zeros(32, 32)
        }  # fmt: skip
    return entries


def all_builders(model, vae):
    plain = make_builder(model, NoText(), vae).conditioning
    return make_builders(lambda c: make_builder(model, NoText(), vae, image_latents=c.image_latents), plain)


@pytest.fixture
def probe(model, vae, batches, monkeypatch):
    """`probe(forward, timesteps)`: the scores, and the losses of predicting zeros."""
    monkeypatch.setattr(cogds.probe, "read_encoded", lambda _, clip: batches[clip.clip_key])
    builders = all_builders(model, vae)
    clips = [SimpleNamespace(clip_key=key, shape=SHAPE) for key in batches]

    def run(forward, timesteps=(166, 500, 833)):
        return measure(forward, builders, clips, None, timesteps, 0)

    return run


def model_trained_with(convention, builder):
    """A formula in place of weights: it reconstructs the first frame from image latents of this convention's scale."""
    ratio = 0.7 / image_latent_scale(0.7, True, convention)

    def forward(inputs):
        noisy, image = inputs["hidden_states"].chunk(2, dim=2)
        abar = builder.alphas_cumprod[inputs["timestep"]].float()
        clean = torch.zeros_like(noisy)
        clean[:, first_frame_slice(SHAPE, builder)] = ratio * image[:, :1]
        return (abar.sqrt() * noisy - clean) / (1 - abar).sqrt()

    return forward


@pytest.mark.parametrize(
    "convention", ["pipeline", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scaled", "unscaled"))]
)
def test_each_convention_is_found(model, vae, probe, convention):
    scores, zeros = probe(model_trained_with(convention, make_builder(model, NoText(), vae)))
    verdict = judge(scores, zeros)
    assert verdict.convention == convention
    scales = {name: image_latent_scale(0.7, True, name) for name in ("pipeline", "scaled", "unscaled")}
    measurement = Measurement(scores, zeros, scales, [1])
    text = "\n".join(report(measurement, verdict, "pipeline"))
    assert f"'{convention}'" in text
    assert (f"conditioning.image_latents={convention}" in text) is (convention != "pipeline")
    assert json.loads(json.dumps(to_json(measurement, verdict)))["verdict"] == convention


@pytest.mark.slow
def test_random_weights_give_no_verdict(model, probe):
    transformer = load_transformer(model, torch.float32)
    verdict = judge(*probe(lambda inputs: transformer(**inputs)[0]))
    assert verdict.convention is None
    assert "zeros" in verdict.reason


def test_pixel_errors_are_those_of_the_predicted_first_frame(model, vae, batches):
    """With its own convention the formula predicts the first latent frame exactly; its decoded pixels are compared."""
    decoded = []

    def decode(latents):
        decoded.append(latents)
        return SimpleNamespace(sample=torch.full((1, 3, 1, 64, 64), 0.5))  # 191.25 of 255

    decoder = SimpleNamespace(config=vae.config, dtype=vae.dtype, encode=vae.encode, decode=decode)
    builder = make_builder(model, NoText(), decoder)
    (key, batch), *_ = batches.items()
    batch = {name: value[None] for name, value in batch.items()}
    forward, clip = model_trained_with("pipeline", builder), SimpleNamespace(clip_key=key, shape=SHAPE)
    scores, _ = cogds.probe._score_clip(forward, builder, batch, clip, [100, 500, 900], 0, without_image=False)
    clean = batch["moments"][:, :8, 0]
    assert (decoded[0][:, :, 0] - clean).abs().mean() < 0.1 * clean.abs().mean()
    means = batch["first_frame"][0].float().mean(dim=(1, 2))
    assert scores.brightness == pytest.approx(191.25 - means.mean().item(), abs=1e-3)
    assert scores.color == pytest.approx((191.25 - means).abs().mean().item(), abs=1e-3)


def test_weights_that_ignore_the_image_give_no_verdict():
    same = [(0.5, 0.3)] * 4
    verdict = judge(scores_of(pipeline=same, scaled=same, unscaled=same, no_image=same), [1.0] * 4)
    assert verdict.convention is None
    assert "image" in verdict.reason


def scores_of(**first):
    return {
        name.replace("_", " "): [Scores(whole, loss, 0.0, 0.0) for whole, loss in losses]
        for name, losses in first.items()
    }


def test_a_difference_within_its_error_gives_no_verdict():
    noisy = [0.2, 0.4, 0.1, 0.5]
    scores = scores_of(
        pipeline=[(1, 0.3), (1, 0.3), (1, 0.3), (1, 0.3)], scaled=[(1, one + 0.01) for one in noisy],
        unscaled=[(1, 0.5)] * 4, no_image=[(1, 0.9)] * 4,
    )  # fmt: skip
    verdict = judge(scores, [1.0] * 4)
    assert (verdict.convention, verdict.best) == (None, "pipeline")
    assert all(part in verdict.reason for part in ("'pipeline'", "'scaled'", "2 standard errors"))
    assert verdict.differences["scaled"].mean == pytest.approx(0.01)


def test_no_verdict_if_the_whole_clip_contradicts_the_first_frame():
    scores = scores_of(
        pipeline=[(0.9, 0.3)] * 4, scaled=[(0.8, 0.4)] * 4, unscaled=[(0.9, 0.5)] * 4, no_image=[(1, 0.9)] * 4
    )
    verdict = judge(scores, [1.0] * 4)
    assert (verdict.convention, verdict.best) == (None, "pipeline")
    assert "'scaled'" in verdict.reason
    assert judge({**scores, "scaled": scores["unscaled"]}, [1.0] * 4).convention == "pipeline"


def test_conventions_of_the_same_scale_are_measured_once(model):
    """Without `invert_scale_latents`, the pipeline's scale is that of most trainers."""
    same = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.7, invert_scale_latents=False))
    assert list(all_builders(model, same)) == ["pipeline", "unscaled"]


@pytest.mark.slow
def test_the_command(tiny_model, tmp_path, capsys):
    draw_clips(tmp_path / "clips")
    common = [
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.buckets=[9x64x64]", "train.precision=fp32",
    ]  # fmt: skip
    call("probe", [*common, "--config", "launch/configs/demo.yaml", "--clips", "4", "--timesteps", "1",
                                  "model.create_tiny=false", "data.draw_demo_clips=false"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert "no verdict" in lines[-2]
    result = json.loads(lines[-1])
    assert (result["verdict"], result["num_clips"], result["timesteps"]) == (None, 4, [500])
    assert result["first_loss"].keys() == {"pipeline", "scaled", "unscaled", NO_IMAGE}
    with pytest.raises(UserError, match=r"^--clips: 2 "):
        call("probe", ["--config", "launch/configs/demo.yaml", "--clips", "2"])
