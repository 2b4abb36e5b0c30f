"""Ways to train a LoRA on the shapes model, for `outcome.py`: cogds as it is, other trainers' choices, and additions.

Other trainers' choices are written from their description. Each changes one thing, in the arguments or in the code
that is run, and nothing else: clips, steps, learning rate and noise stay the same.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cogds.core.permutation import keyed_hash
from cogds.data.video.media import write_video
from cogds.files import whole_folder
from cogds.shapes.clips import SCALE, demo_scenes, to_uint8, write_clips
from cogds.shapes.world import FPS, MOTIONS, SIZES, Numbers, random_scene

BUCKETS = "17x48x48, 17x48x64, 17x64x48, 9x48x48"


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    about: what differs from cogds by default. words: arguments of the train verb. patch: changes the code before the
    run. data: makes another dataset in a folder, and returns its arguments. ranks, deepspeed: of the run. is_trained:
    whether anything is trained. averaged: how many of the last saved LoRAs are averaged. run_of: another recipe,
    whose run is used instead of an own one. trains_lora: or a whole model, which is in the folder `exported` of the
    run.
    """

    about: str
    words: Sequence[str] = ()
    patch: Callable[[], None] | None = None
    data: Callable[[Path], Sequence[str]] | None = None
    ranks: int = 1
    deepspeed: str = "zero2"
    is_trained: bool = True
    averaged: int = 1
    run_of: str | None = None
    trains_lora: bool = True
    exported: str = "model"


# --- other trainers' choices


