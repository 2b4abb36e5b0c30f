"""The model card (README.md) that is written for every LoRA, every fine-tuned model and every export.

It contains only metadata that training stores in the file's header (`train.metadata.export_metadata`), so it can be
written from the file alone.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cogds.arguments import MERGED_FORMATS
from cogds.core.condition_modes import MIN_CONTEXT
from cogds.core.conditioning import convention_factor
from cogds.core.family import IMAGE_PIPELINE, TASKS, TEXT_PIPELINE
from cogds.core.geometry import TRAINED_FPS, TRAINED_SIZE, ClipShape
from cogds.errors import brief
from cogds.process.logs import log_failure

logger = logging.getLogger(__name__)

Metadata = Mapping[str, Any]  # any subset of `train.metadata.export_metadata`

CARD_NAME = "README.md"
SAMPLE_NAME = "sample.mp4"
LICENSE = (
    "The base model's license applies to this file too. Read the file `LICENSE` in the base model's repository. "
    "CogVideoX's own license, which all models except CogVideoX-2b have, requires commercial users to register."
)
# Organizations that publish CogVideoX under "The CogVideoX License", with a LICENSE file in each repository.
PUBLISHERS = ("zai-org", "THUDM")
APACHE_MODEL = "CogVideoX-2b"  # the only one of their models under the Apache License 2.0
# Kinds of exports whose file diffusers loads. The hub offers code for the `library_name`, so others must not have one.
LOADED_BY_DIFFUSERS = ("diffusers", "comfyui-wrapper", "merged", "full")
OUR_PIPELINE = "ConditionedPipeline"
MODE_USES = {
    "first": "an image begins the video",
    "last": "an image ends it",
    "first_last": "interpolates between two images",
    "prefix": "continues a video",
    "suffix": "leads up to a video",
    "keyframes": "images at given frames",
    "none": "from the prompt alone",
}
FULL = "full"  # kind of a model whose own weights were trained


def pipeline_factor(vae_config: Metadata, convention: str) -> float:
    """Return `convention_factor` for a VAE's config."""
    return convention_factor(vae_config["scaling_factor"], bool(vae_config.get("invert_scale_latents")), convention)


def task_of(metadata: Metadata) -> str:
    """What the base model makes videos from, one of TASKS. Files without it are of a version that had only images."""
    return metadata.get("task", TASKS[0])


def takes_image(metadata: Metadata) -> bool:
    """Whether the base model is image-to-video."""
    return task_of(metadata) == TASKS[0]


def hub_id(path: str | None) -> str | None:
    """Return the path if it is a model id of the hub, None if it is a local folder."""
    return path if path and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).is_dir() else None


def shareable(metadata: Metadata) -> dict[str, Any]:
    """Replace local paths by the name of their last component."""
    return {
        name: Path(value).name if name in ("base_model", "init_from") and value and not hub_id(value) else value
        for name, value in metadata.items()
    }


def find_sample(lora: Path) -> Path | None:
    """Return the run's first video with this LoRA (`samples/step-N/*.mp4` for `lora/step-N`), or None."""
    folder = lora.parent if lora.is_file() else lora
    return next(iter(sorted((folder.parent.parent / "samples" / folder.name).glob("*.mp4"))), None)


def write_card(folder: Path, final: Path, metadata: Metadata, kind: str = "diffusers") -> None:
    """Write the card of a run's LoRA or model into `folder`, which will be renamed to `final`; link to the run's video.

    A failure is only a warning, because the checkpoint that follows must still be written.
    """
    try:
        video = find_sample(final)
        sample = Path(os.path.relpath(video, final)).as_posix() if video else ""
        title = f"{final.parent.parent.name} {final.name}"
        card = model_card(title, metadata, kind, str(final), sample=sample)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
    except Exception as error:  # prompts and paths may hold anything
        log_failure(logger, f"{final}: no model card ({brief(error)}). The weights are complete.", error)


