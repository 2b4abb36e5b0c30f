"""A LoRA file as data: which formats are read, what a header says, what is refused.

Three formats: diffusers' `pytorch_lora_weights.safetensors`, whose alpha stands in the file's own header if anywhere;
PEFT's `adapter_model.safetensors`, whose alpha stands in `adapter_config.json` beside it; ComfyUI's, with a tensor of
alpha for every layer (`formats`). Safetensors and JSON are data; a pickle can run code when it is opened, and is
refused unopened.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from cogds.errors import UserError
from cogds.model.formats import COMFYUI_PREFIX, layer_of_comfyui

OWN_METADATA_KEY = "cogds"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, COMFYUI_PREFIX)
# Settings of PEFT under which a layer's output is more than W x + s B A x, or W is no longer the base model's.
BEYOND_LORA = (
    "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
)  # fmt: skip
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave W alone


def lora_file(path: str | Path, names: Sequence[str] = (LORA_WEIGHT_NAME_SAFE,)) -> Path:
    """The LoRA file at a path: the file itself, or the one of `names` in a folder.

    Raises UserError where there is none, and where it is a pickle, which could run code and is never opened.
    """
    path = Path(path)
    found = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    pickles = [one for one in (sorted(path.iterdir()) if path.is_dir() else found) if one.suffix in PICKLES]
    if len(found) > 1:
        raise UserError(f"{path} holds more than one LoRA, {' and '.join(file.name for file in found)}: name the file")
    if pickles and (not found or found == pickles):
        raise UserError(
            f"{pickles[0]} is a pickle, which can run code when it is opened, so it is not: save the LoRA again as "
            "safetensors (diffusers' and PEFT's default), and give that file"
        )
    if not found or not found[0].is_file():
        raise UserError(f"there is no LoRA at {path}: give a .safetensors file or a folder with {' or '.join(names)}")
    return found[0]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The safetensors file, open. Raises UserError where it is none, or is cut short."""
    try:
        handle = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a safetensors file ({error}): export the LoRA again") from None
    with handle as tensors:
        yield tensors


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `export` recorded in the file, {} for a LoRA of another trainer. Raises UserError where it is no LoRA."""
    file = lora_file(path)
    with opened(file) as tensors:
        return _own_metadata(file, tensors.metadata() or {})


def _own_metadata(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    try:
        return json.loads(header.get(OWN_METADATA_KEY, "{}"))
    except ValueError as error:
        raise UserError(f"{file}: its metadata {OWN_METADATA_KEY} is not JSON ({error}): export it again") from None


@dataclass(frozen=True)
class LoraPair:
    """One layer's two matrices in a file: their names, A [rank, num_in] and B [num_out, rank]; scale multiplies BA."""

    a: str
    b: str
    rank: int
    num_in: int
    num_out: int
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file's header says. pairs: by the full name of the transformer's layer."""

    path: Path
    pairs: dict[str, LoraPair]
    has_alpha: bool
    metadata: dict[str, Any]  # what `export` recorded; {} from another trainer

    @property
    def ranks(self) -> list[int]:
        return sorted({pair.rank for pair in self.pairs.values()})


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA's header, of diffusers (`pytorch_lora_weights.safetensors`), PEFT (`adapter_model.safetensors`) or
    ComfyUI (any name).

    A file without alpha has the strength that diffusers gives it, alpha = rank. Raises UserError for what is no LoRA,
    is damaged, or is more than a LoRA (DoRA, biases, changed base weights).
    """
    file = lora_file(path, (LORA_WEIGHT_NAME_SAFE, SAFETENSORS_WEIGHTS_NAME))
    with opened(file) as tensors:
        header: dict[str, str] = tensors.metadata() or {}
        own = _own_metadata(file, header)
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        prefix = next((one for one in PREFIXES if any(name.startswith(one) for name in shapes)), "")
        alphas = _alphas(tensors, shapes) if prefix == COMFYUI_PREFIX else {}
    config = {"alpha_pattern": alphas} if alphas else _adapter_config(file, header, prefix)
    _refuse_more_than_lora(file, config, shapes)
    halves = _halves_of_comfyui(file, shapes) if prefix == COMFYUI_PREFIX else _halves(file, shapes, prefix)
    pairs = {}
    for layer, named in halves.items():
        a, b = named.get("A", ""), named.get("B", "")
        shape_a, shape_b = shapes.get(a, ()), shapes.get(b, ())
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or not shape_a[0]:
            raise UserError(
                f"{file} is damaged: of layer {layer}, A is {shape_a or 'missing'} and B {shape_b or 'missing'}, where "
                "[rank, in] and [out, rank] belong: export the LoRA again"
            )
        scale = _scale(file, config, layer, shape_a[0])
        pairs[layer] = LoraPair(a, b, shape_a[0], shape_a[1], shape_b[0], scale)
    return LoraFile(file, pairs, bool(alphas) or config.get("lora_alpha") is not None, own)


