"""Make a video from an image and a prompt, with the diffusers pipeline and a LoRA."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image

from cogds.core.buckets import assign
from cogds.core.conditioning import image_latent_scale
from cogds.core.geometry import ClipShape, check_shape, latent_frames, padding_frames
from cogds.data.video import DecodeError, probe_image, read_image, write_video
from cogds.errors import UserError
from cogds.model.load import find_model
from cogds.model.lora_file import lora_file, read_metadata

DEFAULT_SIZE, DEFAULT_FPS = ClipShape(81, 768, 1360), 16.0  # what CogVideoX-1.5 was trained for
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> None:
    """Parse, check, sample, write. What can be wrong is said before the weights are loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or diffusers folder of the base model")
    parser.add_argument("--lora", help="LoRA file, or the folder that holds it")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="strength of the LoRA; 1 is as it was trained")
    parser.add_argument("--image", required=True, help="the first frame; resized to cover the size, then cropped")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", default="sample.mp4", help="the mp4 to write")
    parser.add_argument("--size", help="FRAMESxHEIGHTxWIDTH in pixels; default: the LoRA's bucket that fits the image")
    parser.add_argument("--fps", type=float, help="frame rate of the mp4; default: what the LoRA was trained with")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=6.0, help="classifier-free guidance; 1 turns it off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the part that runs (slower)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    model = find_model(args.model)
    metadata = read_metadata(args.lora) if args.lora else {}
    fps = args.fps or metadata.get("fps", DEFAULT_FPS)
    try:
        shape = ClipShape.parse(args.size) if args.size else trained_size(args.image, metadata)
        check_shape(shape, model.geometry)
        pixels = read_image(args.image, shape.height, shape.width)
    except DecodeError as error:
        raise UserError(f"--image {args.image}: {error}") from None

    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(
        model.path, dtype=DTYPES[args.precision], use_safetensors=True
    )
    if args.lora:
        pipeline.load_lora_weights(lora_file(args.lora), adapter_name="lora", use_safetensors=True)
        pipeline.set_adapters("lora", args.lora_scale)
    convention = metadata.get("image_latents", "pipeline")
    if use_convention(pipeline, convention) != 1.0:
        print(f"this LoRA was trained with image latents '{convention}', not as diffusers makes them: followed here")
    if args.offload:
        pipeline.enable_model_cpu_offload()
    elif torch.cuda.is_available():
        pipeline.to("cuda")
    latents = pipeline(
        image=Image.fromarray(pixels),
        prompt=args.prompt,
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        max_sequence_length=model.geometry.text_tokens,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="latent",
    ).frames
    # Tiles for decoding only, which needs the memory: the image was encoded whole, as in training.
    pipeline.vae.enable_tiling()
    padding = padding_frames(latent_frames(shape.frames, model.geometry), model.geometry.patch_size_t)
    decoded = pipeline.decode_latents(latents[:, padding:])
    video = pipeline.video_processor.postprocess_video(decoded, output_type="pt")[0]
    # Where the number of latents is even, the VAE makes 4 frames of the first one instead of 1: the last one is it.
    video = video[-shape.frames :]
    frames = (video.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    write_video(args.output, frames, fps)
    print(f"{len(frames)} frames of {shape.height}x{shape.width} at {fps:g} fps: {args.output}")


def trained_size(image: str, metadata: Mapping[str, Any]) -> ClipShape:
    """The bucket that the LoRA was trained in and that crops the image least; the model's own size without one."""
    buckets = [ClipShape.parse(text) for text in metadata.get("buckets", [])] or [DEFAULT_SIZE]
    info = probe_image(image)
    videos = [shape for shape in buckets if shape.frames > 1] or buckets
    chosen = assign(max(shape.frames for shape in videos), info.height, info.width, videos)
    return videos[chosen or 0]


def use_convention(pipeline: Any, convention: str) -> float:
    """Let the pipeline scale image latents as a LoRA was trained; returns the factor on what it does by itself."""
    vae = pipeline.vae.config
    wanted, own = (
        image_latent_scale(vae.scaling_factor, vae.invert_scale_latents, name) for name in (convention, "pipeline")
    )
    factor, prepare_latents = wanted / own, pipeline.prepare_latents
    if factor != 1.0:

        def prepare_rescaled(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            latents, image_latents = prepare_latents(*args, **kwargs)
            return latents, image_latents * factor

        pipeline.prepare_latents = prepare_rescaled
    return factor
