"""A LoRA for other tools: diffusers, ComfyUI, or merged into full weights; with a model card, and onto the hub."""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cogds.card import CARD_NAME, SAMPLE_NAME, find_sample, hub_id, model_card, pipeline_factor, shareable
from cogds.core.conditioning import IMAGE_LATENT_CONVENTIONS
from cogds.errors import UserError
from cogds.files import whole_folder
from cogds.model.convert import (
    check_all_fit,
    check_scale,
    load_adapter,
    save_comfyui,
    save_comfyui_wrapper,
    save_diffusers,
)
from cogds.model.hub import check_repo, listed, push
from cogds.model.load import ModelFolder, find_model
from cogds.model.lora_file import LoraFile, describe_lora, read_loras
from cogds.model.merge import other_files, save_merged, save_other_parts, weights_of

FORMATS = ("diffusers", "comfyui", "comfyui-wrapper", "merged")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPARE_BYTES = 64e6  # left free beside what is written
WEAKENED_NAMES = ("orbit", "dimensionx")  # by the wrapper, where it fuses LoRAs of such names


@dataclass(frozen=True)
class Given:
    """One LoRA of the command line, its header read, and its weight."""

    file: LoraFile
    weight: float


def main(argv: list[str] | None = None, api: Any = None) -> None:
    """Parse, check, write, push. What can be wrong is said before anything is written.

    api: stands in for the hub.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    output = Path(args.output)
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output} is there already: give a folder that is not, or remove it")
    check_scale(args.scale)
    given = parse_loras(args.lora, args.scale, args.lora_alpha)
    if len(given) > 1 and args.to != "merged":
        raise UserError(f"{len(given)} LoRAs were given, which only --to merged makes one of: export them one by one")
    model = base_model(args.model, given, needed=args.to == "merged")
    if model:
        check_all_fit([one.file for one in given], model)
    for one in given:
        print("\n".join(describe_lora(one.file, "--lora-alpha")), file=sys.stderr)
    if args.push_to:
        given = [replace(one, file=replace(one.file, metadata=shareable(one.file.metadata))) for one in given]
    facts = facts_of(given, model)
    if args.push_to:
        facts = shareable(facts)
        check_repo(args.push_to, args.public, api)
    dtype = DTYPES.get(args.dtype)
    sample = Path(args.sample) if args.sample else find_sample(Path(args.lora[0]))
    if sample and not sample.is_file():
        raise UserError(f"--sample {sample} is not there: give a video, or leave it out")
    check_space(
        output, num_bytes(given, model, args.to, dtype, args.pipeline) + (sample.stat().st_size if sample else 0)
    )

    with whole_folder(output) as partial:
        file = write(partial, args.to, output.name, given, model, facts, dtype, args.pipeline)
        if sample:
            shutil.copyfile(sample, partial / SAMPLE_NAME)
        where = args.push_to or str(output)
        card = model_card(output.name, facts, args.to, where, file, SAMPLE_NAME if sample else "")
        (partial / CARD_NAME).write_text(card, encoding="utf-8")
    print("\n".join([f"{args.to}: {output}", *listed(output), *notes(facts, args.to, output, bool(model))]))
    if args.push_to:
        print(f"uploading these files to {args.push_to}, {'public' if args.public else 'private'}")
        print(f"on the hub: {push(output, args.push_to, args.public, api)}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "lora", nargs="+", metavar="LORA", help="LoRA file or folder, and maybe a weight after it; several for merged"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder; its name is the LoRA's")
    parser.add_argument("--model", help="hub id or folder of the base model; default: the one it was trained on")
    parser.add_argument("--scale", type=float, default=1.0, help="times its strength; default 1, as it was trained")
    parser.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="for LoRAs whose file names none; default: their rank"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as the LoRA's, merged as the model's")
    parser.add_argument(
        "--pipeline",
        choices=("link", "copy"),
        help="merged only: make a whole pipeline folder, with links to the model's other parts, or copies",
    )
    parser.add_argument("--sample", metavar="MP4", help="a video for the card; default: one that the run made")
    parser.add_argument("--push-to", metavar="OWNER/NAME", help="upload the folder to the hub, as a private repository")
    parser.add_argument("--public", action="store_true", help="let everybody see what --push-to uploads")
    args = parser.parse_args(argv)
    if args.pipeline and args.to != "merged":
        raise UserError(f"--pipeline {args.pipeline} goes with --to merged: a LoRA is no pipeline")
    if args.public and not args.push_to:
        raise UserError("--public goes with --push-to OWNER/NAME")
    return args


def parse_loras(words: Sequence[str], scale: float, alpha: float | None = None) -> list[Given]:
    """`PATH [WEIGHT] PATH [WEIGHT] ...`, the headers read; weights times `scale`.

    Raises UserError where a path is no LoRA, or a weight no number.
    """
    given: list[tuple[str, float]] = []
    for word in words:
        number = None if Path(word).exists() else _number(word)
        if number is None:
            given.append((word, 1.0))
        elif given:
            check_scale(number)
            given[-1] = (given[-1][0], number)
        else:
            raise UserError(f"there is no LoRA at {word}: give its path first, and its weight after it")
    files = read_loras([path for path, _ in given], alpha, "--lora-alpha")
    return [Given(file, scale * weight) for file, (_, weight) in zip(files, given, strict=True)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def base_model(path: str | None, given: Sequence[Given], needed: bool) -> ModelFolder | None:
    """The base model: the one named, else the one that the LoRA was trained on.

    Where it is not needed, only a folder of this machine is looked at: nothing is downloaded to check a LoRA. Raises
    UserError where it is needed and none is known.
    """
    if path:
        return find_model(path)
    trained_on = next((one.file.metadata["base_model"] for one in given if one.file.metadata.get("base_model")), None)
    if trained_on and (needed or Path(trained_on).is_dir()):
        return find_model(trained_on)
    if needed:
        raise UserError(f"{given[0].file.path} does not say what it was trained on: give --model")
    return None


def facts_of(given: Sequence[Given], model: ModelFolder | None) -> dict[str, Any]:
    """What is known of the LoRA, for its header and its card; of several, the first one's.

    Raises UserError for an image-latent convention that is not known, and where several differ in it.
    """
    conventions = {one.file.metadata.get("image_latents", "pipeline"): one for one in given}
    for convention, one in conventions.items():
        if convention not in IMAGE_LATENT_CONVENTIONS:
            raise UserError(
                f"{one.file.path} was trained with image latents '{convention}', which is none of "
                f"{', '.join(IMAGE_LATENT_CONVENTIONS)}: it was made by a newer version of this project"
            )
    if len(conventions) > 1:
        raise UserError(
            f"the LoRAs were trained with different image latents ({', '.join(sorted(conventions))}): one model cannot "
            "be fed both ways; merge those of one kind"
        )
    convention = next(iter(conventions))
    facts = dict(given[0].file.metadata)
    if model:
        facts["image_latent_factor"] = pipeline_factor(model.vae_config, convention)
        # The wrapper's own factor is the scaling factor, whatever the VAE says.
        facts["comfyui_strength"] = facts["image_latent_factor"] / pipeline_factor(model.vae_config, "scaled")
        facts.setdefault("base_model", str(model.path))
    if len(given) > 1:
        facts["merged"] = ", ".join(f"{one.file.path.parent.name} x {one.weight:g}" for one in given)
    elif given[0].weight != 1.0:
        facts["exported_scale"] = given[0].weight * facts.get("exported_scale", 1.0)
    return facts


def num_bytes(
    given: Sequence[Given], model: ModelFolder | None, kind: str, dtype: torch.dtype | None, pipeline: str | None
) -> float:
    """What an export writes."""
    if kind != "merged" or model is None:
        size = sum(one.file.path.stat().st_size for one in given)
        return size * 2 if dtype is torch.float32 else size
    others = sum(path.stat().st_size for path in other_files(model)) if pipeline == "copy" else 0
    return sum(weight.num_bytes for weight in weights_of(model, dtype)) + others


def check_space(output: Path, needed: float) -> None:
    """Raise UserError where the disk has no room: before writing, not in the middle of it."""
    folder = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, and the export takes "
            f"{(needed + SPARE_BYTES) / 1e9:.2f} GB: make room, or choose another --output"
        )


def write(
    folder: Path,
    kind: str,
    name: str,
    given: Sequence[Given],
    model: ModelFolder | None,
    facts: Mapping[str, Any],
    dtype: torch.dtype | None,
    pipeline: str | None,
) -> str:
    """Write the weights into the folder; returns the file's name, or "transformer" where it is a folder."""
    if kind == "merged":
        assert model is not None
        loras = [(one.file, one.weight) for one in given]
        # What the header says is how to feed it: the factor is within the weights from here on.
        header = {**facts, "image_latents": "pipeline", "trained_image_latents": facts.get("image_latents", "pipeline")}
        factor = header.pop("image_latent_factor")
        header.pop("comfyui_strength")
        save_merged(folder / "transformer", model, weights_of(model, dtype), loras, header, factor)
        if pipeline:
            save_other_parts(folder, model, copy=pipeline == "copy")
        return "transformer"
    adapter = load_adapter(given[0].file, given[0].weight, dtype)
    if kind == "diffusers":
        return save_diffusers(adapter, folder).name
    file = folder / f"{name}.safetensors"
    (save_comfyui if kind == "comfyui" else save_comfyui_wrapper)(adapter, file)
    return file.name


