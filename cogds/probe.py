"""Which image-latent convention the base model's weights expect, measured on the user's own clips.

The pipeline multiplies the first frame's latents by 1 / scaling_factor, most trainers by scaling_factor, some by 1
(`core.conditioning.image_latent_scale`). The weights know how they were trained: given image latents of another
strength than that, they predict the clip worse, above all its first frame. So the same clips, timesteps and noise are
put through the model once for each convention and once without an image, and the losses are compared clip by clip.

Nothing is assumed of the answer. Where the differences are within two standard errors, where the weights predict no
better than zeros would, or where the image does not help them, the answer is that it cannot be told.
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
from cogds.train.evaluation import middles
from cogds.train.step import Draws, StepBuilder

NO_IMAGE = "no image"
MIN_CLIPS = 4  # fewer have no standard error worth the name
NUM_ERRORS = 2.0  # standard errors that a difference must exceed to be believed

Forward = Callable[[Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """One clip's losses and errors under one convention, means over the timesteps.

    loss, first_loss: v-loss of the whole clip, and of its first latent frame with the padding before it. brightness,
    colour: of the first frame as the model sees it through a middle timestep's noise, against the real one, in 0..255:
    the difference of the means, and the mean over the channels of its size.
    """

    loss: float
    first_loss: float
    brightness: float
    colour: float


@dataclass(frozen=True)
class Difference:
    """Mean of differences clip by clip, and its standard error."""

    mean: float
    error: float

    @property
    def is_sure(self) -> bool:
        """Whether it is above zero by more than `NUM_ERRORS` standard errors."""
        return self.mean > NUM_ERRORS * self.error

    @classmethod
    def of(cls, ones: Sequence[float], others: Sequence[float]) -> "Difference":
        """others - ones, two clips at least."""
        each = torch.tensor(others, dtype=torch.float64) - torch.tensor(ones, dtype=torch.float64)
        return cls(each.mean().item(), each.std().item() / math.sqrt(len(each)))


@dataclass(frozen=True)
class Verdict:
    """convention: what the weights expect, None where it cannot be told; because: the reason, for people.

    differences: how much worse than the best each of the others is, in the loss of the first frame.
    """

    convention: str | None
    because: str
    best: str
    differences: Mapping[str, Difference]


def main(args: argparse.Namespace) -> None:
    """Print a table and one line of JSON: which image-latent convention the model's weights expect."""
    if args.clips < MIN_CLIPS:
        raise UserError(f"--clips: {args.clips} are too few for a standard error. Pass {MIN_CLIPS} or more.")
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

    def builder(conditioning: ConditioningConfig) -> StepBuilder:
        abar = load_alphas_cumprod(model)
        return StepBuilder(vae, model.geometry, conditioning, abar, data.empty_caption_states, world.device)

    builders = builders_of(builder, cfg.conditioning)
    timesteps = middles(args.timesteps, len(next(iter(builders.values())).alphas_cumprod))
    scores, zeros = measure(
        lambda inputs: transformer(**inputs)[0], builders, clips, Cache(cfg.data.cache_dir), timesteps, cfg.seed
    )
    verdict = judge(scores, zeros)
    inverted, factor = bool(vae.config.invert_scale_latents), float(vae.config.scaling_factor)
    scales = {name: image_latent_scale(factor, inverted, name) for name in IMAGE_LATENT_CONVENTIONS}
    print("\n".join(report(scores, zeros, verdict, scales, len(clips), cfg.conditioning.image_latents)))
    print(json.dumps(facts(scores, zeros, verdict, scales, len(clips), timesteps)))


