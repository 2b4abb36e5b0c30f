"""The model that comes with cogds: as its recipe made it, small, and trained."""

import hashlib
import json

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogds.model.load import SHAPES_MODEL, find_model
from cogds.model.pipelines import load_whole_pipeline
from cogds.shapes.clips import unseen_scenes
from cogds.shapes.generation import generate, judge_all
from cogds.shapes.judge import psnr, summarize
from cogds.shapes.world import MOTIONS, SIZES
from tests.conftest import ROOT

FOLDER = ROOT / "cogds/shapes/model"


def test_the_weights_are_those_that_the_recipe_made():
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    assert {"command", "commit", "seed", "license"} <= recipe.keys()
    weights = sorted(FOLDER.glob("*/*.safetensors"))
    assert recipe["sha256"] == {
        str(file.relative_to(FOLDER)): hashlib.sha256(file.read_bytes()).hexdigest() for file in weights
    }
    assert not [file for file in FOLDER.rglob("*.json") if "_name_or_path" in file.read_text()]  # a path of a machine
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 7e6


def test_it_is_found_without_a_download():
    model = find_model(SHAPES_MODEL)
    assert model.path == FOLDER
    assert (model.family.has_ofs, model.family.positions, model.family.patch_size_t) == (True, "rope_slice", 2)


def test_the_vae_redraws_unseen_clips():
    """Otherwise shapes and colors could not be judged."""
    vae = AutoencoderKLCogVideoX.from_pretrained(FOLDER, subfolder="vae", torch_dtype=torch.float32).eval()
    whole, first = [], []
    for scene in unseen_scenes(6, SIZES, ["circle"]):
        clip = scene.draw()
        with torch.no_grad():
            for part, values in ((clip, whole), (clip[:1], first)):
                video = (part * 2 - 1).transpose(0, 1)[None]
                decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample[0].transpose(0, 1)
                values.append(psnr((decoded.clamp(-1, 1) + 1) / 2, part))
    assert sum(whole) / 6 > 31
    assert sum(first) / 6 > 33


@pytest.mark.slow
def test_unseen_clips_move_as_their_captions_say():
    scenes = unseen_scenes(96, SIZES, list(MOTIONS))
    videos = generate(load_whole_pipeline(find_model(SHAPES_MODEL)), scenes)
    summary = summarize(judge_all(videos, scenes))
    assert summary["motion_seen"].mean > 0.93
    assert summary["shape_seen"].mean > 0.9
    assert summary["color_seen"].mean > 0.97
    assert summary["path_error"].mean < 1.5
