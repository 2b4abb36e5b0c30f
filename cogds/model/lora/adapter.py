"""The LoRA in the transformer: injection, initialization from a LoRA file, and export to a file.

Exported files keep the trained strength: rank and alpha are stored as diffusers' own metadata, without which a LoRA
with alpha = 2 rank would load at half its strength. cogds adds its own metadata, such as the image-latent convention.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from cogds.core.family import TASKS
from cogds.errors import UserError, did_you_mean
from cogds.files import apply_umask
from cogds.model.control import CONTROL_WEIGHT, add_control, control_inputs, control_of
from cogds.model.lora.convert import Adapter, check_fits, diffusers_header, load_adapter, peft_config
from cogds.model.lora.file import CONTROL_KEY, LoraFile, describe_lora, join_values, read_lora

ALL_LINEAR = "all-linear"
ADAPTER = "default"  # default name in diffusers' add_adapter
INIT_ALPHA = "lora.init_alpha"


def linear_layers(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of the base's Linear layers by full name, with or without an injected LoRA."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and not re.search(r"\.lora_[AB]\.", name)
    }


def resolve_targets(transformer: torch.nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Return the full names of the Linear layers that match `target_modules` (names, dotted endings or `all-linear`).

    Raises UserError for a name that matches no Linear layer.
    """
    linears = linear_layers(transformer)
    if not target_modules:
        raise UserError(f"lora.target_modules: is empty. List Linear layers, such as to_q, or use [{ALL_LINEAR}].")
    if list(target_modules) == [ALL_LINEAR]:
        return list(linears)
    chosen = []
    for target in target_modules:
        matches = [name for name in linears if name == target or name.endswith("." + target)]
        if not matches:
            endings = {".".join(name.split(".")[-n:]) for name in linears for n in (1, 2)} | {ALL_LINEAR}
            raise UserError(
                f"lora.target_modules: the transformer has no Linear layer '{target}'{did_you_mean(target, endings)}. "
                f"Use an existing name, or [{ALL_LINEAR}] for all Linear layers."
            )
        chosen += [name for name in matches if name not in chosen]
    return chosen


def inject(
    transformer: Any, rank: int, alpha: float, dropout: float, target_modules: Sequence[str], seed: int
) -> list[torch.nn.Parameter]:
    """Add a LoRA to a frozen transformer and return its trainable parameters.

    A is drawn from the seed and B is zero, so step 0 equals the base model and all ranks start with the same weights.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # typed int, but peft only divides it, so floats work
        lora_dropout=dropout,
        target_modules=resolve_targets(transformer, target_modules),
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def export(folder: Path, transformer: Any, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write `pytorch_lora_weights.safetensors` in diffusers' format into `folder`, and return its path.

    Args:
        tensors: the complete trainable parameters by name (under ZeRO-3, those of the module are empty shards).
        metadata: JSON-serializable values to store under cogds' key.
    """
    state = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(transformer, dict(tensors)).items()}
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty or not state:
        raise RuntimeError(f"LoRA export: {len(empty)} of {len(state)} tensors are empty, such as {empty[:1]}")
    header = diffusers_header(transformer.peft_config[ADAPTER], metadata)
    CogVideoXImageToVideoPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=state,
        save_function=functools.partial(_save, control=tensors.get(CONTROL_WEIGHT), metadata=header),
    )
    apply_umask(folder / LORA_WEIGHT_NAME_SAFE)
    return folder / LORA_WEIGHT_NAME_SAFE


def _save(tensors: dict[str, torch.Tensor], file: str, control: torch.Tensor | None, metadata: dict[str, str]) -> None:
    """Write a LoRA file, with the weight for a control video if there is one."""
    more = {} if control is None else {CONTROL_KEY: control.cpu().contiguous()}
    save_file(tensors | more, file, metadata=metadata)


@torch.no_grad()
def add_lora(transformer: Any, adapter: Adapter, name: str = ADAPTER) -> None:
    """Add a LoRA that fits the transformer as its adapter `name`, in the transformer's dtype and on its device.

    A LoRA with a control video also adds input channels (`model.control`); at most one can.
    """
    transformer.add_adapter(peft_config(adapter), name)
    injected = {layer: module for layer, module in _injected(transformer).items() if name in module.lora_A}
    if injected.keys() != adapter.layers.keys():
        differing = sorted(injected.keys() ^ adapter.layers.keys())
        raise RuntimeError(f"PEFT injected the LoRA into different layers: {differing[:4]}, ...")
    for layer, module in injected.items():
        module.lora_A[name].weight.copy_(adapter.layers[layer].a)
        module.lora_B[name].weight.copy_(adapter.layers[layer].b)
    if adapter.control is not None:
        _add_trained_control(transformer, adapter.control)


