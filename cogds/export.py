"""Export a LoRA for diffusers or ComfyUI, merged into full weights, or extracted from a fine-tuned model.

Also writes a model card and uploads to the hub.
"""

import argparse
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cogds.arguments import EXTRACTED, MERGED_FORMATS
from cogds.card import (
    CARD_NAME,
    SAMPLE_NAME,
    find_sample,
    hub_id,
    model_card,
    pipeline_factor,
    shareable,
    takes_image,
)
from cogds.core.family import TASKS
from cogds.errors import UserError, refuse_to_run
from cogds.files import existing_parent, whole_folder
from cogds.model.full_export import trained_metadata
from cogds.model.load import ModelFolder, find_model
from cogds.model.lora.convert import (
    check_all_fit,
    check_scale,
    load_adapter,
    refuse_control,
    save_comfyui,
    save_comfyui_wrapper,
    save_diffusers,
)
from cogds.model.lora.extract import extract_lora
from cogds.model.lora.file import WeightedLora, describe_lora, read_loras
from cogds.model.lora.hub import check_repository, list_files, upload_folder
from cogds.model.lora.merge import (
    Merge,
    check_comfyui_supports,
    save_comfyui_merged,
    save_merged,
)
from cogds.model.weight_files import other_files, read_weights, save_other_parts
from cogds.process.logs import RESULT

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPARE_BYTES = 64e6  # disk space that an export leaves free
DEFAULT_RANK = 64
WEAKENED_NAMES = ("orbit", "dimensionx")  # the wrapper weakens fused LoRAs whose path contains one of these


@dataclass(frozen=True)
class ExportJob:
    """A checked export.

    Attributes:
        kind: value of --to.
        model: the base model, None if it is not needed and unknown.
        metadata: for the header and the model card.
        dtype: of the exported weights, None to keep theirs.
        pipeline: value of --pipeline.
    """

    kind: str
    loras: Sequence[WeightedLora]
    model: ModelFolder | None
    metadata: Mapping[str, Any]
    dtype: torch.dtype | None
    pipeline: str | None


def main(args: argparse.Namespace, api: Any = None) -> None:
    """Run the command: check everything first, then write the folder, then upload it.

    api: a stand-in for the hub's `HfApi`.
    """
    if args.pipeline and args.to != "merged":
        raise UserError(f"--pipeline {args.pipeline}: not available with --to {args.to}. Use --to merged.")
    if args.public and not args.push_to:
        raise UserError("--public: nothing is uploaded without --push-to. Add --push-to OWNER/NAME.")
    output = Path(args.output)
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: already exists. Choose a new folder, or remove this one.")
    if args.rank and args.to != EXTRACTED:
        raise UserError(f"--rank {args.rank}: a LoRA keeps its rank with --to {args.to}. Use --to {EXTRACTED}.")
    if args.to == EXTRACTED:
        export_extracted(args, output, api)
        return
    loras = parse_loras(args.lora, args.scale, args.lora_alpha)
    if len(loras) > 1 and args.to not in MERGED_FORMATS:
        raise UserError(
            f"--to {args.to}: takes one LoRA, but {len(loras)} were given. Export them one by one, or merge them with "
            f"--to {' or '.join(MERGED_FORMATS)}."
        )
    if args.to not in MERGED_FORMATS and loras[0].weight == 0:
        raise UserError(f"{loras[0].file.path}: strength 0 does nothing with --to {args.to}. Pass another number.")
    model = base_model(args.model, loras, needed=args.to in MERGED_FORMATS)
    if model:
        check_all_fit([lora.file for lora in loras], model)
        if args.to == "comfyui-merged":
            check_comfyui_supports(model)
    if args.to == "comfyui" and not takes_image(export_metadata(loras, model)):
        raise UserError(
            "--to comfyui: not available for text-to-video, which has not been tried in ComfyUI's own nodes. Use --to "
            "comfyui-wrapper."
        )
    for lora in loras:
        logger.info("\n".join(describe_lora(lora.file, "--lora-alpha")))
    if args.push_to:
        loras = [replace(lora, file=replace(lora.file, metadata=shareable(lora.file.metadata))) for lora in loras]
    refuse_control(args.to != "diffusers" and any(lora.file.control for lora in loras), args.to)
    metadata = export_metadata(loras, model)
    if args.push_to:
        metadata = shareable(metadata)
        check_repository(args.push_to, args.public, api)
    sample = Path(args.sample) if args.sample else find_sample(Path(args.lora[0]))
    if sample and not sample.is_file():
        raise UserError(f"--sample {sample}: no such file. Pass a video, or omit --sample.")
    job = ExportJob(args.to, loras, model, metadata, DTYPES.get(args.dtype), args.pipeline)
    check_space(output, export_bytes(job) + (sample.stat().st_size if sample else 0))

    with whole_folder(output) as partial:
        file = write_weights(job, partial, output.name)
        if sample:
            shutil.copyfile(sample, partial / SAMPLE_NAME)
        location = args.push_to or str(output)
        card = model_card(output.name, metadata, args.to, location, file, SAMPLE_NAME if sample else "")
        (partial / CARD_NAME).write_text(card, encoding="utf-8")
    lines = [f"{args.to}: {output}", *list_files(output), *notes(metadata, args.to, output, bool(model))]
    logger.log(RESULT, "\n".join(lines))
    if args.push_to:
        logger.info("Uploading these files to %s (%s).", args.push_to, "public" if args.public else "private")
        logger.log(RESULT, "Uploaded: %s", upload_folder(output, args.push_to, args.public, api))


