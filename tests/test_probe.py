"""The probe finds the convention that weights were trained with, or gives no verdict."""

import json
from types import SimpleNamespace

import pytest
import torch

from cogds.cli import call
from cogds.core.conditioning import IMAGE_LATENT_CONVENTIONS, image_latent_scale
from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.model.load import find_model, load_transformer, load_vae
from cogds.probe import NO_IMAGE, Measurement, Probe, Scores, first_frame_slice, judge, one_per_scale, report, to_json
from cogds.shapes.clips import unseen_scenes, write_clips
from cogds.shapes.world import MOTIONS, SIZES
from tests.conftest import TINY
from tests.drawn import draw_clips
from tests.train.test_step import make_builder

SHAPE, NUM_CLIPS = ClipShape.parse("9x64x64"), 4


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
def clips(vae):
    """Still clips, each with a batch of its own."""
    clips = []
    for number in range(NUM_CLIPS):
        draw = torch.Generator().manual_seed(number)
        coarse = torch.randint(0, 256, (1, 3, 8, 8), generator=draw).float()
        picture = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").round()
        video = (picture / 127.5 - 1)[:, :, None].expand(-1, -1, SHAPE.frames, -1, -1)
        with torch.no_grad():
            moments = vae.encode(video).latent_dist.parameters
        batch = {"moments": moments, "first_frame": picture.to(torch.uint8), "text_states": torch.zeros(1, 32, 32)}
        clips.append((SimpleNamespace(clip_key=f"{number:032x}", shape=SHAPE), batch))
    return clips


def make_builders(model, vae):
    return one_per_scale(
        {name: make_builder(model, NoText(), vae, image_latents=name) for name in IMAGE_LATENT_CONVENTIONS}
    )


def model_trained_with(convention, builder):
    """A formula in place of weights: it reconstructs the first frame from image latents of this convention's scale."""
    ratio = 0.7 / image_latent_scale(0.7, True, convention)

    def forward(hidden_states, timestep, **_):
        noisy, image = hidden_states.chunk(2, dim=2)
        abar = builder.alphas_cumprod[timestep].float()
        clean = torch.zeros_like(noisy)
        clean[:, first_frame_slice(SHAPE, builder)] = ratio * image[:, :1]
        return ((abar.sqrt() * noisy - clean) / (1 - abar).sqrt(),)

    return forward


@pytest.mark.parametrize(
    "convention", ["pipeline", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scaled", "unscaled"))]
)
def test_each_convention_is_found(model, vae, clips, convention):
    transformer = model_trained_with(convention, make_builder(model, NoText(), vae))
    scores, zeros = Probe(transformer, make_builders(model, vae), (166, 500, 833), 0).measure(clips)
    verdict = judge(scores, zeros)
    assert verdict.convention == convention
    scales = {name: image_latent_scale(0.7, True, name) for name in IMAGE_LATENT_CONVENTIONS}
    measurement = Measurement(scores, zeros, scales, [1])
    text = "\n".join(report(measurement, verdict, "pipeline"))
    assert f"'{convention}'" in text
    assert (f"conditioning.image_latents={convention}" in text) is (convention != "pipeline")
    assert json.loads(json.dumps(to_json(measurement, verdict)))["verdict"] == convention


@pytest.mark.slow
def test_random_weights_give_no_verdict(model, vae, clips):
    transformer = load_transformer(model, torch.float32)
    verdict = judge(*Probe(transformer, make_builders(model, vae), (166, 500, 833), 0).measure(clips))
    assert verdict.convention is None
    assert "zeros" in verdict.reason


def test_pixel_errors_are_those_of_the_predicted_first_frame(model, vae, clips):
    """With its own convention, the formula predicts the first latent frame exactly. Its decoded pixels are compared."""
    decoded = []

    def decode(latents):
        decoded.append(latents)
        return SimpleNamespace(sample=torch.full((1, 3, 1, 64, 64), 0.5))  # 191.25 of 255

    decoder = SimpleNamespace(config=vae.config, dtype=vae.dtype, encode=vae.encode, decode=decode)
    builder = make_builder(model, NoText(), decoder)
    clip, batch = clips[0]
    probe = Probe(model_trained_with("pipeline", builder), {"pipeline": builder}, [100, 500, 900], 0)
    scores, _ = probe.score("pipeline", clip, batch)
    clean = batch["moments"][:, :8, 0]
    assert (decoded[0][:, :, 0] - clean).abs().mean() < 0.1 * clean.abs().mean()
    means = batch["first_frame"][0].float().mean(dim=(1, 2))
    assert scores.brightness == pytest.approx(191.25 - means.mean().item(), abs=1e-3)
    assert scores.color == pytest.approx((191.25 - means).abs().mean().item(), abs=1e-3)


def scores_of(**losses):
    """Scores by convention from pairs of a clip's loss and first-frame loss."""
    return {
        name.replace("_", " "): [Scores(whole, first, 0.0, 0.0) for whole, first in pairs]
        for name, pairs in losses.items()
    }


def test_weights_that_ignore_the_image_give_no_verdict():
    same = [(0.5, 0.3)] * 4
    verdict = judge(scores_of(pipeline=same, scaled=same, unscaled=same, no_image=same), [1.0] * 4)
    assert verdict.convention is None
    assert "image" in verdict.reason


def test_a_difference_within_its_error_gives_no_verdict():
    scores = scores_of(
        pipeline=[(1, 0.3)] * 4, scaled=[(1, loss) for loss in (0.21, 0.41, 0.11, 0.51)], unscaled=[(1, 0.5)] * 4,
        no_image=[(1, 0.9)] * 4,
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


def test_conventions_of_the_same_scale_are_measured_once(family):
    """Without `invert_scale_latents`, `pipeline` and `scaled` have the same scale."""
    assert list(make_builders(find_model(str(family("5b-i2v"))), None)) == ["pipeline", "unscaled"]


def test_a_text_to_video_model_has_no_convention(family, tmp_path):
    words = [f"model.path={family('5b')}", f"data.path={tmp_path}", "data.buckets=[9x64x64]"]
    with pytest.raises(UserError, match=r"^model\.path: .*text-to-video"):
        call("probe", [*words, "--config", str(TINY)])


@pytest.mark.slow
def test_the_command(tiny_model, tmp_path, capsys):
    draw_clips(tmp_path / "clips")
    common = [
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.buckets=[9x64x64]", "train.precision=fp32",
    ]  # fmt: skip
    call("probe", [*common, "--config", str(TINY), "--clips", "4", "--timesteps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "no verdict" in lines[-2]
    result = json.loads(lines[-1])
    assert (result["verdict"], result["num_clips"], result["timesteps"]) == (None, 4, [500])
    assert result["first_loss"].keys() == {"pipeline", "scaled", "unscaled", NO_IMAGE}
    with pytest.raises(UserError, match=r"^--clips: 2 "):
        call("probe", ["--config", "launch/configs/demo.yaml", "--clips", "2"])


@pytest.mark.slow
def test_a_trained_model_expects_the_convention_that_it_was_trained_with(tmp_path, capsys):
    write_clips(tmp_path / "clips", unseen_scenes(12, SIZES[:3], list(MOTIONS)))
    call("probe", [
        "--config", str(TINY), "model.path=builtin:shapes", f"data.path={tmp_path / 'clips'}", "data.fps=8",
        f"data.cache_dir={tmp_path / 'cache'}", "data.buckets=[17x48x48, 17x48x64, 17x64x48]", "--clips", "12",
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["verdict"] == "pipeline", lines
