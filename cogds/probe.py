"""The probe verb: measure which image-latent convention a base model's weights expect, on the user's own clips.

The pipeline multiplies the first frame's latents by 1 / scaling_factor, most trainers by scaling_factor, some by 1
(`core.conditioning.image_latent_scale`). Image latents of another scale than in the model's training make its
predictions worse, most of all for the first frame. So the same clips, timesteps and noise pass through the model once
for each convention and once without an image, and the losses are compared clip by clip.

There is no verdict if the differences are within two standard errors, if the weights predict no better than zeros, or
if the image does not improve the prediction.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogds.config.schema import ConditioningConfig
from cogds.core.conditioning import IMAGE_LATENT_CONVENTIONS, image_latent_scale
from cogds.core.diffusion import x0_from_v
from cogds.core.geometry import ClipShape, latent_frames, padding_frames
from cogds.core.permutation import keyed_hash
from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.dataset import Item, collate, read_encoded
from cogds.data.loading.index import IndexedClip
from cogds.distributed.world import World
from cogds.encode.encoder import encode_dataset
from cogds.errors import UserError, refuse_to_run
from cogds.evaluate import load_eval_transformer
from cogds.formatting import counted
from cogds.job import load_job
from cogds.model.load import DTYPES, load_alphas_cumprod, load_vae
from cogds.train.evaluation import midpoints
from cogds.train.step import Draws, StepBuilder

NO_IMAGE = "no image"
MIN_CLIPS = 4  # the standard error of fewer clips means little
NUM_ERRORS = 2.0  # a difference is significant above this many standard errors

Forward = Callable[[Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """The losses and errors of one clip under one convention, averaged over the timesteps.

    loss: v-loss of the whole clip. first_loss: v-loss of its first latent frame with the padding before it.
    brightness, color: errors of the channel means of the first frame, as predicted at the middle timestep, in 0..255:
    mean error and mean absolute error over the channels.
    """

    loss: float
    first_loss: float
    brightness: float
    color: float


@dataclass(frozen=True)
class Measurement:
    """All scores of a probe.

    scores: of each clip, by convention and for `NO_IMAGE`. zeros: each clip's first-frame loss of predicting zeros.
    scales: the scale of the image latents by convention.
    """

    scores: Mapping[str, Sequence[Scores]]
    zeros: Sequence[float]
    scales: Mapping[str, float]
    timesteps: Sequence[int]

    @property
    def num_clips(self) -> int:
        return len(self.zeros)

    def means(self) -> dict[str, Scores]:
        """Return the scores averaged over clips."""
        return {
            name: Scores(*(_mean(getattr(clip, field.name) for clip in clips) for field in dataclasses.fields(Scores)))
            for name, clips in self.scores.items()
        }


@dataclass(frozen=True)
class Difference:
    """The mean difference over clips, and its standard error."""

    mean: float
    error: float

    @property
    def is_significant(self) -> bool:
        """Whether the mean is above zero by more than `NUM_ERRORS` standard errors."""
        return self.mean > NUM_ERRORS * self.error

    @classmethod
    def between(cls, first: Sequence[float], second: Sequence[float]) -> "Difference":
        """Return second - first, of at least two clips."""
        per_clip = torch.tensor(second, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
        return cls(per_clip.mean().item(), per_clip.std().item() / math.sqrt(len(per_clip)))


@dataclass(frozen=True)
class Verdict:
    """The result of a probe.

    convention: the one that the weights expect, or None if there is no answer. reason: why, for the user. best: the
    convention with the lowest loss of the first frame. differences: by how much each other convention's loss is higher.
    """

    convention: str | None
    reason: str
    best: str
    differences: Mapping[str, Difference]


def main(args: argparse.Namespace) -> None:
    """Print a table and one line of JSON."""
    if args.clips < MIN_CLIPS:
        raise UserError(f"--clips: {args.clips} is too few for a standard error. Pass {MIN_CLIPS} or more.")
    # Only the evaluated clips are encoded.
    changes = {"data.encode": "on_the_fly", "eval.every": 1, "eval.num_clips": args.clips}
    job = load_job(args, World(0, 1, 0, 1), changes=changes)
    cfg, model, world = job.cfg, job.model, job.world
    data = encode_dataset(cfg, model, job.buckets, world)
    clips = [index[row] for index in (data.trained, data.held_out) if index is not None for row in range(len(index))]
    clips = clips[: args.clips]
    if len(clips) < MIN_CLIPS:
        raise UserError(
            f"data.path: {cfg.data.path} has {counted(len(clips), 'clip')}, too few for a standard error. "
            f"Give {MIN_CLIPS} or more."
        )
    dtype = DTYPES[cfg.train.precision]
    transformer = load_eval_transformer(cfg, model, world.device)
    vae = load_vae(model, dtype, world.device)

    def make_builder(conditioning: ConditioningConfig) -> StepBuilder:
        alphas_cumprod = load_alphas_cumprod(model)
        return StepBuilder(vae, model.geometry, conditioning, alphas_cumprod, data.empty_caption_states, world.device)

    builders = make_builders(make_builder, cfg.conditioning)
    timesteps = midpoints(args.timesteps, len(next(iter(builders.values())).alphas_cumprod))
    forward = lambda inputs: transformer(**inputs)[0]  # noqa: E731
    scores, zeros = measure(forward, builders, clips, Cache(cfg.data.cache_dir), timesteps, cfg.seed)
    verdict = judge(scores, zeros)
    inverted, factor = bool(vae.config.invert_scale_latents), float(vae.config.scaling_factor)
    scales = {name: image_latent_scale(factor, inverted, name) for name in IMAGE_LATENT_CONVENTIONS}
    measurement = Measurement(scores, zeros, scales, tuple(timesteps))
    print("\n".join(report(measurement, verdict, cfg.conditioning.image_latents)))
    print(json.dumps(to_json(measurement, verdict)))


def make_builders(
    make: Callable[[ConditioningConfig], StepBuilder], conditioning: ConditioningConfig
) -> dict[str, StepBuilder]:
    """Return a StepBuilder without image noise for each convention, except those with the scale of an earlier one."""
    builders: dict[str, StepBuilder] = {}
    for name in IMAGE_LATENT_CONVENTIONS:
        builder = make(conditioning.model_copy(update={"image_latents": name, "image_noise": False}))
        if builder.image_scale not in [other.image_scale for other in builders.values()]:
            builders[name] = builder
    return builders


@torch.no_grad()
def measure(
    forward: Forward,
    builders: Mapping[str, StepBuilder],
    clips: Sequence[IndexedClip],
    cache: Cache,
    timesteps: Sequence[int],
    seed: int,
) -> tuple[dict[str, list[Scores]], list[float]]:
    """Return each clip's scores by convention and for `NO_IMAGE`, and each clip's first-frame loss of predicting zeros.

    forward: returns the transformer's output for the inputs from `StepBuilder.build`.
    """
    scores: dict[str, list[Scores]] = {name: [] for name in (*builders, NO_IMAGE)}
    zeros = []
    for clip in clips:
        try:
            batch = collate([Item(read_encoded(cache, clip))]).tensors
        except DamagedEntryError as error:
            raise UserError(str(error)) from None
        for name in scores:
            builder = builders.get(name) or next(iter(builders.values()))
            clip_scores, zero_loss = _score_clip(
                forward, builder, batch, clip, timesteps, seed, without_image=name == NO_IMAGE
            )
            scores[name].append(clip_scores)
        zeros.append(zero_loss)
    return scores, zeros


def _score_clip(
    forward: Forward,
    builder: StepBuilder,
    batch: dict[str, torch.Tensor],
    clip: IndexedClip,
    timesteps: Sequence[int],
    seed: int,
    *,
    without_image: bool,
) -> tuple[Scores, float]:
    """Return the scores of a batch of one clip, and the first-frame loss of predicting zeros."""
    losses, first_losses, zero_losses, pixel_errors = [], [], [], (0.0, 0.0)
    for number, timestep in enumerate(timesteps):
        slot = keyed_hash("probe", int(clip.clip_key, 16), number)  # the same noise under every convention
        drop_image, drop_caption = torch.tensor([without_image]), torch.tensor([False])
        draws = Draws(torch.tensor([timestep]), drop_image, drop_caption, seed, 0, [slot])
        inputs, target = builder.build(batch, clip.shape, draws)
        prediction = forward(inputs).float()
        first = first_frame_slice(clip.shape, builder)
        errors = (prediction - target).square()
        losses.append(errors.mean().item())
        first_losses.append(errors[:, first].mean().item())
        zero_losses.append(target[:, first].square().mean().item())
        if number == len(timesteps) // 2:
            noisy = inputs["hidden_states"][:, :, : target.shape[2]]
            latents = x0_from_v(noisy, prediction, inputs["timestep"], builder.alphas_cumprod)[:, first.stop - 1]
            pixel_errors = _pixel_errors(builder, latents, batch["first_frame"])
    return Scores(_mean(losses), _mean(first_losses), *pixel_errors), _mean(zero_losses)


def first_frame_slice(shape: ClipShape, builder: StepBuilder) -> slice:
    """Return the latent frames that hold the first frame of a padded clip, with the padding before it."""
    geometry = builder.geometry
    return slice(0, padding_frames(latent_frames(shape.frames, geometry), geometry.patch_size_t) + 1)


def _pixel_errors(builder: StepBuilder, latents: torch.Tensor, pixels: torch.Tensor) -> tuple[float, float]:
    """Decode one scaled latent frame [1, C, H, W] and return its brightness and color errors against pixels.

    pixels: uint8 [1, 3, H, W].
    """
    vae = builder.vae
    decoded = vae.decode((latents[:, :, None] / builder.scaling_factor).to(vae.dtype)).sample[:, :, -1].float()
    predicted = (decoded.clamp(-1, 1) + 1) * 127.5
    difference = predicted.mean(dim=(0, 2, 3)) - pixels.to(predicted).mean(dim=(0, 2, 3))
    return difference.mean().item(), difference.abs().mean().item()


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def judge(scores: Mapping[str, Sequence[Scores]], zeros: Sequence[float]) -> Verdict:
    """Compare the conventions. zeros: each clip's first-frame loss of predicting zeros."""
    first = {name: [clip.first_loss for clip in clips] for name, clips in scores.items()}
    whole = {name: [clip.loss for clip in clips] for name, clips in scores.items()}
    conventions = [name for name in scores if name != NO_IMAGE]
    best = min(conventions, key=lambda name: _mean(first[name]))
    differences = {name: Difference.between(first[best], first[name]) for name in first if name != best}
    rivals = [name for name in conventions if name != best]

    def no_answer(reason: str) -> Verdict:
        return Verdict(None, reason, best, differences)

    if not Difference.between(first[best], zeros).is_significant:
        return no_answer("the weights predict the first frame no better than zeros, so they are not trained")
    if not differences[NO_IMAGE].is_significant:
        return no_answer("the image does not improve the prediction of the first frame, so the weights do not use it")
    if close := [name for name in rivals if not differences[name].is_significant]:
        return no_answer(
            f"'{best}' and '{close[0]}' differ by less than {NUM_ERRORS:g} standard errors; measure more clips"
        )
    if better := [name for name in rivals if Difference.between(whole[name], whole[best]).is_significant]:
        return no_answer(f"'{best}' is best for the first frame, but '{better[0]}' is better for the whole clip")
    nearest = min(differences[name].mean / max(differences[name].error, 1e-12) for name in rivals)
    return Verdict(
        best, f"every other convention is worse by at least {nearest:.1f} standard errors", best, differences
    )