def export_extracted(args: argparse.Namespace, output: Path, api: Any) -> None:
    """Extract a LoRA from a fine-tuned model, and write it in diffusers' format."""
    if len(args.lora) > 1 or args.scale != 1.0:
        raise UserError(f"--to {EXTRACTED}: takes one fine-tuned model and no weight or --scale. Pass only its folder.")
    if args.lora_alpha:
        raise UserError(
            f"--lora-alpha {args.lora_alpha:g}: is for LoRA files; --to {EXTRACTED} reads a model. Omit it."
        )
    sample = Path(args.sample) if args.sample else None  # the run's videos are those of the whole model
    if sample and not sample.is_file():
        raise UserError(f"--sample {sample}: no such file. Pass a video, or omit --sample.")
    tuned = find_model(args.lora[0], named=f"--to {EXTRACTED}")
    metadata = trained_metadata(tuned)
    if not args.model and not metadata.get("base_model"):
        raise UserError(f"{tuned.path}: does not record its base model. Pass --model.")
    base = find_model(args.model or metadata["base_model"], named="--model")
    rank, dtype = args.rank or DEFAULT_RANK, DTYPES.get(args.dtype, torch.bfloat16)
    metadata |= {"rank": rank, "alpha": float(rank), "base_model": args.model or metadata["base_model"]}
    if convention := metadata.pop("trained_image_latents", None):
        factor = pipeline_factor(base.vae_config, convention)
        metadata |= {"image_latents": convention, "image_latent_factor": factor}
    if args.push_to:
        metadata = shareable(metadata)
        check_repository(args.push_to, args.public, api)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extraction = extract_lora(base, tuned, rank, dtype, metadata, device)
    worst = max(extraction.layer_errors, key=lambda name: extraction.layer_errors[name])
    lines = [
        f"Rank {rank} on {len(extraction.layer_errors)} layers keeps {1 - extraction.error**2:.1%} of the change of "
        f"the weights (relative error {extraction.error:.3f}; the largest of a layer is "
        f"{extraction.layer_errors[worst]:.3f}, {worst}). "
        f"{extraction.outside:.1%} of the change is in norms, biases and other weights without a LoRA."
    ]
    metadata |= {"extracted_error": round(extraction.error, 4)}
    check_space(output, extraction.num_bytes + (sample.stat().st_size if sample else 0))
    with whole_folder(output) as partial:
        save_diffusers(replace(extraction.adapter, metadata=metadata), partial)
        if sample:
            shutil.copyfile(sample, partial / SAMPLE_NAME)
        location = args.push_to or str(output)
        card = model_card(output.name, metadata, "diffusers", location, sample=SAMPLE_NAME if sample else "")
        (partial / CARD_NAME).write_text(card, encoding="utf-8")
    logger.log(RESULT, "\n".join([f"{EXTRACTED}: {output}", *list_files(output), *lines]))
    if args.push_to:
        logger.log(RESULT, "Uploaded: %s", upload_folder(output, args.push_to, args.public, api))


