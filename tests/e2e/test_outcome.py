"""Training changes the generated videos as it should: judged in the pixels that diffusers' own pipeline makes.

Each fault that the planted bugs put into conditioning, export or training makes these tests fail.
"""

import pytest

from cogds.model.load import SHAPES_MODEL, find_model
from cogds.model.pipelines import load_whole_pipeline
from cogds.shapes.clips import DEMO_MOTION, unseen_scenes, write_clips
from cogds.shapes.generation import generate, judge_all
from cogds.shapes.judge import psnr, summarize
from cogds.shapes.world import SIZES, Numbers, random_scene

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS = 120
SCENES = unseen_scenes(24, SIZES[:1], [DEMO_MOTION])


@pytest.fixture(scope="module")
def train(tmp_path_factory, run_train):
    """`train(ranks)`: the LoRA of a run with eight clips per step, however many ranks share them."""
    folder = tmp_path_factory.mktemp("outcome")
    numbers = Numbers(0)
    write_clips(folder / "clips", [random_scene(numbers, SIZES[0], [DEMO_MOTION]) for _ in range(8)])

    def run(ranks):
        run_train(
            "--config", "launch/configs/demo.yaml", "--deepspeed", "ds_configs/zero2.json",
            "data.draw_demo_clips=false", f"data.path={folder / 'clips'}", f"data.cache_dir={folder / 'cache'}",
            "data.buckets=[17x48x48]", f"output_dir={folder / str(ranks)}", f"train.num_steps={STEPS}",
            f"train.batch_size={8 // ranks}", "eval.every=null", f"checkpoint.every={STEPS}", "data.num_workers=0",
            # Without its alpha, it would have a 16th of its strength.
            "lora.rank=16", "lora.alpha=256", "optimizer.lr=5e-4", launcher="warm", ranks=ranks, timeout_s=600,
        )  # fmt: skip
        return folder / f"{ranks}/lora/step-{STEPS:06d}"

    return run


@pytest.fixture(scope="module")
def videos(train):
    """`videos(name)`: videos by the base model ("base"), or by the LoRA of a number of ranks, made once."""
    made = {}

    def make(name):
        if name not in made:
            pipeline = load_whole_pipeline(find_model(SHAPES_MODEL))
            if name != "base":
                pipeline.load_lora_weights(train(name))
            made[name] = generate(pipeline, SCENES)
        return made[name]

    return make


def test_the_shape_moves_as_in_the_clips_and_the_first_frame_stays(videos):
    before, after = (summarize(judge_all(videos(name), SCENES)) for name in ("base", 2))
    print({name: (round(before[name].mean, 2), round(after[name].mean, 2)) for name in before})
    assert before["motion_seen"].mean < 0.2
    assert after["motion_seen"].mean > 0.5
    assert after["path_error"].mean < before["path_error"].mean / 2
    assert after["first_frame_psnr"].mean > before["first_frame_psnr"].mean - 1.5
    assert after["clip_psnr"].mean > before["clip_psnr"].mean + 2
    assert after["color_seen"].mean > 0.9


def test_the_number_of_ranks_does_not_change_the_videos(videos):
    agreement = [psnr(first, second) for first, second in zip(videos(1), videos(2))]
    changes = [psnr(first, second) for first, second in zip(videos("base"), videos(2))]
    print(f"between 1 and 2 ranks {min(agreement):.1f} dB, between base and LoRA {max(changes):.1f} dB")
    assert min(agreement) > 40
    assert max(changes) < 30
