"""Saves of a full fine-tune: complete or absent whenever a rank is killed, with the model that belongs to them."""

import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogds.config.loading import load_config
from cogds.distributed.world import World
from cogds.engine import checkpoint
from cogds.engine.shards import Fragment, Shard, ShardReader, shard_name
from cogds.errors import UserError
from cogds.model.full_export import FullExport
from cogds.model.load import find_model
from cogds.train import full_saving
from cogds.train.full_saving import _FullSave
from tests.engine.test_checkpoint_kill import run_in_fork

NUM_RANKS, NUM_KILLS, MAX_KILLS = 2, 20, 100
TRAINED = "transformer_blocks.0.attn1.to_q.weight"


class Saves:
    """Saves of two ranks, of which one weight of the tiny model is trained."""

    def __init__(self, folder, tiny_model):
        self.folder, self.model = folder, find_model(str(tiny_model))
        self.cfg = load_config(
            None, [f"model.path={tiny_model}", "data.path=x", "train.method=full", f"output_dir={folder}",
                   "checkpoint.keep_last=2"],
        )[0]  # fmt: skip
        shape = (
            CogVideoXTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer")
            .get_parameter(TRAINED)
            .shape
        )
        self.shape, self.size = shape, shape.numel()
        self.middle = self.size // 3  # ranks have different shares

    def weight(self, step):
        return torch.randn(self.size, generator=torch.Generator().manual_seed(step))

    def save(self, step):
        """Run all phases of both ranks, one after another."""
        for name in full_saving.exports(self.cfg):
            (checkpoint.begin_folder(self.folder / name, step) / "transformer").mkdir()
        partial, ranks = checkpoint.begin_folder(self.folder / "checkpoints", step), []
        for rank, (start, stop) in enumerate(((0, self.middle), (self.middle, self.size))):
            weight = self.weight(step)[start:stop]
            fragments = [Fragment(kind, TRAINED, start, stop) for kind in ("weight", "exp_avg")]
            run = SimpleNamespace(world=World(rank, NUM_RANKS, rank, NUM_RANKS), cfg=self.cfg)
            header = {"step": step, "num_updates": step, "num_shards": NUM_RANKS, "kinds": ["weight", "exp_avg"],
                      "shapes": {TRAINED: list(self.shape)}, "identity": {}}  # fmt: skip
            export = FullExport(self.model, torch.float32, frozenset([TRAINED]), 1.0, {"step": step}, 40_000)
            ranks.append(_FullSave(run, Shard(fragments, iter([weight, weight + 1]), step), partial, export, header))
        results = []
        for phase in ("write_shard", "write_models", "commit"):
            results = [getattr(rank, phase)(results) for rank in reversed(ranks)][::-1]

    def find_step(self):
        """Find the newest checkpoint, check that it and its model have the state of their step, and return the step."""
        found = checkpoint.find(self.folder / "checkpoints", "auto")
        step = found.header["step"]
        with ShardReader(found.path, NUM_RANKS) as reader:
            for kind, offset in (("weight", 0), ("exp_avg", 1)):
                assert torch.equal(reader.read(kind, TRAINED, 0, self.size), self.weight(step) + offset)
                part = reader.read(kind, TRAINED, self.middle - 2, self.middle + 3)
                assert torch.equal(part, self.weight(step)[self.middle - 2 : self.middle + 3] + offset)
        model = self.folder / "model" / found.path.name
        transformer = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
        assert torch.equal(transformer.get_parameter(TRAINED).flatten(), self.weight(step))
        return step


@pytest.fixture
def saves(tmp_path, tiny_model):
    return Saves(tmp_path, tiny_model)


def test_the_folder_is_that_of_diffusers_and_old_models_go_with_their_checkpoints(saves, tiny_model):
    for step in (1, 2, 3):
        saves.save(step)
    assert saves.find_step() == 3
    for kind in ("checkpoints", "model"):
        steps = sorted(path.name for path in (saves.folder / kind).iterdir() if path.name != "latest")
        assert steps == ["step-000002", "step-000003"]
    folder = saves.folder / "model/step-000003"
    files = sorted(path.name for path in (folder / "transformer").iterdir())
    assert len([name for name in files if name.endswith(".safetensors")]) > 3
    assert {"config.json", "diffusion_pytorch_model.safetensors.index.json"} < set(files)
    card = (folder / "README.md").read_text()
    assert f'CogVideoXImageToVideoPipeline.from_pretrained("{folder}"' in card
    assert "lora" not in card.split("---")[1]
    base = CogVideoXTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer").state_dict()
    for name, weight in (
        CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict().items()
    ):
        assert torch.equal(weight, base[name]) == (name != TRAINED)


