"""Make the shapes model: a tiny CogVideoX-1.5 image-to-video model with trained weights, in diffusers' layout.

    python examples/shapes/make.py outputs/shapes-model

takes about an hour on two CPU cores. The result depends only on the seed, the number of ranks and the kind of machine.
"""

import argparse
import hashlib
import json
import subprocess
import time
from pathlib import Path

import ranks
import text
import torch
import transformer
import vae
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5EncoderModel, T5Tokenizer

STAGES = ("text", "vae", "transformer", "pack")


def main() -> None:
    """Run the stages of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the model is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="processes, one per core")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a quick try")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--image-latents", default="pipeline", help="scale of the image latents that it learns")
    parser.add_argument("--start", help="folder of a transformer to start from")
    args = parser.parse_args()
    folder = Path(args.folder)
    started = time.monotonic()
    if "text" in args.stages:
        write_small_parts(folder, args.seed)
    if "vae" in args.stages:
        ranks.start(vae.train, args.ranks, folder / "vae", args.seed, args.scale)
    if "transformer" in args.stages:
        ranks.start(transformer.train, args.ranks, folder, args.seed, args.scale, args.image_latents, args.start)
    if "pack" in args.stages:
        pack(folder, vars(args), time.monotonic() - started)
    print(f"{folder}: made in {(time.monotonic() - started) / 60:.1f} min")


def write_small_parts(folder: Path, seed: int) -> None:
    """Write the parts that are not trained: tokenizer, text encoder and scheduler."""
    tokenizer = text.create_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    text.create_text_encoder(len(tokenizer), seed).save_pretrained(folder / "text_encoder")
    CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
        set_alpha_to_one=True,
    ).save_pretrained(folder / "scheduler")


def pack(folder: Path, recipe: dict, seconds: float) -> None:
    """Write the whole folder again in fp16, with the index of its parts and the recipe that made it."""
    pipeline = CogVideoXImageToVideoPipeline(
        T5Tokenizer.from_pretrained(folder, subfolder="tokenizer"),
        T5EncoderModel.from_pretrained(folder, subfolder="text_encoder"),
        AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae"),
        CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer"),
        CogVideoXDDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # without the path of this folder
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = sorted(folder.glob("*/*.safetensors"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    (folder / "recipe.json").write_text(
        json.dumps(
            {
                "command": "python examples/shapes/make.py",
                "commit": commit.stdout.strip(),
                "seed": recipe["seed"],
                "ranks": recipe["ranks"],
                "scale": recipe["scale"],
                "stages": recipe["stages"],
                "image_latents": recipe["image_latents"],
                "start": recipe["start"],
                "minutes": round(seconds / 60, 1),
                "torch": torch.__version__,
                "license": "Apache-2.0",
                "sha256": {
                    str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in weights
                },
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
