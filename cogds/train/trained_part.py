"""The part of the transformer that a run trains: a LoRA that is added to it, or its own weights."""

from typing import Any

import torch

from cogds.job import Job
from cogds.model.control import add_control
from cogds.model.lora.adapter import inject


def loaded_as_trained(job: Job) -> tuple[str, ...]:
    """Return the names of the transformer's own weights that are trained, none if a LoRA is."""
    return () if job.cfg.trains_lora else job.targets


def add_trained_part(transformer: Any, job: Job) -> list[torch.nn.Parameter]:
    """Add the LoRA, if one is trained, and return the parameters to train."""
    cfg = job.cfg
    if cfg.trains_lora:
        lora = cfg.lora
        parameters = inject(transformer, lora.rank, lora.alpha, lora.dropout, lora.target_modules, cfg.seed)
        if cfg.conditioning.control:
            parameters.append(add_control(transformer, job.model.geometry.latent_channels))
        return parameters
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
