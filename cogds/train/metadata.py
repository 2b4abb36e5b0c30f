"""The metadata that a run records in what it exports: settings, data and conventions."""

from typing import Any

import cogds
from cogds.card import pipeline_factor
from cogds.config.schema import RunConfig
from cogds.core.condition_modes import DEFAULT_MODES, used_modes
from cogds.encode.scan_data import caption_prefixes
from cogds.train.run import Run


def export_metadata(run: Run, step: int) -> dict[str, Any]:
    """Collect the metadata that is recorded in the header of a LoRA or a model, and shown on its card."""
    cfg, plan = run.cfg, run.plan
    batches = sorted({size * run.world.data_size * plan.accumulation for size in plan.local_batch_sizes})
    metadata = {
        "cogds_version": cogds.__version__,
        "step": step,
        "base_model": cfg.model.path,
        "task": run.model.family.task,
        "quantization": cfg.model.quantization,
        **_trained_part(cfg),
        **_image_latents(run),
        **_modes(run),
        "buckets": [str(shape) for shape in run.buckets],
        "fps": cfg.data.fps,
        "num_clips": len(run.data.index),
        "batch_size": batches[0] if len(batches) == 1 else f"{batches[0]} to {batches[-1]}",
        "learning_rate": cfg.optimizer.lr,
        "precision": cfg.train.precision,
        "seed": cfg.seed,
    }
    if cfg.conditioning.control:
        metadata["control"] = True
    if trigger_words := list(dict.fromkeys(filter(None, map(str.strip, caption_prefixes(cfg))))):
        metadata["trigger_words"] = trigger_words
    if cfg.data.default_caption:
        metadata["instance_prompt"] = cfg.data.default_caption
    if cfg.sample.prompts:
        metadata["example_prompt"] = cfg.sample.prompts[0].prompt
    return metadata


def _image_latents(run: Run) -> dict[str, Any]:
    if not run.model.family.takes_image:
        return {}
    convention = run.cfg.conditioning.image_latents
    factor = pipeline_factor(run.model.vae_config, convention)
    return {"image_latents": convention, "image_latent_factor": factor}


def _modes(run: Run) -> dict[str, Any]:
    """The condition modes, if any but `first` is trained. The length of prefix and suffix is in latent frames."""
    config, modes = run.cfg.conditioning, used_modes(run.cfg.conditioning.modes)
    if modes == DEFAULT_MODES:
        return {}
    has_context = "prefix" in modes or "suffix" in modes
    return {
        "modes": {mode: config.modes[mode] for mode in modes},
        **({"context_latents": run.job.condition_settings.context} if has_context else {}),
        "keyframe_times": list(config.keyframe_times),
    }


def _trained_part(cfg: RunConfig) -> dict[str, Any]:
    lora = cfg.lora
    if not cfg.trains_lora:
        return {"method": "full", "targets": list(cfg.full.modules)}
    targets = list(lora.target_modules)
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": targets, "init_from": lora.init_from}