def parse_loras(words: Sequence[str], scale: float, alpha: float | None = None) -> list[WeightedLora]:
    """Parse `PATH [WEIGHT] PATH [WEIGHT] ...` and read the headers. Weights are multiplied by `scale`.

    Raises UserError if a path is not a LoRA, or a weight comes without a path.
    """
    paths: list[tuple[str, float]] = []
    for word in words:
        number = None if Path(word).exists() else _number(word)
        if number is None:
            paths.append((word, 1.0))
        elif paths:
            check_scale(number, paths[-1][0])
            paths[-1] = (paths[-1][0], number)
        else:
            raise UserError(f"{word}: no such file or folder. Pass a LoRA's path before its weight.")
    files = read_loras([path for path, _ in paths], alpha, "--lora-alpha")
    return [WeightedLora(file, scale * weight) for file, (_, weight) in zip(files, paths, strict=True)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def base_model(path: str | None, loras: Sequence[WeightedLora], needed: bool) -> ModelFolder | None:
    """Find the base model: the given one, or the one that the LoRA was trained on.

    If it is not needed, only a local folder is used, so that nothing is downloaded only to check a LoRA. Raises
    UserError if it is needed and unknown.
    """
    if path:
        return find_model(path, named="--model")
    trained_on = next(filter(None, (lora.file.metadata.get("base_model") for lora in loras)), None)
    if trained_on and (needed or Path(trained_on).is_dir()):
        return find_model(trained_on)
    if needed:
        raise UserError(f"{loras[0].file.path}: does not record its base model. Pass --model.")
    return None


def export_metadata(loras: Sequence[WeightedLora], model: ModelFolder | None) -> dict[str, Any]:
    """Collect the metadata for the header and the model card, from the first LoRA if there are several.

    Raises UserError if the LoRAs differ in their image-latent convention.
    """
    conventions = {lora.file.metadata.get("image_latents", "pipeline") for lora in loras}
    if len(conventions) > 1:
        raise UserError(
            f"{loras[0].file.path}: the LoRAs were trained with different image latents "
            f"({', '.join(sorted(conventions))}), and a model takes only one kind. Merge LoRAs of the same kind."
        )
    convention = next(iter(conventions))
    metadata = dict(loras[0].file.metadata)
    metadata.setdefault("task", model.family.task if model else TASKS[0])
    if model and model.family.takes_image:
        metadata["image_latent_factor"] = pipeline_factor(model.vae_config, convention)
        # ComfyUI and the wrapper multiply image latents by the scaling factor, whatever the VAE's config says.
        metadata["comfyui_strength"] = metadata["image_latent_factor"] / pipeline_factor(model.vae_config, "scaled")
    if model:
        metadata.setdefault("base_model", str(model.path))
    if len(loras) > 1:
        metadata["merged"] = ", ".join(f"{lora.file.path.parent.name} x {lora.weight:g}" for lora in loras)
    elif loras[0].weight != 1.0:
        metadata["exported_scale"] = loras[0].weight * metadata.get("exported_scale", 1.0)
    return metadata


def export_bytes(job: ExportJob) -> float:
    """Return the size of the export."""
    if job.kind not in MERGED_FORMATS or job.model is None:
        size = sum(lora.file.path.stat().st_size for lora in job.loras)
        return size * 2 if job.dtype is torch.float32 else size
    others = sum(path.stat().st_size for path in other_files(job.model)) if job.pipeline == "copy" else 0
    return sum(weight.num_bytes for weight in read_weights(job.model, job.dtype)) + others


def check_space(output: Path, needed: float) -> None:
    """Raise UserError if the disk of `output` lacks space for `needed` bytes."""
    free = shutil.disk_usage(existing_parent(output)).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"--output {output}: its disk has {free / 1e9:.2f} GB free, but the export needs "
            f"{(needed + SPARE_BYTES) / 1e9:.2f} GB. Free space, or choose another --output."
        )