def _alphas(tensors: Any, names: Iterable[str]) -> dict[str, float]:
    """ComfyUI's alphas, as PEFT's `alpha_pattern`, whose keys are regular expressions."""
    alphas = {}
    for name in names:
        if name.startswith(COMFYUI_PREFIX) and name.endswith(".alpha"):
            layer = layer_of_comfyui(name.removeprefix(COMFYUI_PREFIX).removesuffix(".alpha"))
            alphas[re.escape(layer)] = tensors.get_tensor(name).double().mean().item()
    return alphas


def _adapter_config(file: Path, header: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """The file's LoraConfig as plain values, wherever its format keeps it; {} where it has none."""
    try:
        if prefix == PEFT_PREFIX:
            config = json.loads((file.parent / CONFIG_NAME).read_text())
        else:
            config = json.loads(header.get(LORA_ADAPTER_METADATA_KEY) or "{}")
    except FileNotFoundError:
        raise UserError(f"{file} is PEFT's, and {CONFIG_NAME} is not beside it: copy the whole folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the adapter config of {file} cannot be read ({error}): export the LoRA again") from None
    if not isinstance(config, dict) or not isinstance(config.get("alpha_pattern") or {}, dict):
        raise UserError(f"the adapter config of {file} is no mapping: export the LoRA again")
    return {name.removeprefix(prefix): value for name, value in config.items()}


def _refuse_more_than_lora(file: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise UserError where two matrices a layer and a strength are not all there is to the adapter."""
    dora = [name for name in names if "dora_scale" in name or "lora_magnitude_vector" in name]
    if dora or config.get("use_dora"):
        raise UserError(f"{file} is a DoRA, which this trainer cannot continue: give a plain LoRA")
    biases = [name for name in names if name.endswith(".bias")]
    if biases or config.get("lora_bias") or config.get("bias") not in (None, "none"):
        raise UserError(f"{file} has biases, which this trainer does not train: give a LoRA without")
    if config.get("peft_type") not in (None, "LORA"):
        raise UserError(f"{file} is an adapter of type {config['peft_type']}: give a plain LoRA")
    if beyond := [name for name in BEYOND_LORA if config.get(name)]:
        raise UserError(f"{file} was made with {beyond[0]}={config[beyond[0]]}: give a plain LoRA")
    if (init := config.get("init_lora_weights")) not in KEEPS_BASE:
        raise UserError(f"{file} was made with init_lora_weights={init}, which changes the base model: convert it")


def _halves(file: Path, names: Iterable[str], prefix: str) -> dict[str, dict[str, str]]:
    """By layer, the names in the file of its A and its B. Raises UserError for a tensor that is neither."""
    names = list(names)
    # Every file's spelling by ours: diffusers renames the keys of a dict and leaves what they hold.
    ours = {name: name for name in names}
    if not any("lora_A" in name for name in names):
        ours = convert_unet_state_dict_to_peft(ours)
    halves: dict[str, dict[str, str]] = {}
    for key, name in ours.items():
        match = re.fullmatch(rf"{re.escape(prefix)}(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise UserError(
                f"{file} is no LoRA of a CogVideoX transformer: it holds '{name}', where names such as "
                f"'{DIFFUSERS_PREFIX}transformer_blocks.0.attn1.to_q.lora_A.weight' belong"
            )
        halves.setdefault(match[1], {})[match[2]] = name
    if not halves:
        raise UserError(f"{file} holds nothing: export the LoRA again")
    return halves


def _halves_of_comfyui(file: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """As `_halves`, of ComfyUI's names."""
    spellings = {"lora_down": "A", "lora_up": "B", "lora_A": "A", "lora_B": "B"}
    halves: dict[str, dict[str, str]] = {}
    for name in names:
        match = re.fullmatch(rf"{re.escape(COMFYUI_PREFIX)}(.+)\.({'|'.join(spellings)})\.weight", name)
        if match:
            halves.setdefault(layer_of_comfyui(match[1]), {})[spellings[match[2]]] = name
        elif not name.endswith(".alpha"):
            raise UserError(
                f"{file} is no LoRA of a CogVideoX transformer: it holds '{name}', where names such as "
                f"'{COMFYUI_PREFIX}blocks.0.q.lora_up.weight' belong"
            )
    return halves


def _scale(file: Path, config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What a file's BA is multiplied with in one layer."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha"))
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{file} gives layer {layer} alpha {alpha!r}, which is no number: export the LoRA again")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