def model_card(title: str, metadata: Metadata, kind: str, location: str, file: str = "", sample: str = "") -> str:
    """Return the card's text.

    Args:
        kind: one of `arguments.EXPORT_FORMATS`, or `FULL` for a fine-tuned model.
        location: path or hub id that the snippet loads.
        file: name of the file with the weights, required for the ComfyUI kinds.
        sample: relative path of a video.
    """
    parts = [front_matter(metadata, kind, sample), f"# {_line(title)}", _introduction(metadata, kind)]
    if sample:
        parts.append(f'<video controls loop src="{sample}"></video>')
    if words := metadata.get("trigger_words"):
        listed = ", ".join(f"`{_line(word)}`" for word in words)
        which = "it" if len(words) == 1 else "one of them"
        parts.append(f"Captions began with {listed} in training. Begin prompts with {which}.")
    if prompt := metadata.get("instance_prompt"):
        parts.append(f"Prompt used in training: *{_line(prompt)}*")
    if kind.startswith("comfyui"):
        parts.append("## ComfyUI\n\n" + _comfyui(metadata, kind, file))
    else:
        modes = list(modes_of(metadata))
        parts.append("## Use")
        for mode in modes:
            heading = "" if modes == ["first"] else f"Mode `{mode}` ({MODE_USES[mode]}):\n\n"
            parts.append(f"{heading}```python\n{snippet(metadata, kind, location, mode)}```")
    parts += [_convention(metadata, kind), "## Training\n\n" + _table(metadata), "## License\n\n" + LICENSE]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(metadata: Metadata, kind: str, sample: str = "") -> str:
    """Return the YAML block that the hub reads.

    Fields: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    base = hub_id(metadata.get("base_model"))
    matter: dict[str, Any] = {"license": "other"}
    if base and base in [f"{publisher}/{APACHE_MODEL}" for publisher in PUBLISHERS]:
        matter["license"] = "apache-2.0"
    elif base and base.split("/")[0] in PUBLISHERS:
        matter |= {
            "license_name": "cogvideox-license",
            "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE",
        }
    if base:
        relation = "finetune" if kind == FULL else "merge" if kind in MERGED_FORMATS else "adapter"
        matter |= {"base_model": base, "base_model_relation": relation}
    task = task_of(metadata)
    tags = ["cogvideox", task]
    if kind not in (*MERGED_FORMATS, FULL):
        tags.append("lora")
    if kind in LOADED_BY_DIFFUSERS:
        matter["library_name"] = "diffusers"
        tags.append("diffusers")
    if kind.startswith("comfyui"):
        tags.append("comfyui")
    matter |= {"pipeline_tag": task, "tags": tags}
    # The hub shows this text as the trigger words.
    if prompt := ", ".join(metadata.get("trigger_words", [])) or metadata.get("instance_prompt"):
        matter["instance_prompt"] = prompt
    if sample:
        matter["widget"] = [{"text": _prompt(metadata), "output": {"url": sample}}]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def modes_of(metadata: Metadata) -> Iterable[str]:
    """Return the modes of `conditioning.modes` that were trained. Files without them had only first images."""
    return metadata.get("modes") or ("first",)


def mode_arguments(metadata: Metadata, mode: str, fps: float) -> list[str]:
    """Return the lines of code that pass the frames of a mode to the pipeline."""
    num_frames = (metadata.get("context_latents", MIN_CONTEXT) - 1) * 4 + 1
    first, last = 'image=load_image("first.png"),', 'last_image=load_image("last.png"),'
    keyframes = {round(time_s * fps): f"keyframe-{time_s:g}s.png" for time_s in metadata.get("keyframe_times", ())}
    images = ", ".join(f'{frame}: load_image("{file}")' for frame, file in keyframes.items())
    return {
        "first": [first],
        "last": [last],
        "first_last": [first, last],
        "prefix": [f'video=load_video("clip.mp4")[-{num_frames}:],  # at {fps:g} frames/s; the new one continues it'],
        "suffix": [
            f'video=load_video("clip.mp4")[:{num_frames}],  # at {fps:g} frames/s; the new one leads up to it',
            'video_at="end",',
        ],
        "keyframes": [f"keyframes={{{images}}},"],
        "none": [],
    }[mode]


def snippet(metadata: Metadata, kind: str, location: str, mode: str = "first") -> str:
    """Return Python code that generates a video, in image-to-video of a mode, with diffusers 0.34 or later.

    mode: one of `core.condition_modes.MODES`. Any but `first`, and control videos, use the pipeline of cogds.

    0.34 is the first version that reads alpha from the LoRA. The code uses `torch_dtype` because `dtype` exists only
    since 0.40, and `export_to_video` because `encode_video` exists only since 0.39.
    """
    shape, fps = _largest(metadata), metadata.get("fps", TRAINED_FPS)
    has_image = takes_image(metadata)
    base = metadata.get("base_model") or ("zai-org/CogVideoX1.5-5B-I2V" if has_image else "zai-org/CogVideoX1.5-5B")
    has_control = has_image and bool(metadata.get("control"))
    is_ours = has_image and (mode != "first" or has_control)
    is_builtin = kind != FULL and base.startswith("builtin:")
    model = f"find_model({_quoted(base)}).path" if is_builtin else _quoted(base)
    pipeline = OUR_PIPELINE if is_ours else IMAGE_PIPELINE if has_image else TEXT_PIPELINE
    arguments = mode_arguments(metadata, mode, fps) if has_image else []
    if has_control:
        arguments.append(f'control_video=load_video("control.mp4")[:{shape.frames}],  # at {fps:g} frames/s')
    loaders = [name for name in ("load_image", "load_video") if any(f"{name}(" in line for line in arguments)]
    imported = ["CogVideoXTransformer3DModel"] if kind == "merged" else []
    imported = imported if is_ours else [pipeline, *imported]
    factor = 1.0 if kind in ("merged", FULL) or not has_image else metadata.get("image_latent_factor", 1.0)
    lines = [
        f"# pip install {'cogds ' * (is_ours or is_builtin)}'diffusers>=0.34' transformers accelerate peft "
        "sentencepiece protobuf imageio imageio-ffmpeg",
        "import torch",
        *([f"from cogds.model.conditioned_pipeline import {OUR_PIPELINE}"] if is_ours else []),
        *(["from cogds.model.load import find_model"] if is_builtin else []),
        *(["from cogds.model.lora.adapter import load_control"] if has_control else []),
        *([f"from diffusers import {', '.join(imported)}"] if imported else []),
        f"from diffusers.utils import {', '.join(['export_to_video', *loaders])}",
        "",
    ]
    if kind == "merged":
        lines += [
            f'transformer = CogVideoXTransformer3DModel.from_pretrained({_quoted(location)}, subfolder="transformer", '
            "torch_dtype=torch.bfloat16)",
            f"pipe = {pipeline}.from_pretrained({model}, transformer=transformer, torch_dtype=torch.bfloat16)",
        ]
    elif kind == FULL:
        lines.append(f"pipe = {pipeline}.from_pretrained({_quoted(location)}, torch_dtype=torch.bfloat16)")
    else:
        lines += [
            f"pipe = {pipeline}.from_pretrained({model}, torch_dtype=torch.bfloat16)",
            # Offline, diffusers before 0.40 requires the name.
            f'pipe.load_lora_weights({_quoted(location)}, weight_name="pytorch_lora_weights.safetensors")',
            *(
                [f"load_control(pipe.transformer, {_quoted(location)})  # a local file or folder"]
                if has_control
                else []
            ),
        ]
    if factor != 1.0:
        lines += [
            "",
            "",
            "def prepare_latents(*args, prepare=pipe.prepare_latents, **kwargs):",
            "    latents, image_latents = prepare(*args, **kwargs)",
            f"    return latents, image_latents * {factor!r}  # the factor used in training; diffusers uses another",
            "",
            "",
            "pipe.prepare_latents = prepare_latents",
        ]
    if metadata.get("control") and not has_control:
        lines.append("# This code does not use the control video. `cogds sample --control` does.")
    lines += [
        "# If GPU memory is short, call pipe.enable_model_cpu_offload() instead of pipe.to().",
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "pipe.vae.enable_tiling()",
        "frames = pipe(",
        *(f"    {line}" for line in arguments),
        f"    prompt={_quoted(_prompt(metadata))},",
        f"    num_frames={shape.frames},",
        f"    height={shape.height},",
        f"    width={shape.width},",
        "    max_sequence_length=pipe.transformer.config.max_text_seq_length,",
        ").frames[0]",
        f'export_to_video(frames, "video.mp4", fps={round(fps)})',
    ]
    return "\n".join(lines) + "\n"


def _introduction(metadata: Metadata, kind: str) -> str:
    base = hub_id(metadata.get("base_model"))
    model = f"[{base}](https://huggingface.co/{base})" if base else f"a CogVideoX {task_of(metadata)} model"
    if kind == FULL:
        return f"{model[0].upper()}{model[1:]}, fine-tuned. Trained with cogds."
    if kind in MERGED_FORMATS and metadata.get("exported_scale") == 0:
        return f"The transformer of {model}. Exported with cogds."
    if kind in MERGED_FORMATS:
        return f"The transformer of {model} with a LoRA merged in. Trained with cogds."
    control = " It follows a control video, which `cogds sample --control` takes." if metadata.get("control") else ""
    return f"A LoRA for {model}. Trained with cogds.{control}"


def _comfyui(metadata: Metadata, kind: str, file: str) -> str:
    if kind == "comfyui-wrapper":
        return (
            f"Copy `{file}` to `ComfyUI/models/CogVideo/loras` and select it in *CogVideo LoraSelect* of "
            "ComfyUI-CogVideoXWrapper with strength 1. Keep `orbit` and `dimensionx` out of the file name: when this "
            "node fuses LoRAs, it weakens those."
        )
    if kind == "comfyui":
        load = (
            f"Copy `{file}` to `ComfyUI/models/loras` and select it in *LoraLoaderModelOnly* with strength 1. The base "
            "model must be a file in ComfyUI's names: `--to comfyui-merged --scale 0` exports one for this LoRA."
        )
    else:
        load = f"Copy `{file}` to `ComfyUI/models/diffusion_models` and select it in *Load Diffusion Model*."
    shape = _largest(metadata)
    return (
        f"{load} This needs a ComfyUI with its own CogVideoX class (`comfy/ldm/cogvideo`, 2026).\n\n"
        "ComfyUI has no image-to-video node for CogVideoX (checked in version 0.33). These nodes work: "
        "*InstructPixToPixConditioning* with the first frame as `pixels`, *EmptyHunyuanLatentVideo*, and "
        "*VOIDSampler* in *SamplerCustomAdvanced* with the scheduler `simple`. *KSampler* does not work: its samplers "
        f"give the model noise at the wrong scale.\n\n{_lengths(shape.frames)}"
    )


def _lengths(frames: int) -> str:
    """Return which length to request in ComfyUI for a clip of `frames` frames, and what to cut."""
    latents = (frames - 1) // 4 + 1
    if latents % 2 == 0:
        return f"Set the length to {frames}."
    return (
        f"For {frames} frames, set the length to {frames + 4}, and before *VAE Decode* remove the first latent frame "
        f"with *LatentCut* (dim `t`, index 1, amount {latents}). The model needs an even number of latent frames: "
        "diffusers adds one in front and removes it in the same way, but ComfyUI adds a copy of the first one at the "
        "end, which spoils the video."
    )


def _convention(metadata: Metadata, kind: str) -> str:
    """Describe the scale of the image latents, unless the tool uses the right one without help."""
    convention, factor = metadata.get("image_latents", "pipeline"), metadata.get("image_latent_factor", 1.0)
    comfyui = kind.startswith("comfyui")
    if kind in (*MERGED_FORMATS, FULL) or (factor == 1.0 and not comfyui) or not takes_image(metadata):
        return ""
    compared = "as in diffusers" if factor == 1.0 else f"{factor:g} times those of diffusers"
    text = f"## Image latents\n\nTraining scaled the latents of the first frame as `{convention}`: {compared}. "
    if not comfyui:
        return text + "The code above does the same. Other tools do not."
    text += "ComfyUI's nodes always multiply them by the VAE's scaling factor (`scaled`). "
    if convention == "scaled":
        return text + "This is what the LoRA expects."
    if kind == "comfyui":
        return text + "The base model from `--to comfyui-merged --scale 0` corrects this for this LoRA."
    if "comfyui_strength" in metadata:
        strength = f"{metadata['comfyui_strength']:.3g}"
        return text + f"Set `strength` of *CogVideo ImageEncode* to {strength} to correct this."
    return text + "The LoRA expects others."


def _table(metadata: Metadata) -> str:
    """Return the known settings as a table."""
    has_rank = "rank" in metadata and "alpha" in metadata
    rows = [
        ("Steps", metadata.get("step")),
        ("Rank, alpha", f"{metadata['rank']}, {metadata['alpha']:g}" if has_rank else None),
        ("Layers", ", ".join(metadata.get("targets", []))),
        ("Learning rate", metadata.get("learning_rate")),
        ("Clips", metadata.get("num_clips")),
        ("Clips per step", metadata.get("batch_size")),
        ("Sizes (frames x height x width)", ", ".join(metadata.get("buckets", []))),
        ("Frame rate", f"{metadata['fps']:g}" if "fps" in metadata else None),
        ("Image latents", metadata.get("image_latents")),
        ("Modes", ", ".join(f"{mode} {share:g}" for mode, share in metadata.get("modes", {}).items())),
        ("Precision", metadata.get("precision")),
        ("Quantization", metadata.get("quantization") if metadata.get("quantization") != "none" else None),
        ("Merged", metadata.get("merged")),
        ("Relative error of the extraction", metadata.get("extracted_error")),
        ("Strength", metadata.get("exported_scale")),
        ("Seed", metadata.get("seed")),
    ]
    known = [f"| {name} | {_line(str(value))} |" for name, value in rows if value not in (None, "", [])]
    return "\n".join(["| | |", "|---|---|", *known]) if known else "The file does not record its settings."


def _prompt(metadata: Metadata) -> str:
    """An example of a prompt: one that the user wrote for this LoRA, or the captions' beginning and a placeholder."""
    if prompt := metadata.get("example_prompt"):
        return _line(prompt)
    words = metadata.get("trigger_words", [])[:1]
    return _line(" ".join([*words, metadata.get("instance_prompt") or "what happens in the video"]))


def _largest(metadata: Metadata) -> ClipShape:
    """Return the largest trained size, or the base model's own size if none is known."""
    shapes = [ClipShape.parse(text) for text in metadata.get("buckets", [])]
    return max(
        shapes, key=lambda shape: (shape.frames > 1, shape.frames * shape.height * shape.width), default=TRAINED_SIZE
    )


def _line(text: str) -> str:
    """Join the text to one line without characters that end a table cell or a code block."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
