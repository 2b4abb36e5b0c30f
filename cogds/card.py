"""The model card: what a LoRA is, how it was trained, how it is used. Written beside every LoRA and every export.

All it says comes from what training recorded in the LoRA's header (`lora_facts`), so a card made later, from the file
alone, says the same.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cogds.core.conditioning import convention_factor
from cogds.core.geometry import TRAINED_FPS, TRAINED_SIZE, ClipShape
from cogds.errors import brief
from cogds.runtime.outlet import warn
from cogds.training.run import Run

CARD_NAME = "README.md"
SAMPLE_NAME = "sample.mp4"
LICENCE = (
    "The base model's weights have a licence of their own, in the file `LICENSE` of its repository, which asks "
    "commercial users to register. It also concerns what is made of them."
)
TAGS = ["cogvideox", "image-to-video", "lora", "diffusers"]


def lora_facts(run: Run, step: int) -> dict[str, Any]:
    """What is recorded in the LoRA's header: JSON-able, and all that anybody who uses it may want to know."""
    cfg, plan = run.cfg, run.plan
    batches = sorted({size * run.world.data_size * plan.accumulation for size in plan.local_batch_sizes})
    facts = {
        "step": step,
        "base_model": cfg.model.path,
        "base": cfg.model.base,
        "rank": cfg.lora.rank,
        "alpha": cfg.lora.alpha,
        "targets": list(cfg.lora.target_modules),
        "init_from": cfg.lora.init_from,
        "image_latents": cfg.conditioning.image_latents,
        "image_latent_factor": pipeline_factor(run.model.vae_config, cfg.conditioning.image_latents),
        "buckets": [str(shape) for shape in run.buckets],
        "fps": cfg.data.fps,
        "num_clips": len(run.data.index),
        "batch_size": batches[0] if len(batches) == 1 else f"{batches[0]} to {batches[-1]}",
        "learning_rate": cfg.optimizer.lr,
        "precision": cfg.train.precision,
        "seed": cfg.seed,
    }
    if cfg.data.default_caption:
        facts["instance_prompt"] = cfg.data.default_caption
    if cfg.sample.prompts:
        facts["example_prompt"] = cfg.sample.prompts[0].prompt
    return facts


def pipeline_factor(vae_config: Mapping[str, Any], convention: str) -> float:
    """`convention_factor` by the config of a model's VAE."""
    return convention_factor(vae_config["scaling_factor"], bool(vae_config.get("invert_scale_latents")), convention)


def hub_id(path: str | None) -> str | None:
    """The path as a model id of the hub, or None where it is a folder of this machine."""
    return path if path and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).is_dir() else None


