"""The adapter: injected into the transformer, exported to and read from diffusers' file format.

What is exported is what was trained: rank and alpha travel in the file as diffusers' own metadata (without it a LoRA
of alpha 2r loads at half its strength), and beside it what only this project records: the image-latent convention.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cogds.errors import UserError, did_you_mean

ALL_LINEAR = "all-linear"
OWN_METADATA_KEY = "cogds"


def resolve_targets(transformer: torch.nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Full names of the Linear layers that `target_modules` (names, dotted endings, or `all-linear`) stand for.

    Raises UserError for a name that no Linear layer ends with.
    """
    linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    if not target_modules:
        raise UserError(f"lora.target_modules is empty: name Linear layers, such as to_q, or [{ALL_LINEAR}]")
    if list(target_modules) == [ALL_LINEAR]:
        return linears
    chosen = []
    for target in target_modules:
        matches = [name for name in linears if name == target or name.endswith("." + target)]
        if not matches:
            endings = {".".join(name.split(".")[-n:]) for name in linears for n in (1, 2)} | {ALL_LINEAR}
            raise UserError(
                f"lora.target_modules: no Linear layer of the transformer is called '{target}'"
                f"{did_you_mean(target, endings)}; all of them are trained with [{ALL_LINEAR}]"
            )
        chosen += [name for name in matches if name not in chosen]
    return chosen


def inject(
    transformer: Any, rank: int, alpha: float, dropout: float, target_modules: Sequence[str], seed: int
) -> list[torch.nn.Parameter]:
    """Add a LoRA to a frozen diffusers transformer; returns its trainable parameters.

    A is drawn from the seed and B is zero, so that step 0 is the base model and every rank starts the same.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # peft divides it: a fraction is as good as an integer
        lora_dropout=dropout,
        target_modules=resolve_targets(transformer, target_modules),
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def export(folder: Path, transformer: Any, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write `pytorch_lora_weights.safetensors` in diffusers' format into `folder`; returns its path.

    tensors: the trainable parameters by name, whole (under ZeRO-3 the module's own are empty shards).
    metadata: what to record under this project's key, JSON-able.
    """
    state = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(transformer, dict(tensors)).items()}
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty or not state:
        raise RuntimeError(f"LoRA export: {len(empty)} of {len(state)} tensors are empty, the first is {empty[:1]}")
    adapter = {f"transformer.{key}": value for key, value in transformer.peft_config["default"].to_dict().items()}
    header = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(adapter, default=sorted, sort_keys=True),
        OWN_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True),
    }
    CogVideoXImageToVideoPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=state,
        save_function=lambda weights, filename: save_file(weights, filename, metadata=header),
    )
    return folder / LORA_WEIGHT_NAME_SAFE


def lora_file(path: str | Path) -> Path:
    """The LoRA file at a path: the file itself, or the one in a folder. Raises UserError where there is none."""
    path = Path(path)
    file = path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"there is no LoRA at {path}: give a .safetensors file or a folder with {LORA_WEIGHT_NAME_SAFE}"
        )
    return file


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `export` recorded in the file, {} for a LoRA of another trainer. Raises UserError where it is no LoRA."""
    file = lora_file(path)
    try:
        with safe_open(file, "pt") as tensors:
            return json.loads((tensors.metadata() or {}).get(OWN_METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a safetensors file ({error}): export the LoRA again") from None


def load_into(transformer: Any, path: str | Path) -> None:
    """Add a LoRA file to a transformer, as `pipe.load_lora_weights` does. Raises UserError where there is none."""
    file = lora_file(path)
    state, metadata = CogVideoXImageToVideoPipeline.lora_state_dict(file, return_lora_metadata=True)
    CogVideoXImageToVideoPipeline.load_lora_into_transformer(state, transformer, metadata=metadata)