def test_the_factor_of_the_image_latents_is_in_the_weights(tmp_path, tiny_model):
    (tmp_path / "transformer").mkdir()
    export = FullExport(find_model(str(tiny_model)), torch.float32, frozenset(), 0.5, {})
    export.write_files(tmp_path / "transformer", lambda *_: pytest.fail("nothing is trained"))
    export.complete(tmp_path)
    weights = CogVideoXTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer").state_dict()
    base = CogVideoXTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer").state_dict()
    expected = base["patch_embed.proj.weight"].unflatten(1, (16, -1)).clone()
    expected[:, 8:] *= 0.5  # the image latents are the second half of the channels
    torch.testing.assert_close(weights.pop("patch_embed.proj.weight"), expected.flatten(1))
    assert all(torch.equal(weight, base[name]) for name, weight in weights.items())


def test_a_folder_that_the_nodes_do_not_share_is_named(saves, monkeypatch):
    def write(_, file):
        if "00001-of" in file.name:
            file.touch()

    monkeypatch.setattr(Shard, "write", write)
    with pytest.raises(UserError, match=r"^output_dir: rank 1 does not see what rank 1 wrote"):
        saves.save(1)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_found_and_the_checkpoint_before_is_used(saves, damage):
    saves.save(1)
    saves.save(2)
    shard = saves.folder / "checkpoints/step-000002" / shard_name(1, NUM_RANKS)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flipped" else content[:-4])
    assert saves.find_step() == 1


@pytest.mark.slow
def test_a_save_killed_before_each_change_on_the_disk(tmp_path, tiny_model):
    """The n-th change, for each n: opening, renaming, linking or removing a file, or creating a folder."""
    changes = []
    for number in range(1, 1000):
        saves = Saves(tmp_path / str(number), tiny_model)
        saves.save(3)
        reader, writer = os.pipe()

        def save_until_killed(number=number, saves=saves, pipe=writer):
            remaining = itertools.count(number - 1, -1)

            def hook(event, arguments):
                is_change = event == "open" or (
                    event.startswith(("os.", "shutil.")) and event not in ("os.scandir", "os.listdir")
                )
                is_change = is_change and str(saves.folder) in str(arguments[:2])
                if is_change and next(remaining) == 0:
                    os.write(pipe, f"{event} {arguments[0]}".encode())
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            saves.save(4)
            os._exit(0)

        status = os.waitpid(run_in_fork(save_until_killed), 0)[1]
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            change = pipe.read().decode()
        newest = saves.find_step()
        assert newest in (3, 4), change
        saves.save(5)
        assert saves.find_step() == 5
        for kind in ("checkpoints", "model"):
            left = {path.name for path in (saves.folder / kind).iterdir()} - {"latest"}
            assert left == {"step-000005", checkpoint.step_name(newest)}, change
        if not change:
            assert os.WEXITSTATUS(status) == 0
            break
        changes.append(change)
    text = "\n".join(changes)
    for part in (shard_name(0, NUM_RANKS), shard_name(1, NUM_RANKS), checkpoint.STATE_FILE, "os.rename", "os.symlink"):
        assert part in text, text


@pytest.mark.slow
def test_a_save_killed_at_any_moment(saves):
    """Twenty kills spread over the duration of a save, and more until one came after its end."""
    generator, durations = random.Random(0), []
    for step in (1, 2):
        start = time.monotonic()
        saves.save(step)
        durations.append(time.monotonic() - start)
    last, is_complete = 2, []
    while len(is_complete) < NUM_KILLS or set(is_complete) != {True, False}:
        assert len(is_complete) < MAX_KILLS
        reader, writer = os.pipe()

        def save_next(step=last + 1, pipe=writer):
            os.write(pipe, b"s")
            saves.save(step)
            time.sleep(60)  # until it is killed

        process = run_in_fork(save_next)
        os.read(reader, 1)
        # Later kills cover a longer time, because a forked process may be slower.
        time.sleep(min(durations) * 1.2 * (len(is_complete) + generator.random()) / NUM_KILLS)
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
        os.close(reader)
        os.close(writer)
        step = saves.find_step()
        assert step in (last, last + 1)
        is_complete.append(step > last)
        last = step
    saves.save(last + 1)
    assert saves.find_step() == last + 1
    assert list(Path(saves.folder).glob("*/*.tmp")) == []
