"""The evaluation loss shows overfitting, and compares checkpoints much more precisely than the training loss."""

import copy
import dataclasses
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from cogds.core.diffusion import stratified_timesteps, v_loss
from cogds.core.held_out import name_hash
from cogds.data.cache.store import Cache
from cogds.data.loading.dataset import Item, collate, read_encoded
from cogds.encode.encoder import encode_dataset
from cogds.model.load import load_transformer
from cogds.model.lora.adapter import inject
from cogds.train.evaluation import make_eval_batches, make_evaluation, schedule_rounds
from cogds.train.step import Draws, draw_dropouts, load_step_builder
from tests.jobs import ALONE, make_job

pytestmark = pytest.mark.slow

BATCH_SIZE, NUM_STEPS = 4, 75
SEEDS = range(1, 9)


class Trained:
    """A tiny model that is trained on two images of noise, which only their captions identify. Four more are held out.

    size: height and width of the images [pixels].
    """

    def __init__(self, tiny_model, folder, size=64, num_steps=NUM_STEPS):
        names = [f"{number}.png" for number in range(60)]
        held = [name for name in names if name_hash(name) < 2**63][:4]
        trained = [name for name in names if name_hash(name) >= 2**63][:2]
        for name in held + trained:
            blocks = np.random.default_rng(int(name[:-4])).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(blocks.repeat(size // 8, 0).repeat(size // 8, 1)).save(folder / name)
        Image.new("RGB", (size, size), (128, 128, 128)).save(folder / "gray.png")
        columns = {"videos": held + trained, "prompts": [f"picture {name}" for name in held + trained]}
        columns["images"] = ["gray.png"] * 6  # all clips have the same condition
        for name, lines in columns.items():
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        job = make_job(
            f"model.path={tiny_model}", f"data.path={folder}", f"data.cache_dir={folder / 'cache'}",
            f"data.buckets=[1x{size}x{size}]", "data.num_workers=0", "train.precision=fp32", "eval.held_out=0.67",
            "eval.num_clips=4",
        )  # fmt: skip
        self.cfg, model = job.cfg, job.model
        data = encode_dataset(job)
        assert (len(data.held_out), len(data.trained), len(data.index)) == (4, 2, 2)
        no_caption = data.empty_caption_states
        self.builder = load_step_builder(model, self.cfg.conditioning, no_caption, torch.float32, ALONE.device)
        if size > 64:  # encoding the gray first frame would take most of the time
            latents = size // model.geometry.vae_spatial
            gray = torch.zeros(1, 1, model.geometry.latent_channels, latents, latents)
            self.builder.image_latents = lambda frames, _: gray.expand(len(frames), -1, -1, -1, -1)
        self.evaluation = make_evaluation(job, data, self.builder, (BATCH_SIZE,))
        self.items = [Item(read_encoded(Cache(folder / "cache"), data.index[row])) for row in range(2)]
        self.shape = data.index.buckets[0]
        self.transformer = load_transformer(model, torch.float32)
        self.parameters = inject(self.transformer, 32, 64, 0.0, ("all-linear",), seed=0)
        self.losses, self.weights = {}, {}
        self.train(num_steps)

    def train(self, num_steps):
        optimizer = torch.optim.AdamW(self.parameters, lr=5e-3, betas=(0.9, 0.95))
        for step in range(num_steps + 1):
            if step in (0, 25, NUM_STEPS):
                self.losses[step] = self.evaluation.scalars(self.forward)
                self.weights[step] = copy.deepcopy([parameter.detach() for parameter in self.parameters])
            optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 10)
            optimizer.zero_grad()
            self.loss(seed=0, step=step, batch_size=BATCH_SIZE).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()

    def forward(self, inputs):
        return self.transformer(**inputs)[0]

    def loss(self, seed, step, batch_size):
        """Return the loss of an optimizer step, with the random draws of training."""
        slots = range(batch_size)
        timesteps = stratified_timesteps(slots, batch_size, 1000, seed, step)
        dropped = draw_dropouts(self.cfg.conditioning, seed, step, slots)
        batch = collate([self.items[(batch_size * step + slot) % 2] for slot in slots])
        inputs, target = self.builder.build(batch.tensors, self.shape, Draws(timesteps, *dropped, seed, step, slots))
        return v_loss(self.forward(inputs), target).mean()

    @torch.no_grad()
    def restore(self, step):
        """Restore the weights after `step` optimizer steps."""
        for parameter, weights in zip(self.parameters, self.weights[step]):
            parameter.copy_(weights)


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    return Trained(tiny_model, tmp_path_factory.mktemp("images"))


def test_the_two_losses_diverge_when_the_model_overfits(trained):
    held_out, learned = (
        [trained.losses[step][name] for step in (0, 25, NUM_STEPS)] for name in ("eval/loss", "eval/train_loss")
    )
    print(f"eval/loss {held_out}, eval/train_loss {learned}")
    assert held_out[0] == pytest.approx(learned[0], rel=0.1)  # before training
    assert learned[2] < 0.92 * learned[1] < 0.92 * learned[0]
    assert held_out[2] > 0.98 * held_out[1]
    assert held_out[2] > 1.1 * learned[2]


def losses_by_seed(trained, steps):
    """Return (kind, step, seed) -> loss of the trained clips, as the mean of 18 samples. kind: evaluation or training.

    The training loss draws timesteps, noise and dropout for each step. The evaluation loss draws only the noise, which
    is the same for all weights.
    """
    evaluation = trained.evaluation
    clips, num = evaluation.clips[evaluation.num_held_out :], len(evaluation.points)
    rounds = schedule_rounds(make_eval_batches([0, 0], num, (BATCH_SIZE,)), (1.0,), 1)
    losses = {}
    for step in steps:
        trained.restore(step)
        for seed in SEEDS:
            seeded = dataclasses.replace(evaluation, clips=clips, num_held_out=0, rounds=rounds, seed=seed)
            with torch.no_grad():
                losses["evaluation", step, seed] = seeded.scalars(trained.forward)["eval/train_loss"]
                draws = range(1000 * step, 1000 * step + 2 * num)  # not those of other weights
                losses["training", step, seed] = statistics.mean(trained.loss(seed, draw, 1).item() for draw in draws)
    return losses


def test_the_difference_of_two_checkpoints_varies_ten_times_less_than_with_the_training_loss(trained):
    losses = losses_by_seed(trained, (25, NUM_STEPS))
    differences = {
        kind: statistics.stdev(losses[kind, NUM_STEPS, seed] - losses[kind, 25, seed] for seed in SEEDS)
        for kind in ("evaluation", "training")
    }
    print(f"standard error of the difference between two checkpoints {differences}")
    assert differences["training"] > 10 * differences["evaluation"]


def test_the_loss_varies_ten_times_less_than_the_training_loss(tiny_model, tmp_path):
    """For clips that are not tiny, because noise averages out over the latents: 3,600 here, 16,320 at 768x1360."""
    losses = losses_by_seed(Trained(tiny_model, tmp_path, size=480, num_steps=25), (25,))
    levels = {kind: statistics.stdev(losses[kind, 25, seed] for seed in SEEDS) for kind in ("evaluation", "training")}
    print(f"standard error of the loss {levels}")
    assert levels["training"] > 10 * levels["evaluation"]