def notes(facts: Mapping[str, Any], kind: str, output: Path, checked: bool) -> list[str]:
    """What whoever uses the export has to know, for people."""
    lines = []
    convention, factor = facts.get("image_latents", "pipeline"), facts.get("image_latent_factor")
    if not checked:
        lines.append("not compared with the base model: give --model to see whether the LoRA fits it")
    if kind == "merged" and factor != 1.0:
        lines.append(
            f"it was trained with image latents '{convention}': that is within the weights now, for tools that feed "
            "image latents as diffusers does"
        )
    elif kind == "diffusers" and convention != "pipeline":
        lines.append(
            f"warning: it was trained with image latents '{convention}', which other tools do not know of: "
            "launch/sample.py and the card's snippet follow it, and so does --to merged"
        )
    elif kind.startswith("comfyui") and convention != "scaled":
        lines.append(
            f"warning: it was trained with image latents '{convention}', and ComfyUI's nodes make them 'scaled', "
            "whatever LoRA is loaded"
        )
        if kind == "comfyui-wrapper" and "comfyui_strength" in facts:
            lines[-1] += f": set strength of CogVideo ImageEncode to {facts['comfyui_strength']:.3g}"
    if kind == "comfyui-wrapper" and (words := [word for word in WEAKENED_NAMES if word in str(output).lower()]):
        lines.append(f"warning: the wrapper weakens fused LoRAs with '{words[0]}' in their path: rename the file")
    if facts.get("base_model") and not hub_id(facts["base_model"]):
        lines.append(f"the card names no base model of the hub: it was trained on the folder {facts['base_model']}")
    return lines