def write_weights(job: ExportJob, folder: Path, name: str) -> str:
    """Write the weights into the folder and return the name of the file, or of the folder, "transformer"."""
    file = folder / f"{name}.safetensors"
    if job.kind in MERGED_FORMATS:
        assert job.model is not None
        # The image-latent factor moves into the weights, so the header states what the result expects instead.
        header, factor, comfyui_factor = dict(job.metadata), 1.0, 1.0
        if job.model.family.takes_image:
            header["trained_image_latents"] = header.get("image_latents", "pipeline")
            factor, comfyui_factor = header.pop("image_latent_factor"), header.pop("comfyui_strength")
            header["image_latents"] = "scaled" if job.kind == "comfyui-merged" else "pipeline"
        if job.kind == "comfyui-merged":
            save_comfyui_merged(file, Merge(job.model, job.loras, job.dtype, comfyui_factor), header)
            return file.name
        save_merged(folder / "transformer", Merge(job.model, job.loras, job.dtype, factor), header)
        if job.pipeline:
            save_other_parts(folder, job.model, copy=job.pipeline == "copy")
        return "transformer"
    adapter = load_adapter(job.loras[0].file, job.loras[0].weight, job.dtype)
    if job.kind == "diffusers":
        return save_diffusers(adapter, folder).name
    (save_comfyui if job.kind == "comfyui" else save_comfyui_wrapper)(adapter, file)
    return file.name


def notes(metadata: Mapping[str, Any], kind: str, output: Path, checked: bool) -> list[str]:
    """Return the notes and warnings that are printed after the export."""
    lines, has_image = [], takes_image(metadata)
    convention, factor = metadata.get("image_latents", "pipeline"), metadata.get("image_latent_factor")
    trained = f"the LoRA was trained with image latents '{convention}'"
    if not checked:
        lines.append("The LoRA was not compared with a base model. Pass --model to check that it fits.")
    if not has_image:
        pass
    elif kind == "merged" and factor != 1.0:
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
        elif "comfyui_strength" in metadata:
            fix = f"Set the strength of CogVideo ImageEncode to {metadata['comfyui_strength']:.3g}."
        else:
            fix = "Pass --model to see which strength of CogVideo ImageEncode corrects this."
        lines.append(f"warning: {trained}, but ComfyUI's nodes always use 'scaled'. {fix}")
    if kind.startswith("comfyui"):
        if convention == "scaled" and has_image:
            lines.append(f"{trained[0].upper()}{trained[1:]}, as ComfyUI's nodes scale them. They need no setting.")
        lines.append(f"How to use it in ComfyUI: {output / CARD_NAME}")
    elif kind == "diffusers":
        formats = "--to comfyui-merged or --to comfyui" if has_image else "the wrapper's nodes and --to comfyui-wrapper"
        lines.append(f"ComfyUI's own nodes cannot read this file: use {formats}.")
    if kind == "comfyui-wrapper" and (words := [word for word in WEAKENED_NAMES if word in str(output).lower()]):
        lines.append(f"warning: the wrapper weakens fused LoRAs with '{words[0]}' in their path. Rename the file.")
    if metadata.get("base_model") and not hub_id(metadata["base_model"]):
        lines.append(f"The model card names no base model, because {metadata['base_model']} is not on the hub.")
    return lines


if __name__ == "__main__":
    refuse_to_run("cogds.export", "export")
