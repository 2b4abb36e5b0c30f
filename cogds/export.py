"""Export a LoRA for diffusers or ComfyUI, or merged into full weights; write a model card; upload to the hub."""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cogds.card import CARD_NAME, MERGED, SAMPLE_NAME, find_sample, hub_id, model_card, pipeline_factor, shareable
from cogds.errors import UserError, refuse_to_run
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
from cogds.model.merge import (
    check_comfyui_supports,
    other_files,
    save_comfyui_merged,
    save_merged,
    save_other_parts,
    weights_of,
)

FORMATS = ("diffusers", "comfyui", "comfyui-wrapper", *MERGED)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPARE_BYTES = 64e6  # disk space that an export leaves free
WEAKENED_NAMES = ("orbit", "dimensionx")  # the wrapper weakens fused LoRAs whose path contains one of these


@dataclass(frozen=True)
class Given:
    """One LoRA of the command line, its header read, and its weight."""

    file: LoraFile
    weight: float


def main(argv: list[str] | None = None, api: Any = None) -> None:
    """Run the command: check everything first, then write the folder, then upload it.

    api: A stand-in for the hub's `HfApi`.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    output = Path(args.output)
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: already exists. Choose a new folder, or remove this one.")
    check_scale(args.scale)
    given = parse_loras(args.lora, args.scale, args.lora_alpha)
    if len(given) > 1 and args.to not in MERGED:
        raise UserError(
            f"--to {args.to}: takes one LoRA, but {len(given)} were given. Export them one by one, or merge them with "
            f"--to {' or '.join(MERGED)}."
        )
    if args.to not in MERGED and given[0].weight == 0:
        raise UserError(f"{given[0].file.path}: strength 0 does nothing with --to {args.to}. Pass another number.")
    model = base_model(args.model, given, needed=args.to in MERGED)
    if model:
        check_all_fit([one.file for one in given], model)
        if args.to == "comfyui-merged":
            check_comfyui_supports(model)
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
        raise UserError(f"--sample {sample}: no such file. Give a video, or omit --sample.")
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
        print(f"Uploading these files to {args.push_to} ({'public' if args.public else 'private'}).")
        print(f"Uploaded: {push(output, args.push_to, args.public, api)}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "lora",
        nargs="+",
        metavar="LORA",
        help="LoRA file or folder, optionally followed by a weight; several for the merged formats",
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="output format")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="new folder; its name becomes the name of the export"
    )
    parser.add_argument("--model", help="hub id or folder of the base model; default: the model it was trained on")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the trained strength; default: 1")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights; default: the LoRA's, or the model's if merged"
    )
    parser.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="alpha of LoRAs whose file has none; default: their rank"
    )
    parser.add_argument(
        "--pipeline",
        choices=("link", "copy"),
        help="with --to merged: write a whole pipeline folder, with links to or copies of the model's other parts",
    )
    parser.add_argument("--sample", metavar="MP4", help="video for the model card; default: one that the run generated")
    parser.add_argument("--push-to", metavar="OWNER/NAME", help="private hub repository to upload the folder to")
    parser.add_argument("--public", action="store_true", help="make the --push-to repository public")
    args = parser.parse_args(argv)
    if args.pipeline and args.to != "merged":
        raise UserError(f"--pipeline {args.pipeline}: not available with --to {args.to}. Use --to merged.")
    if args.public and not args.push_to:
        raise UserError("--public: nothing is uploaded without --push-to. Add --push-to OWNER/NAME.")
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
            check_scale(number, given[-1][0])
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
    """Collect the facts for the header and the model card; if several LoRAs are given, from the first one.

    Raises:
        UserError: The LoRAs differ in their image-latent convention.
    """
    conventions = {one.file.metadata.get("image_latents", "pipeline") for one in given}
    if len(conventions) > 1:
        raise UserError(
            f"{given[0].file.path}: the LoRAs were trained with different image latents "
            f"({', '.join(sorted(conventions))}), and a model takes only one kind. Merge LoRAs of the same kind."
        )
    convention = next(iter(conventions))
    facts = dict(given[0].file.metadata)
    if model:
        facts["image_latent_factor"] = pipeline_factor(model.vae_config, convention)
        # ComfyUI and the wrapper multiply image latents by the scaling factor, whatever the VAE's config says.
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
    """Size of the export in bytes."""
    if kind not in MERGED or model is None:
        size = sum(one.file.path.stat().st_size for one in given)
        return size * 2 if dtype is torch.float32 else size
    others = sum(path.stat().st_size for path in other_files(model)) if pipeline == "copy" else 0
    return sum(weight.num_bytes for weight in weights_of(model, dtype)) + others


def check_space(output: Path, needed: float) -> None:
    """Raise UserError if the disk of `output` lacks space for `needed` bytes."""
    folder = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"--output {output}: its disk has {free / 1e9:.2f} GB free, but the export needs "
            f"{(needed + SPARE_BYTES) / 1e9:.2f} GB. Free space, or choose another --output."
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
    """Write the weights into the folder; return the name of the file, or of the folder "transformer"."""
    file = folder / f"{name}.safetensors"
    if kind in MERGED:
        assert model is not None
        loras = [(one.file, one.weight) for one in given]
        # The image-latent factor moves into the weights, so the header states what the result expects instead.
        header = {**facts, "trained_image_latents": facts.get("image_latents", "pipeline")}
        factor, comfyui_factor = header.pop("image_latent_factor"), header.pop("comfyui_strength")
        if kind == "comfyui-merged":
            header["image_latents"] = "scaled"
            save_comfyui_merged(file, model, weights_of(model, dtype), loras, header, comfyui_factor)
            return file.name
        header["image_latents"] = "pipeline"
        save_merged(folder / "transformer", model, weights_of(model, dtype), loras, header, factor)
        if pipeline:
            save_other_parts(folder, model, copy=pipeline == "copy")
        return "transformer"
    adapter = load_adapter(given[0].file, given[0].weight, dtype)
    if kind == "diffusers":
        return save_diffusers(adapter, folder).name
    (save_comfyui if kind == "comfyui" else save_comfyui_wrapper)(adapter, file)
    return file.name


def notes(facts: Mapping[str, Any], kind: str, output: Path, checked: bool) -> list[str]:
    """Lines printed after the export: what its users must know."""
    lines = []
    convention, factor = facts.get("image_latents", "pipeline"), facts.get("image_latent_factor")
    trained = f"the LoRA was trained with image latents '{convention}'"
    if not checked:
        lines.append("The LoRA was not compared with a base model. Pass --model to check that it fits.")
    if kind == "merged" and factor != 1.0:
        lines.append(f"Note: {trained}. The weights include the factor, so diffusers needs no extra code.")
    elif kind == "comfyui-merged" and convention != "scaled":
        lines.append(f"Note: {trained}. The weights include the factor, so ComfyUI's nodes need no setting.")
    elif kind == "diffusers" and convention != "pipeline":
        lines.append(
            f"warning: {trained}, which other tools ignore. launch/sample.py and the model card's code apply them; "
            "--to merged puts them into the weights."
        )
    elif kind.startswith("comfyui") and convention != "scaled":
        if kind == "comfyui":
            fix = "Use it with the base model that --to comfyui-merged --scale 0 exports, which corrects this."
        elif "comfyui_strength" in facts:
            fix = f"Set the strength of CogVideo ImageEncode to {facts['comfyui_strength']:.3g}."
        else:
            fix = "Pass --model to see which strength of CogVideo ImageEncode corrects this."
        lines.append(f"warning: {trained}, but ComfyUI's nodes always use 'scaled'. {fix}")
    if kind == "comfyui-wrapper" and (words := [word for word in WEAKENED_NAMES if word in str(output).lower()]):
        lines.append(f"warning: the wrapper weakens fused LoRAs with '{words[0]}' in their path. Rename the file.")
    if facts.get("base_model") and not hub_id(facts["base_model"]):
        lines.append(f"The model card names no base model on the hub: {facts['base_model']} is a local folder.")
    return lines


if __name__ == "__main__":
    refuse_to_run("cogds.export", "export")
