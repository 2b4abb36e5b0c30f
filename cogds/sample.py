"""Make videos from images and prompts, with the diffusers pipeline and LoRAs."""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogds.core.geometry import TRAINED_FPS, TRAINED_SIZE, ClipShape
from cogds.data.video import write_video
from cogds.errors import UserError, refuse_to_run
from cogds.files import whole_file
from cogds.model.convert import check_all_fit, check_scale, load_adapter
from cogds.model.load import DTYPES, ModelFolder, TextEncoder, find_model
from cogds.model.lora import add_lora
from cogds.model.lora_file import LoraFile, describe_lora, read_loras
from cogds.model.pipeline import decode_frames, load_pipeline, num_calls, sample_latents, use_convention
from cogds.videos.mosaic import evenly, grid, labelled, shrunk
from cogds.videos.prompts import find_requests
from cogds.videos.scene import Scene, first_frame, slug

NO_PROMPT = ""
CELL_WIDTH = 480  # pixels of a video in a grid
STRIP_FRAMES, STRIP_WIDTH = 6, 160  # frames of a strip, pixels of each


@dataclass(frozen=True)
class Lora:
    """A LoRA and its weight beside others."""

    file: LoraFile
    weight: float


def main(argv: list[str] | None = None) -> None:
    """Parse, check, sample, write. What can be wrong is said before the weights are loaded."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    _check_numbers(args)
    model = find_model(args.model)
    loras = find_loras(args.lora or [], args.lora_alpha, model)
    for lora in loras:
        print("\n".join(describe_lora(lora.file, "--lora-alpha")), file=sys.stderr)
    requests = find_requests(args.prompt or [], args.image or [], args.list)
    fps = args.fps or float(agreed(loras, "fps", TRAINED_FPS))
    buckets = trained_buckets(agreed(loras, "buckets", []))
    frames_and_shapes = [first_frame(one.image, one.size or args.size, buckets, model.geometry) for one in requests]
    scales = list(dict.fromkeys(args.lora_scale)) if loras else [1.0]
    seeds = [[one.seed] if one.seed is not None else list(dict.fromkeys(args.seed)) for one in requests]
    single = len(scales) * sum(map(len, seeds)) == 1
    folder = Path(args.output).parent if single else Path(args.output).with_suffix("")
    _check_writable(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.offload and device.type == "cpu":
        raise UserError("--offload is for a GPU, and there is none here: leave it out")

    dtype = DTYPES[args.precision]
    prompts = dict.fromkeys([NO_PROMPT, *(one.prompt for one in requests)])
    states = encode_prompts(model, list(prompts), dtype, "cpu" if args.offload == "sequential" else device)
    pipeline = load_pipeline(model, dtype)
    num_calls(pipeline, args.steps)  # refuses more than there are
    for number, lora in enumerate(loras):
        add_lora(pipeline.transformer, load_adapter(lora.file), f"lora{number}")
    convention = agreed(loras, "image_latents", "pipeline", silent="pipeline")
    if use_convention(pipeline, convention) != 1.0:
        print(f"this LoRA was trained with image latents '{convention}', not as diffusers makes them: followed here")
    if args.offload == "sequential":
        pipeline.enable_sequential_cpu_offload()
    elif args.offload == "model":
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.to(device)

    def film(scene: Scene, scale: float) -> torch.Tensor:
        if loras:
            pipeline.set_adapters([f"lora{n}" for n in range(len(loras))], [scale * lora.weight for lora in loras])
        latents = sample_latents(
            pipeline, scene.pixels, scene.states, states[NO_PROMPT], scene.shape, args.steps, args.guidance, scene.seed
        )
        return decode_frames(pipeline, latents, scene.shape)

    def write(path: Any, frames: torch.Tensor) -> None:
        write_video(path, frames, fps)
        print(f"{len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} at {fps:g} fps: {path}", flush=True)

    for number, (request, (shape, pixels), own_seeds) in enumerate(zip(requests, frames_and_shapes, seeds), 1):
        stem = f"{number:02d}-{slug(request.prompt)}"
        cells: list[list[tuple[str, np.ndarray]]] = []
        for seed in own_seeds:
            cells.append([])
            for scale in scales:
                frames = film(Scene(request.prompt, shape, seed, pixels, states[request.prompt]), scale)
                if single:
                    return write(args.output, frames)
                label = f"seed {seed}" + (f", scale {scale:g}" if loras else "")
                write(folder / f"{stem}-{label.replace(', ', '-').replace(' ', '')}.mp4", frames)
                cells[-1].append((label, shrunk(frames.numpy(), CELL_WIDTH)))
        if len(own_seeds) * len(scales) > 1:
            _write_grid(folder / f"{stem}-grid", cells, fps)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="hub id or diffusers folder of the base model")
    add(
        "--lora",
        action="append",
        nargs="+",
        metavar=("LORA", "WEIGHT"),
        help="LoRA file, or the folder that holds it, and its weight, 1 by default; may be given several times",
    )
    add(
        "--lora-scale",
        type=float,
        nargs="+",
        default=[1.0],
        help="strength of the LoRAs; 1 is as they were trained; several make a video each, and a grid of them",
    )
    add("--lora-alpha", type=float, metavar="ALPHA", help="for LoRAs whose file names none; default: their rank")
    add("--image", action="append", help="the first frame; resized to cover the size, then cropped; may be repeated")
    add("--prompt", action="append", help="what the video shows; may be repeated, with as many images or one for all")
    add(
        "--list",
        metavar="FILE",
        help="instead: a .csv or .jsonl file with prompt, image, size and seed, or a text file with a prompt a line",
    )
    add("--output", default="sample.mp4", help="the mp4 to write; of several videos, the folder (without .mp4)")
    add("--size", help="FRAMESxHEIGHTxWIDTH in pixels; default: the LoRA's bucket that fits the image")
    add("--fps", type=float, help="frame rate of the mp4; default: what the LoRA was trained with")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--guidance", type=float, default=6.0, help="classifier-free guidance; 1 turns it off")
    add("--seed", type=int, nargs="+", default=[0], help="seed of the noise; several make a video each, and a grid")
    add("--precision", choices=DTYPES, default="bf16" if torch.cuda.is_available() else "fp32")
    add(
        "--offload",
        nargs="?",
        const="model",
        choices=("model", "sequential"),
        help="keep on the GPU only the part that runs (model; slower), or only the layer (sequential; much slower)",
    )
    return parser


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that would end in a traceback or in a video of nothing."""
    positive = {"--steps": args.steps, "--fps": 1.0 if args.fps is None else args.fps}
    for flag, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{flag}: {value:g} is not a positive number. Pass one.")
    for flag, values in {"--guidance": [args.guidance], "--lora-scale": args.lora_scale}.items():
        for value in values:
            check_scale(value, flag)