def pad_at_the_end() -> None:
    """Pad latents with copies of the last frame instead of the first."""
    import cogds.train.step as step
    from cogds.core.geometry import padding_frames

    def pad_end(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
        padding = padding_frames(latents.shape[1], patch_size_t)
        return torch.cat([latents, latents[:, -1:].expand(-1, padding, -1, -1, -1)], dim=1)

    step.pad_front = pad_end


def without_ofs() -> None:
    """Leave the OFS embedding out in training. The pipeline gives it at inference."""
    from cogds.model.transformer.forward import Transformer

    embed = Transformer._time_embedding

    def embed_time_only(self, timestep, condition, ofs, dtype):
        embedding, self.ofs_embedding = self.ofs_embedding, None
        try:
            return embed(self, timestep, condition, ofs, dtype)
        finally:
            self.ofs_embedding = embedding

    Transformer._time_embedding = embed_time_only


def schedule_in_bf16() -> None:
    """Round the noise schedule to bf16 before noise is added and the target is computed."""
    import cogds.train.step as step

    def rounded(function):
        def call(latents, noise, timesteps, alphas_cumprod):
            table = alphas_cumprod.to(torch.bfloat16)
            alpha = table.to(timesteps.device)[timesteps].view(-1, *[1] * (latents.ndim - 1))
            return function(latents.bfloat16(), noise.bfloat16(), alpha.sqrt(), (1 - alpha).sqrt())

        return call

    step.add_noise = rounded(lambda x, noise, alpha, sigma: alpha * x + sigma * noise)
    step.v_target = rounded(lambda x, noise, alpha, sigma: (alpha * noise - sigma * x).float())


def same_timesteps_on_all_ranks(num_ranks: int = 2) -> None:
    """Draw the timesteps independently per sample, but the same on each of two ranks."""
    import cogds.train.batches as batches

    def draw(slots, num_slots, num_timesteps, seed, step):
        per_rank = max(1, num_slots // num_ranks)
        return torch.tensor([keyed_hash("same", seed, step, slot % per_rank) % num_timesteps for slot in slots])

    batches.stratified_timesteps = draw


def independent_timesteps() -> None:
    """Draw every timestep independently instead of covering the schedule evenly."""
    import cogds.train.batches as batches

    def draw(slots, _, num_timesteps, seed, step):
        return torch.tensor([keyed_hash("independent", seed, step, slot) % num_timesteps for slot in slots])

    batches.stratified_timesteps = draw


def stretched_to_one_size(folder: Path) -> Sequence[str]:
    """Stretch every clip of 2 s to one size, without cropping. Shorter clips are left out, as they do not fit."""
    size = (SCALE * 48, SCALE * 64)
    with whole_folder(folder / "clips") as partial:
        for number, scene in enumerate(scene for scene in demo_scenes() if scene.frames == 17):
            video = torch.nn.functional.interpolate(scene.draw(SCALE), size, mode="bicubic", antialias=True)
            write_video(partial / f"clip_{number:02d}.mp4", to_uint8(video), FPS, num_threads=1)
            (partial / f"clip_{number:02d}.txt").write_text(scene.caption + "\n")
    return [f"data.path={folder / 'clips'}", "data.buckets=[17x48x64]"]


# --- additions


def noisy_timesteps() -> None:
    """Train more at noisy timesteps, where the motion is decided: T u ** 0.65 for uniform u."""
    import cogds.train.batches as batches

    uniform = batches.stratified_timesteps

    def draw(slots, num_slots, num_timesteps, seed, step):
        share = (uniform(slots, num_slots, num_timesteps, seed, step) + 0.5) / num_timesteps
        return (share**0.65 * num_timesteps).long().clamp(max=num_timesteps - 1)

    batches.stratified_timesteps = draw


def several_captions(folder: Path) -> Sequence[str]:
    """Give every clip three captions, of which each visit trains another."""
    scenes = demo_scenes()
    write_clips(folder / "clips", scenes)
    rows = []
    for number, scene in enumerate(scenes):
        name = f"{scene.color_name} {scene.shape}"
        captions = [scene.caption, f"the {name} bounces", f"a {name} bounces up and down"]
        rows.append(json.dumps({"path": f"clips/clip_{number:02d}.mp4", "captions": captions}))
    (folder / "clips.jsonl").write_text("\n".join(rows) + "\n")
    return [f"data.path={folder / 'clips.jsonl'}"]


def prior_preserved(folder: Path) -> Sequence[str]:
    """Train every second sample on clips of the old motions that the base model itself has generated."""
    from cogds.model.load import SHAPES_MODEL, find_model
    from cogds.model.pipelines import load_whole_pipeline
    from cogds.shapes.generation import generate

    write_clips(folder / "clips", demo_scenes())
    numbers = Numbers(77)
    motions = list(MOTIONS)
    scenes = [random_scene(numbers, SIZES[index % 3], [motions[index % 8]]) for index in range(24)]
    videos = generate(load_whole_pipeline(find_model(SHAPES_MODEL)), scenes)
    with whole_folder(folder / "prior") as partial:
        for number, (scene, video) in enumerate(zip(scenes, videos)):
            large = torch.nn.functional.interpolate(video, scale_factor=SCALE, mode="bicubic", antialias=True)
            write_video(partial / f"clip_{number:02d}.mp4", to_uint8(large), FPS, num_threads=1)
            (partial / f"clip_{number:02d}.txt").write_text(scene.caption + "\n")
    sets = f"[{{path: {folder / 'clips'}, weight: 1}}, {{path: {folder / 'prior'}, weight: 1}}]"
    return [f"data.sets={sets}"]


RECIPES: Mapping[str, Recipe] = {
    "base": Recipe("no LoRA", is_trained=False),
    "cogds": Recipe("by default"),
    "zero1": Recipe("2 ranks, ZeRO-1", ranks=2, deepspeed="zero1"),
    "zero2": Recipe("2 ranks, ZeRO-2", ranks=2),
    "zero3": Recipe("2 ranks, ZeRO-3", ranks=2, deepspeed="zero3"),
    "zero2_offload": Recipe("2 ranks, ZeRO-2, offload", ranks=2, deepspeed="zero2_offload"),
    "zero3_offload": Recipe("2 ranks, ZeRO-3, offload", ranks=2, deepspeed="zero3_offload"),
    "scaled": Recipe("image latents x 0.7", words=["conditioning.image_latents=scaled"]),
    "unscaled": Recipe("image latents x 1", words=["conditioning.image_latents=unscaled"]),
    "padded_end": Recipe("latents padded at the end", patch=pad_at_the_end),
    "no_ofs": Recipe("without the OFS embedding", patch=without_ofs),
    "bf16_schedule": Recipe("noise schedule in bf16", patch=schedule_in_bf16),
    "same_timesteps": Recipe("the same timesteps on both ranks", patch=same_timesteps_on_all_ranks),
    "independent_timesteps": Recipe("timesteps drawn independently", patch=independent_timesteps),
    "stretched": Recipe("clips stretched to 17x48x64", data=stretched_to_one_size),
    "no_image_noise": Recipe("no noise on the first frame", words=["conditioning.image_noise=false"]),
    "averaged": Recipe("mean of the last 5 of 15 saved LoRAs", averaged=5, run_of="cogds"),
    "constant": Recipe("constant learning rate", words=["optimizer.schedule=constant"]),
    "constant_averaged": Recipe(
        "constant learning rate, mean of the last 5 of 15 saved LoRAs", averaged=5, run_of="constant"
    ),
    "several_captions": Recipe("three captions per clip", data=several_captions),
    "flipped": Recipe("mirrored clips too (`data.mirror`)", words=["data.mirror=true"]),
    "prior": Recipe("half the samples: old motions, generated by the base", data=prior_preserved),
    "twice": Recipe("twice the steps", words=["train.num_steps=300"]),
    "prior_twice": Recipe(
        "half the samples as above, twice the steps", words=["train.num_steps=300"], data=prior_preserved
    ),
    "noisy_timesteps": Recipe("more of the noisy timesteps", patch=noisy_timesteps),
    "rslora": Recipe("alpha x sqrt(rank), as rsLoRA scales", words=["lora.alpha=64"]),
    "full": Recipe("full fine-tuning, lr 5e-4", words=["train.method=full", "optimizer.lr=5e-4"], trains_lora=False),
    "full_ema": Recipe(
        "full fine-tuning, moving average",
        trains_lora=False,
        words=["train.method=full", "optimizer.lr=5e-4", "full.ema_decay=0.95"],
        exported="model_ema",
    ),
    "all_linear": Recipe("LoRA on all linear layers", words=["lora.target_modules=[all-linear]"]),
}
