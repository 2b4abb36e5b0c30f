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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogds.core.conditioning import IMAGE_LATENT_CONVENTIONS
from cogds.core.diffusion import x0_from_v
from cogds.core.geometry import ClipShape, latent_frames, padding_frames
from cogds.core.permutation import keyed_hash
from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.dataset import Item, collate, read_encoded
from cogds.data.loading.index import IndexedClip
from cogds.distributed.world import World
from cogds.encode.encoder import encode_dataset
from cogds.encode.tiling import choose_tiling
from cogds.errors import UserError, refuse_to_run
from cogds.evaluate import load_eval_transformer
from cogds.formatting import counted
from cogds.job import load_job
from cogds.model.load import load_alphas_cumprod, load_vae
from cogds.train.evaluation import midpoints
from cogds.train.step import Draws, StepBuilder

NO_IMAGE = "no image"
MIN_CLIPS = 4  # the standard error of fewer clips means little
NUM_ERRORS = 2.0  # a difference is significant above this many standard errors


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
    changes = {"eval.every": 1, "eval.num_clips": args.clips}
    job = choose_tiling(load_job(args, World(0, 1, 0, 1), changes=changes, evaluated_only=True))
    cfg, model, world = job.cfg, job.model, job.world
    if not model.family.takes_image:
        raise UserError(
            f"model.path: {cfg.model.path} is a text-to-video model, which has no image latents to measure. Pass an "
            "image-to-video model."
        )
    data = encode_dataset(job)
    clips = [index[row] for index in (data.trained, data.held_out) if index is not None for row in range(len(index))]
    clips = clips[: args.clips]
    if len(clips) < MIN_CLIPS:
        raise UserError(
            f"data.path: {cfg.data.path} has {counted(len(clips), 'clip')}, too few for a standard error. "
            f"Give {MIN_CLIPS} or more."
        )
    vae, alphas_cumprod = load_vae(model, job.dtype, world.device), load_alphas_cumprod(model)
    builders = {}
    for name in IMAGE_LATENT_CONVENTIONS:
        changes = {"image_latents": name, "image_noise": False, "modes": {"first": 1.0}, "control": False}
        conditioning = cfg.conditioning.model_copy(update=changes)
        builders[name] = StepBuilder(
            vae, model.geometry, conditioning, alphas_cumprod, data.empty_caption_states, world.device
        )
    timesteps = midpoints(args.timesteps, len(alphas_cumprod))
    probe = Probe(load_eval_transformer(cfg, model, world.device), one_per_scale(builders), timesteps, cfg.seed)
    scores, zeros = probe.measure(read_batches(clips, job.cache))
    verdict = judge(scores, zeros)
    scales = {name: builder.image_scale for name, builder in builders.items()}
    measurement = Measurement(scores, zeros, scales, timesteps)
    print("\n".join(report(measurement, verdict, cfg.conditioning.image_latents)))
    print(json.dumps(to_json(measurement, verdict)))


def one_per_scale(builders: Mapping[str, StepBuilder]) -> dict[str, StepBuilder]:
    """Return the builders of the first convention with each scale. Conventions of equal scale are the same."""
    names: dict[float, str] = {}
    for name, builder in builders.items():
        names.setdefault(builder.image_scale, name)
    return {name: builders[name] for name in names.values()}


def read_batches(clips: Iterable[IndexedClip], cache: Cache) -> Iterator[tuple[IndexedClip, dict[str, torch.Tensor]]]:
    """Read clips from the cache, each as a batch of its own. Raises UserError if one is damaged."""
    for clip in clips:
        try:
            yield clip, collate([Item(read_encoded(cache, clip))]).tensors
        except DamagedEntryError as error:
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class Probe:
    """What measures a clip.

    transformer: takes the inputs from `StepBuilder.build` and returns its output first. builders: by convention.
    """

    transformer: Callable[..., tuple[torch.Tensor, ...]]
    builders: Mapping[str, StepBuilder]
    timesteps: Sequence[int]
    seed: int

    @torch.no_grad()
    def measure(
        self, clips: Iterable[tuple[IndexedClip, dict[str, torch.Tensor]]]
    ) -> tuple[dict[str, list[Scores]], list[float]]:
        """Measure clips, each with a batch of its own.

        Returns each clip's scores by convention and for `NO_IMAGE`, and its first-frame loss of predicting zeros.
        """
        scores: dict[str, list[Scores]] = {name: [] for name in (*self.builders, NO_IMAGE)}
        zeros = []
        for clip, batch in clips:
            for name in scores:
                clip_scores, zero_loss = self.score(name, clip, batch)
                scores[name].append(clip_scores)
            zeros.append(zero_loss)
        return scores, zeros

    def score(self, convention: str, clip: IndexedClip, batch: dict[str, torch.Tensor]) -> tuple[Scores, float]:
        """Measure one clip under a convention, or for `NO_IMAGE`."""
        builder = self.builders.get(convention) or next(iter(self.builders.values()))
        first = first_frame_slice(clip.shape, builder)
        losses, first_losses, zero_losses, pixel_errors = [], [], [], (0.0, 0.0)
        for number, timestep in enumerate(self.timesteps):
            slot = keyed_hash("probe", int(clip.clip_key, 16), number)  # the same noise under every convention
            drop_image, drop_caption = torch.tensor([convention == NO_IMAGE]), torch.tensor([False])
            draws = Draws(torch.tensor([timestep]), drop_image, drop_caption, self.seed, 0, [slot])
            inputs, target = builder.build(batch, clip.shape, draws)
            prediction = self.transformer(**inputs)[0].float()
            errors = (prediction - target).square()
            losses.append(errors.mean().item())
            first_losses.append(errors[:, first].mean().item())
            zero_losses.append(target[:, first].square().mean().item())
            if number == len(self.timesteps) // 2:
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

    if not Difference.between(first[best], zeros).is_significant:
        reason = "the weights predict the first frame no better than zeros, so they are not trained"
    elif not differences[NO_IMAGE].is_significant:
        reason = "the image does not improve the prediction of the first frame, so the weights do not use it"
    elif close := [name for name in rivals if not differences[name].is_significant]:
        reason = f"'{best}' and '{close[0]}' differ by less than {NUM_ERRORS:g} standard errors; measure more clips"
    elif better := [name for name in rivals if Difference.between(whole[name], whole[best]).is_significant]:
        reason = f"'{best}' is best for the first frame, but '{better[0]}' is better for the whole clip"
    else:
        nearest = min(differences[name].mean / max(differences[name].error, 1e-12) for name in rivals)
        reason = f"every other convention is worse by at least {nearest:.1f} standard errors"
        return Verdict(best, reason, best, differences)
    return Verdict(None, reason, best, differences)


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
