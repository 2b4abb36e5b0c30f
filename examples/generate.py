#!/usr/bin/env python
"""A video from a prompt, a first frame and a LoRA, with diffusers alone: take what you need into your own program.

python examples/generate.py --lora outputs/cogvideox1.5_i2v_lora/lora/step-001000 --image first.png --prompt "..."

For a text-to-video model, pass --model and leave --image out.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from diffusers import CogVideoXImageToVideoPipeline, DiffusionPipeline
from diffusers.utils import encode_video, load_image
from PIL import Image
from safetensors import safe_open


def trained_with(lora: Path) -> dict:
    """What training recorded in the LoRA's header: sizes, frame rate, how image latents were scaled."""
    file = lora / "pytorch_lora_weights.safetensors" if lora.is_dir() else lora
    with safe_open(file, "pt") as tensors:
        return json.loads((tensors.metadata() or {}).get("cogds", "{}"))


def best_size(sizes: list[str], image: Image.Image | None) -> str:
    """Return the trained size FRAMESxHEIGHTxWIDTH whose proportions are closest to the image's."""

    def misfit(size: str) -> tuple[float, int, int]:
        frames, height, width = map(int, size.split("x"))
        # Of several sizes with the same proportions, and without an image, the longest, then the largest.
        crop = abs(math.log(width / height * image.height / image.width)) if image else 0.0
        return crop, -frames, -height * width

    videos = [size for size in sizes if not size.startswith("1x")]
    return min(videos, key=misfit, default="81x768x1360")  # the base model's own size


def scale_image_latents(pipe: CogVideoXImageToVideoPipeline, factor: float) -> None:
    """Let the pipeline multiply the first frame's latents by this as well, for a LoRA that was trained so."""
    prepare = pipe.prepare_latents

    def prepare_latents(*args, **kwargs):
        latents, image_latents = prepare(*args, **kwargs)
        return latents, image_latents * factor

    pipe.prepare_latents = prepare_latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zai-org/CogVideoX1.5-5B-I2V", help="hub id or folder of the base model")
    parser.add_argument("--lora", type=Path, required=True, help="LoRA file, or the folder that holds it")
    parser.add_argument("--strength", type=float, default=1.0, help="1 is as it was trained, 0 is the base model")
    parser.add_argument("--image", help="the first frame, path or address; resized to --size; not for text-to-video")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", default="video.mp4")
    parser.add_argument("--size", help="FRAMESxHEIGHTxWIDTH (the trained size that fits the image best)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # its class is that of the model: image-to-video or text-to-video
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16, use_safetensors=True)
    has_image = isinstance(pipe, CogVideoXImageToVideoPipeline)
    if has_image != bool(args.image):
        parser.error("this model needs --image" if has_image else "this model takes no --image")
    # rank and alpha stand in the file, so that 1 is the strength it was trained with
    pipe.load_lora_weights(args.lora, adapter_name="mine", use_safetensors=True)
    pipe.set_adapters("mine", args.strength)
    facts = trained_with(args.lora)
    if (factor := facts.get("image_latent_factor", 1.0)) != 1.0:
        scale_image_latents(pipe, factor)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()  # or pipe.to("cuda"), where the whole model fits
    pipe.vae.enable_tiling()

    image = load_image(args.image) if has_image else None
    size = args.size or best_size(facts.get("buckets", []), image)
    frames, height, width = map(int, size.split("x"))
    video = pipe(
        **({"image": image} if has_image else {}),
        prompt=args.prompt,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=args.steps,
        # the pipeline's own default is not the length that the model was trained with
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(args.seed),
    ).frames[0]
    encode_video(video, fps=round(facts.get("fps", 16)), output_path=args.output)
    print(f"{len(video)} frames of {height}x{width}: {args.output}")


if __name__ == "__main__":
    main()