def find_loras(given: Sequence[Sequence[str]], alpha: float | None, model: ModelFolder) -> list[Lora]:
    """The LoRAs of the command line, each a path and maybe a weight. Raises UserError where one does not fit."""
    numbers = []
    for path, *weights in given:
        try:
            numbers.append(float(*weights) if weights else 1.0)
        except (TypeError, ValueError):
            raise UserError(
                f"--lora {path} {' '.join(weights)}: after the LoRA one number may stand, its weight; another LoRA "
                "needs a --lora of its own"
            ) from None
    for number in numbers:
        check_scale(number, "--lora")
    files = read_loras([path for path, *_ in given], alpha, "--lora-alpha")
    check_all_fit(files, model)
    return [Lora(file, weight) for file, weight in zip(files, numbers, strict=True)]


def agreed(loras: Sequence[Lora], name: str, default: Any, silent: Any = None) -> Any:
    """What the LoRAs' trainer recorded under a name: the first one's that says it. Others that differ are told of.

    silent: what a LoRA that does not say it was trained with all the same; None: nobody knows.
    """
    files = [lora.file for lora in loras]
    said = [
        (file.path, file.metadata.get(name, silent)) for file in files if name in file.metadata or silent is not None
    ]
    for file, value in said[1:]:
        if value != said[0][1]:
            print(
                f"warning: {said[0][0]} was trained with {name} {_text(said[0][1])}, {file} with {_text(value)}: the "
                "first one is followed",
                file=sys.stderr,
            )
    return said[0][1] if said else default


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def trained_buckets(texts: Sequence[str]) -> list[ClipShape]:
    """The buckets that a LoRA was trained in; the model's own size where it does not say."""
    return [ClipShape.parse(text) for text in texts] or [TRAINED_SIZE]


@torch.no_grad()
def encode_prompts(
    model: ModelFolder, prompts: Sequence[str], dtype: torch.dtype, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """T5's states of each prompt, on the CPU. T5 is gone before the transformer comes: together they need 21 GB."""
    encoder = TextEncoder(model, dtype, device)
    states = {prompt: encoder.encode(prompt).cpu() for prompt in prompts}
    del encoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return states


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--output: cannot write into {folder} ({reason}): choose another place") from None


def _write_grid(stem: Path, cells: Sequence[Sequence[tuple[str, np.ndarray]]], fps: float) -> None:
    """All videos of one prompt as one, seeds below one another and scales beside one another, and as a picture."""
    write_video(f"{stem}.mp4", grid([[labelled(video, label) for label, video in row] for row in cells]), fps)
    strips = [
        [labelled(grid([[frame[None] for frame in evenly(shrunk(video, STRIP_WIDTH), STRIP_FRAMES)]]), label)]
        for row in cells
        for label, video in row
    ]
    with whole_file(f"{stem}.png") as partial:
        Image.fromarray(grid(strips)[0]).save(partial)
    print(f"beside one another: {stem}.mp4 and {stem}.png", flush=True)


if __name__ == "__main__":
    refuse_to_run("cogds.sample", "sample")