def report(measurement: Measurement, verdict: Verdict, configured: str) -> list[str]:
    """Return the table and the verdict as lines. configured: the run's conditioning.image_latents."""
    scores, scales = measurement.scores, measurement.scales
    width = max(map(len, scores)) + 2
    lines = [
        f"{measurement.num_clips} clips. Losses are means; differences are between losses of the same clip, "
        "with standard errors.",
        f"{'image latents':{width}} {'scale':>7} {'loss':>9} {'first frame':>12} {'difference to best':>19}   "
        f"{'brightness':>10}  {'color':>6}",
    ]
    for name, means in measurement.means().items():
        scale = f"{scales[name]:.3f}" if name in scales else "-"
        difference = verdict.differences.get(name)
        worse = f"{difference.mean:+.5f} ± {difference.error:.5f}" if difference else "best"
        lines.append(
            f"{name:{width}} {scale:>7} {means.loss:>9.5f} {means.first_loss:>12.5f} {worse:>19}   "
            f"{means.brightness:>+10.2f}  {means.color:>6.2f}"
        )
    lines.append(f"{'zeros':{width}} {'-':>7} {'':>9} {_mean(measurement.zeros):>12.5f}")
    if verdict.convention is None:
        return [*lines, f"no verdict: {verdict.reason}"]
    lines.append(f"the weights expect '{verdict.convention}': {verdict.reason}")
    if scales[verdict.convention] != scales[configured]:
        lines.append(
            f"the run has conditioning.image_latents={configured}. Set conditioning.image_latents="
            f"{verdict.convention}. `cogds sample` and `cogds export` use the setting a LoRA was trained with."
        )
    return lines


def to_json(measurement: Measurement, verdict: Verdict) -> dict[str, Any]:
    """Return the measurement and the verdict as JSON-serializable values."""
    means = measurement.means()
    return {
        "verdict": verdict.convention,
        "reason": verdict.reason,
        "best": verdict.best,
        "num_clips": measurement.num_clips,
        "timesteps": list(measurement.timesteps),
        "scales": dict(measurement.scales),
        "zeros/first_loss": _mean(measurement.zeros),
        "worse": {name: dataclasses.asdict(difference) for name, difference in verdict.differences.items()},
    } | {
        field.name: {name: getattr(scores, field.name) for name, scores in means.items()}
        for field in dataclasses.fields(Scores)
    }


if __name__ == "__main__":
    refuse_to_run("cogds.probe", "probe")