def load_control(transformer: Any, path: str | Path, scale: float = 1.0) -> None:
    """Add the input channels for a control video of a LoRA, after diffusers' `load_lora_weights` has loaded the rest.

    path: the file or its folder. Raises UserError if the LoRA was trained without control videos.
    """
    file = read_lora(path)
    if file.control is None:
        raise UserError(f"{file.path}: was not trained with control videos. Load it without load_control.")
    weight = load_adapter(file).control
    assert weight is not None
    _add_trained_control(transformer, weight * scale)


def _add_trained_control(transformer: Any, weight: torch.Tensor) -> None:
    config = transformer.config
    channels = weight.shape[1] // control_inputs(1, config.patch_size_t, config.patch_size)
    add_control(transformer, channels, weight).requires_grad_(False)


def _injected(transformer: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def check_initial_lora(transformer: torch.nn.Module, file: LoraFile) -> None:
    """Check from a file's header that `load_initial_lora` will succeed.

    transformer: after `inject`, may be on the meta device. Raises UserError if the file and the run have different
    ranks or layers, naming the settings to change, or if the LoRA belongs to a different model.
    """
    layers, linears = _injected(transformer), linear_layers(transformer)
    check_fits(file, {f"{name}.weight": shape for name, shape in linears.items()}, "this run's model")
    if len(file.ranks) > 1:
        raise UserError(
            f"lora.init_from: {file.path} has layers of ranks {join_values(file.ranks)}, but a run has a single rank. "
            "Pass a LoRA with a single rank."
        )
    if file.control and control_of(transformer) is None:
        raise UserError(
            f"lora.init_from: {file.path} was trained with control videos, but this run has none. Set "
            "conditioning.control=true."
        )
    if file.control and (own := control_of(transformer)) is not None and file.control != tuple(own.weight.shape):
        raise UserError(
            f"lora.init_from: {file.path} has a control weight of shape {file.control}, but this model needs "
            f"{tuple(own.weight.shape)}. Pass a LoRA of this model."
        )
    rank, run_rank = file.ranks[0], next(iter(layers.values())).r[ADAPTER]
    targets, run_targets = shortest_targets(file.pairs, list(linears)), shortest_targets(layers, list(linears))
    settings = [f"lora.rank={rank}"] if rank != run_rank else []
    settings += [f"'lora.target_modules=[{','.join(targets)}]'"] if set(file.pairs) != set(layers) else []
    if settings:
        raise UserError(
            f"lora.init_from: {file.path} has rank {rank} on {len(file.pairs)} layers ({join_values(targets, 8)}), but "
            f"this run has rank {run_rank} on {len(layers)} layers ({join_values(run_targets, 8)}). Set "
            f"{' '.join(settings)}."
        )


def shortest_targets(layers: Iterable[str], linears: Sequence[str]) -> list[str]:
    """Return the shortest endings that match these layers and no other Linear layers."""
    layers, chosen = set(layers), set()
    if layers == set(linears):
        return [ALL_LINEAR]
    for layer in layers:
        parts = layer.split(".")
        for n in range(1, len(parts) + 1):
            ending = ".".join(parts[-n:])
            matches = {name for name in linears if name == ending or name.endswith("." + ending)}
            if matches <= layers and not parts[-n].isdigit():
                break
        chosen.add(ending)
    return sorted(chosen)


@torch.no_grad()
def load_initial_lora(transformer: torch.nn.Module, file: LoraFile) -> None:
    """Initialize the adapter from `inject`, whose parameters must not be sharded, with the weights of a file.

    The file's strength is kept: B is scaled by its alpha/rank divided by the run's, so that the output is the same for
    any lora.alpha. Raises UserError as in `check_initial_lora`, and if a value is not finite.
    """
    check_initial_lora(transformer, file)
    adapter = load_adapter(file, dtype=torch.float32)
    for name, module in _injected(transformer).items():
        layer = adapter.layers[name]
        module.lora_A[ADAPTER].weight.copy_(layer.a)
        module.lora_B[ADAPTER].weight.copy_(layer.b * (layer.scale / module.scaling[ADAPTER]))
    if adapter.control is not None:
        control = control_of(transformer)
        assert control is not None
        control.weight.copy_(adapter.control)


def describe_initial_lora(file: LoraFile, image_latents: str, task: str = TASKS[0]) -> list[str]:
    """Return lines that describe the LoRA a run starts from, with warnings.

    image_latents: `conditioning.image_latents` of the run. task: of its model.
    """
    first, *lines = describe_lora(file, INIT_ALPHA)
    lines.insert(0, f"starting from {first}")
    convention, trained_task = file.metadata.get("image_latents", image_latents), file.metadata.get("task", task)
    if trained_task != task:
        lines.append(f"warning: {file.path}: was trained for {trained_task}, but this model is {task}.")
    elif convention != image_latents and task == TASKS[0]:
        lines.append(
            f"warning: {file.path}: was trained with conditioning.image_latents={convention}, but this run uses "
            f"{image_latents}."
        )
    return lines