def shareable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same without paths of this machine: of a folder its name is left."""
    return {
        name: Path(value).name if name in ("base_model", "init_from") and value and not hub_id(value) else value
        for name, value in facts.items()
    }


def find_sample(lora: Path) -> Path | None:
    """The first video that the run made with this LoRA, `samples/step-N/*.mp4` for `lora/step-N`; None without one."""
    folder = lora.parent if lora.is_file() else lora
    return next(iter(sorted((folder.parent.parent / "samples" / folder.name).glob("*.mp4"))), None)


def write_card(folder: Path, lora: Path, facts: Mapping[str, Any]) -> None:
    """Write the card of a LoRA of a run into `folder`, which will be `lora`; the run's video stays where it is.

    A card that cannot be made is warned of: it must not cost the checkpoint that comes after it.
    """
    try:
        video = find_sample(lora)
        sample = Path(os.path.relpath(video, lora)).as_posix() if video else ""
        title = f"{lora.parent.parent.name} {lora.name}"
        card = model_card(title, facts, "diffusers", str(lora), sample=sample)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
    except Exception as error:  # whatever is in a prompt or a path
        warn(f"{lora} has no model card ({brief(error)}); the LoRA itself is not touched by that", error)


def model_card(title: str, facts: Mapping[str, Any], kind: str, where: str, file: str = "", sample: str = "") -> str:
    """The card's text.

    facts: of `lora_facts`, as far as they are known. kind: diffusers, comfyui, comfyui-wrapper or merged; where: path
    or hub id that the snippet loads; file: the weights' name, where it is not diffusers' own. sample: relative path of
    a video.
    """
    parts = [front_matter(facts, kind, sample), f"# {_line(title)}", _introduction(facts, kind)]
    if sample:
        parts.append(f'<video controls loop src="{sample}"></video>')
    if prompt := facts.get("instance_prompt"):
        parts.append(f"Prompt it was trained with: *{_line(prompt)}*")
    if kind.startswith("comfyui"):
        parts.append("## ComfyUI\n\n" + _comfyui(kind, file))
    else:
        parts.append(f"## Use\n\n```python\n{snippet(facts, kind, where)}```")
    parts += [_convention(facts, kind), "## Training\n\n" + _table(facts), "## Licence\n\n" + LICENCE]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: Mapping[str, Any], kind: str, sample: str = "") -> str:
    """The YAML block that the hub reads."""
    merged = kind == "merged"
    matter: dict[str, Any] = {}
    if base := hub_id(facts.get("base_model")):
        matter |= {"base_model": base, "base_model_relation": "merge" if merged else "adapter"}
    matter |= {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": [tag for tag in TAGS if not (merged and tag == "lora")] + (["comfyui"] if "comfyui" in kind else []),
    }
    if prompt := facts.get("instance_prompt"):
        matter["instance_prompt"] = prompt
    if sample:
        matter["widget"] = [{"text": _prompt(facts), "output": {"url": sample}}]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def snippet(facts: Mapping[str, Any], kind: str, where: str) -> str:
    """Python that makes a video of `first.png` with diffusers as it is."""
    shape, fps = _largest(facts), facts.get("fps", TRAINED_FPS)
    base = facts.get("base_model") or "zai-org/CogVideoX1.5-5B-I2V"
    factor = 1.0 if kind == "merged" else facts.get("image_latent_factor", 1.0)
    lines = [
        "import torch",
        f"from diffusers import CogVideoXImageToVideoPipeline{', CogVideoXTransformer3DModel' * (kind == 'merged')}",
        "from diffusers.utils import encode_video, load_image",
        "",
    ]
    if kind == "merged":
        lines += [
            f'transformer = CogVideoXTransformer3DModel.from_pretrained({_quoted(where)}, subfolder="transformer", '
            "dtype=torch.bfloat16)",
            f"pipe = CogVideoXImageToVideoPipeline.from_pretrained({_quoted(base)}, transformer=transformer, "
            "dtype=torch.bfloat16)",
        ]
    else:
        lines += [
            f"pipe = CogVideoXImageToVideoPipeline.from_pretrained({_quoted(base)}, dtype=torch.bfloat16)",
            f"pipe.load_lora_weights({_quoted(where)})",
        ]
    if factor != 1.0:
        lines += [
            "",
            "",
            "def prepare_latents(*args, prepare=pipe.prepare_latents, **kwargs):",
            "    latents, image_latents = prepare(*args, **kwargs)",
            f"    return latents, image_latents * {factor!r}  # as it was trained, not as diffusers does",
            "",
            "",
            "pipe.prepare_latents = prepare_latents",
        ]
    lines += [
        "# Where memory is short: pipe.enable_model_cpu_offload() instead.",
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "pipe.vae.enable_tiling()",
        "frames = pipe(",
        '    image=load_image("first.png"),',
        f"    prompt={_quoted(_prompt(facts))},",
        f"    num_frames={shape.frames},",
        f"    height={shape.height},",
        f"    width={shape.width},",
        "    max_sequence_length=pipe.transformer.config.max_text_seq_length,",
        ").frames[0]",
        f'encode_video(frames, fps={round(fps)}, output_path="video.mp4")',
    ]
    return "\n".join(lines) + "\n"


def _introduction(facts: Mapping[str, Any], kind: str) -> str:
    base = hub_id(facts.get("base_model"))
    of = f"[{base}](https://huggingface.co/{base})" if base else "a CogVideoX image-to-video model"
    what = "The transformer" if kind == "merged" else "A LoRA"
    return f"{what} of {of}{', with a LoRA merged in' if kind == 'merged' else ''}. Trained with cogds."


def _comfyui(kind: str, file: str) -> str:
    if kind == "comfyui":
        return (
            f"Copy `{file}` into `ComfyUI/models/loras`, load the base model with ComfyUI's own nodes (its CogVideoX "
            "class, not a custom node) and add *LoraLoaderModelOnly*, strength 1."
        )
    return (
        f"Copy `{file}` into `ComfyUI/models/CogVideo/loras` and choose it in *CogVideo LoraSelect* of "
        "ComfyUI-CogVideoXWrapper, strength 1. Leave `orbit` and `dimensionx` out of the file's name: where LoRAs are "
        "fused, that node weakens those."
    )


def _convention(facts: Mapping[str, Any], kind: str) -> str:
    """What to know of the image latents: nothing where the pipeline makes them as training did."""
    convention, factor = facts.get("image_latents", "pipeline"), facts.get("image_latent_factor", 1.0)
    comfyui = kind.startswith("comfyui")
    if kind == "merged" or (factor == 1.0 and not comfyui):
        return ""
    like = "which is what diffusers does" if factor == 1.0 else f"{factor:g} times what diffusers makes"
    text = f"## Image latents\n\nThe latents of the first frame were scaled as `{convention}` in training, {like}. "
    if not comfyui:
        return text + "The code above follows; other tools do not know of it."
    text += (
        "ComfyUI's nodes multiply them by the VAE's scaling factor (`scaled`), whatever LoRA is loaded. Where that "
        "differs, the model is given a first frame of another strength than it was trained with."
    )
    if kind == "comfyui-wrapper" and "comfyui_strength" in facts:
        text += f" `strength` of *CogVideo ImageEncode* mends it: set it to {facts['comfyui_strength']:.3g}."
    return text


def _table(facts: Mapping[str, Any]) -> str:
    """The settings, as far as they are known."""
    rows = [
        ("Steps", facts.get("step")),
        ("Rank, alpha", f"{facts['rank']}, {facts['alpha']:g}" if "rank" in facts and "alpha" in facts else None),
        ("Layers", ", ".join(facts.get("targets", []))),
        ("Learning rate", facts.get("learning_rate")),
        ("Clips", facts.get("num_clips")),
        ("Clips a step", facts.get("batch_size")),
        ("Sizes (frames x height x width)", ", ".join(facts.get("buckets", []))),
        ("Frame rate", f"{facts['fps']:g}" if "fps" in facts else None),
        ("Image latents", facts.get("image_latents")),
        ("Precision", facts.get("precision")),
        ("Base weights", facts.get("base") if facts.get("base") != "full" else None),
        ("Merged", facts.get("merged")),
        ("Strength", facts.get("exported_scale")),
        ("Seed", facts.get("seed")),
    ]
    known = [f"| {name} | {_line(str(value))} |" for name, value in rows if value not in (None, "", [])]
    return "\n".join(["| | |", "|---|---|", *known]) if known else "Nothing is known of it: another trainer made it."


def _prompt(facts: Mapping[str, Any]) -> str:
    return _line(facts.get("example_prompt") or facts.get("instance_prompt") or "what happens in the video")


def _largest(facts: Mapping[str, Any]) -> ClipShape:
    """The largest size that was trained; the model's own where none is known."""
    shapes = [ClipShape.parse(text) for text in facts.get("buckets", [])]
    return max(
        shapes, key=lambda shape: (shape.frames > 1, shape.frames * shape.height * shape.width), default=TRAINED_SIZE
    )


def _line(text: str) -> str:
    """In one line, without what ends a table's cell or a block of code."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