def builders_of(
    make: Callable[[ConditioningConfig], StepBuilder], conditioning: ConditioningConfig
) -> dict[str, StepBuilder]:
    """A StepBuilder for every convention that is another number than those before it, without noise on the image.

    make: a builder of a conditioning.
    """
    builders: dict[str, StepBuilder] = {}
    for name in IMAGE_LATENT_CONVENTIONS:
        one = make(conditioning.model_copy(update={"image_latents": name, "image_noise": False}))
        if one.image_scale not in [other.image_scale for other in builders.values()]:
            builders[name] = one
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
    """Every clip's scores by convention and for `NO_IMAGE`, and its first frame's loss if all that is predicted is 0.

    forward: the transformer's output for `StepBuilder.build`'s inputs.
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
            found, zero = _scores(forward, builder, batch, clip, timesteps, seed, without=name == NO_IMAGE)
            scores[name].append(found)
        zeros.append(zero)
    return scores, zeros


def _scores(
    forward: Forward,
    builder: StepBuilder,
    batch: dict[str, torch.Tensor],
    clip: IndexedClip,
    timesteps: Sequence[int],
    seed: int,
    without: bool,
) -> tuple[Scores, float]:
    """The scores of a batch of one clip, and the loss of zeros on its first frame."""
    whole, first, zero, seen = [], [], [], (0.0, 0.0)
    for number, timestep in enumerate(timesteps):
        place = keyed_hash("probe", int(clip.clip_key, 16), number)  # the same noise under every convention
        draws = Draws(
            torch.tensor([timestep]), torch.tensor([without]), torch.zeros(1, dtype=torch.bool), seed, 0, [place]
        )
        inputs, target = builder.build(batch, clip.shape, draws)
        prediction = forward(inputs).float()
        head = first_frames(clip.shape, builder)
        errors = (prediction - target).square()
        whole.append(errors.mean().item())
        first.append(errors[:, head].mean().item())
        zero.append(target[:, head].square().mean().item())
        if number == len(timesteps) // 2:
            noisy = inputs["hidden_states"][:, :, : target.shape[2]]
            latents = x0_from_v(noisy, prediction, inputs["timestep"], builder.alphas_cumprod)[:, head.stop - 1]
            seen = _pixel_errors(builder, latents, batch["first_frame"])
    return Scores(_mean(whole), _mean(first), *seen), _mean(zero)


def first_frames(shape: ClipShape, builder: StepBuilder) -> slice:
    """Where the first latent frame of a padded clip is, with the padding before it."""
    geometry = builder.geometry
    return slice(0, padding_frames(latent_frames(shape.frames, geometry), geometry.patch_size_t) + 1)


def _pixel_errors(builder: StepBuilder, latents: torch.Tensor, pixels: torch.Tensor) -> tuple[float, float]:
    """Brightness and colour errors of one latent frame [1, C, H, W] (scaled), decoded, against uint8 [1, 3, H, W]."""
    vae = builder.vae
    decoded = vae.decode((latents[:, :, None] / builder.scaling_factor).to(vae.dtype)).sample[:, :, -1].float()
    seen = (decoded.clamp(-1, 1) + 1) * 127.5
    difference = seen.mean(dim=(0, 2, 3)) - pixels.to(seen).mean(dim=(0, 2, 3))
    return difference.mean().item(), difference.abs().mean().item()


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def judge(scores: Mapping[str, Sequence[Scores]], zeros: Sequence[float]) -> Verdict:
    """What the scores say. zeros: the first frame's loss where nothing but 0 is predicted, clip by clip."""
    first = {name: [one.first_loss for one in found] for name, found in scores.items()}
    whole = {name: [one.loss for one in found] for name, found in scores.items()}
    conventions = [name for name in scores if name != NO_IMAGE]
    best = min(conventions, key=lambda name: _mean(first[name]))
    differences = {name: Difference.of(first[best], first[name]) for name in first if name != best}
    rivals = [name for name in conventions if name != best]

    def cannot(because: str) -> Verdict:
        return Verdict(None, because, best, differences)

    if not Difference.of(first[best], zeros).is_sure:
        return cannot("the weights predict the first frame no better than zeros would: they are not trained")
    if not differences[NO_IMAGE].is_sure:
        return cannot("the first frame is predicted no better with the image than without: the weights do not use it")
    if close := [name for name in rivals if not differences[name].is_sure]:
        return cannot(
            f"'{best}' and '{close[0]}' differ by less than {NUM_ERRORS:g} standard errors: measure more clips"
        )
    if against := [name for name in rivals if Difference.of(whole[name], whole[best]).is_sure]:
        return cannot(f"the first frame is predicted best with '{best}', but the whole clip better with '{against[0]}'")
    nearest = min(differences[name].mean / max(differences[name].error, 1e-12) for name in rivals)
    return Verdict(best, f"every other is worse, by {nearest:.1f} standard errors or more", best, differences)


def report(
    scores: Mapping[str, Sequence[Scores]],
    zeros: Sequence[float],
    verdict: Verdict,
    scales: Mapping[str, float],
    num_clips: int,
    configured: str,
) -> list[str]:
    """The measurement as a table, and what follows from it, for people."""
    width = max(map(len, scores)) + 2
    head = f"{'image latents':{width}} {'scale':>7} {'loss':>9} {'first frame':>12} {'worse than best':>19} "
    lines = [
        f"{num_clips} clips; means, and standard errors of differences clip by clip",
        head + "  brightness  colour",
    ]
    for name, found in scores.items():
        scale = f"{scales[name]:.3f}" if name in scales else "-"
        difference = verdict.differences.get(name)
        worse = f"{difference.mean:+.5f} ± {difference.error:.5f}" if difference else "best"
        loss, first, brightness, colour = (
            _mean(getattr(one, field) for one in found) for field in ("loss", "first_loss", "brightness", "colour")
        )
        lines.append(
            f"{name:{width}} {scale:>7} {loss:>9.5f} {first:>12.5f} {worse:>19}   {brightness:>+10.2f}  {colour:>6.2f}"
        )
    lines.append(f"{'zeros':{width}} {'-':>7} {'':>9} {_mean(zeros):>12.5f}")
    if verdict.convention is None:
        lines.append(f"cannot tell: {verdict.because}")
    else:
        lines.append(f"the weights expect '{verdict.convention}': {verdict.because}")
        if scales[verdict.convention] != scales[configured]:
            lines.append(
                f"the run has conditioning.image_latents={configured}: set conditioning.image_latents="
                f"{verdict.convention} (launch/sample.py and launch/export.py follow what the LoRA was trained with)"
            )
    return lines


def facts(
    scores: Mapping[str, Sequence[Scores]],
    zeros: Sequence[float],
    verdict: Verdict,
    scales: Mapping[str, float],
    num_clips: int,
    timesteps: Sequence[int],
) -> dict[str, Any]:
    """The same, JSON-able."""
    return {
        "verdict": verdict.convention,
        "because": verdict.because,
        "best": verdict.best,
        "num_clips": num_clips,
        "timesteps": list(timesteps),
        "scales": dict(scales),
        "zeros/first_loss": _mean(zeros),
        "worse": {name: dataclasses.asdict(one) for name, one in verdict.differences.items()},
    } | {
        field: {name: _mean(getattr(one, field) for one in found) for name, found in scores.items()}
        for field in ("loss", "first_loss", "brightness", "colour")
    }


if __name__ == "__main__":
    refuse_to_run("cogds.probe", "probe")
