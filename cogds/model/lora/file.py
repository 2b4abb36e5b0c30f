"""Reading of LoRA files in all formats of `formats`: for each layer, a pair of matrices and a strength.

Training from a LoRA, evaluation, sampling and export all read LoRAs with this module. A layer's alpha comes from its
own tensor, otherwise from the config in the header (diffusers' `lora_adapter_metadata`, finetrainers' `lora_config`),
otherwise from `adapter_config.json` beside PEFT's `adapter_model.safetensors`, otherwise from the user.

Only safetensors and JSON are read. A pickle can run code when it is opened, so it is refused without opening it. Values
of a wrong type are refused here, so callers need not check them.
"""

import enum
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from cogds.core.condition_modes import MIN_CONTEXT, MODES
from cogds.core.conditioning import IMAGE_LATENT_CONVENTIONS
from cogds.core.family import TASKS
from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.model.lora.formats import DIFFUSERS_PREFIX, PEFT_PREFIX, SAT_ALPHA, Key, parse_key

Config = Mapping[str, Any]  # the fields of a `LoraConfig` in a file
OWN_METADATA_KEY, FINETRAINERS_KEY = "cogds", "lora_config"
# The weight of the extra input channels for a control video. diffusers refuses names without "lora" in them, and
# ignores those that do not start with "transformer.".
CONTROL_KEY = "cogds_lora_control.weight"
ALPHA_IN_WEIGHTS = "alpha_in_weights"  # metadata key of cogds: B includes the factor alpha/rank, so the strength is 1
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# PEFT settings with which a layer's output is not W x + s B A x, or W differs from the base model's.
BEYOND_LORA = (
    "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
)  # fmt: skip
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that do not change W
FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")  # dtypes as safetensors names them


def lora_file(path: str | Path) -> Path:
    """Return the LoRA file at a path, which is a file or a folder that contains one.

    Raises UserError if there is none or more than one, or if it is a pickle, which is never opened.
    """
    path = Path(path)
    try:
        inside = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    except OSError as error:  # no permission, or the name is too long
        raise UserError(f"{path}: cannot be read ({error.strerror}). Pass a .safetensors file.") from None
    files = [file for file in inside if file.suffix == ".safetensors" or file == path]
    names = (LORA_WEIGHT_NAME_SAFE, SAFETENSORS_WEIGHTS_NAME)
    files = [file for file in files if file.name in names] or files
    pickles = [file for file in inside if file.suffix in PICKLES]
    if len(files) > 1:
        raise UserError(
            f"{path}: contains more than one LoRA: {', '.join(file.name for file in files)}. Pass the path of one file."
        )
    if pickles and files in ([], pickles):
        raise UserError(
            f"{pickles[0]}: is a pickle, which can run code when it is opened. Save the LoRA as safetensors, the "
            "default of diffusers and PEFT."
        )
    if not files:
        raise UserError(f"{path}: contains no LoRA. Pass a .safetensors file, or a folder with one.")
    return files[0]


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises UserError if it is not one, or is truncated."""
    try:
        handle = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is not a complete safetensors file ({error}). Export the LoRA again.") from None
    with handle as tensors:
        yield tensors


@dataclass(frozen=True)
class LoraPair:
    """The matrices of one layer in a file. a, b: names of A [rank, num_in] and B [num_out, rank]; scale: of BA."""

    a: str
    b: str
    rank: int
    num_in: int
    num_out: int
    scale: float


class AlphaSource(enum.Enum):
    """Source of a file's strength, as text for messages."""

    FILE = "alpha from the file"
    USER = "alpha from the user"
    SAT = "no alpha in the file, using SAT's default of 1"
    ASSUMED = "no alpha in the file, assuming alpha = rank"


@dataclass(frozen=True)
class LoraFile:
    """The header of a LoRA file.

    Attributes:
        pairs: by the full name of the layer in the transformer.
        metadata: recorded by `adapter.export`, {} for other trainers.
        control: shape of the weight of the extra input channels for a control video, None without them.
    """

    path: Path
    pairs: dict[str, LoraPair]
    alpha_source: AlphaSource
    metadata: dict[str, Any]
    control: tuple[int, ...] | None = None

    @property
    def ranks(self) -> list[int]:
        return sorted({pair.rank for pair in self.pairs.values()})

    @property
    def scales(self) -> list[float]:
        return sorted({pair.scale for pair in self.pairs.values()})


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA and its weight in a sum of LoRAs."""

    file: LoraFile
    weight: float


def read_loras(paths: Iterable[str | Path], alpha: float | None, setting: str) -> list[LoraFile]:
    """Read the headers of LoRA files.

    Args:
        alpha: for files that do not contain one.
        setting: config key or flag that alpha comes from, for messages.

    Raises:
        UserError: as for `read_lora`, or alpha is not positive, or no file needs it.
    """
    if alpha is not None and not _is_positive(alpha):
        raise UserError(f"{setting}: {alpha} is not a positive number. Pass the alpha that the LoRA was trained with.")
    files = [read_lora(path, alpha) for path in paths]
    if alpha is not None and all(file.alpha_source is AlphaSource.FILE for file in files):
        names = " and ".join(f"{file.path} contains its alpha (strength {join_values(file.scales)})" for file in files)
        raise UserError(f"{setting}: {names}. Remove {setting}. To change a LoRA's strength, use a weight or scale.")
    return files


def read_lora(path: str | Path, alpha: float | None = None) -> LoraFile:
    """Read the header of a LoRA file in any format of `formats`. alpha: for layers for which the file has none.

    Raises UserError if the file is damaged, has tensors that are not a LoRA of this transformer, or is more than a
    LoRA (DoRA, biases, changed base weights).
    """
    file = lora_file(path)
    with open_safetensors(file) as tensors:
        header: dict[str, str] = tensors.metadata() or {}
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
        dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
        alphas = {name: tensors.get_tensor(name).flatten().tolist() for name in shapes if name.endswith(".alpha")}
    control = shapes.pop(CONTROL_KEY, None)
    if control is not None and len(control) != 2:
        raise UserError(f"{file}: '{CONTROL_KEY}' has shape {control}, not [out, in]. Export the LoRA again.")
    keys = {name: parse_key(name) for name in shapes}
    metadata = _own_metadata(file, header)
    config = _adapter_config(file, header, shapes, alpha)
    _refuse_other_adapters(file, config, shapes)
    if metadata.pop(ALPHA_IN_WEIGHTS, False):
        alpha, source = None, AlphaSource.FILE
    elif alpha is not None:
        source = AlphaSource.USER
    elif any(key and key.is_sat for key in keys.values()):
        alpha, source = SAT_ALPHA, AlphaSource.SAT
    else:
        source = AlphaSource.ASSUMED
    pairs, is_incomplete = {}, False  # incomplete: the file has no alpha for some layer
    for layer, names in _names_by_layer(file, keys).items():
        a, b = names.get("A", ""), names.get("B", "")
        shape_a, shape_b = shapes.get(a, ()), shapes.get(b, ())
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or not shape_a[0]:
            raise UserError(
                f"{file}: layer {layer} is damaged: A has shape {shape_a or 'none'} and B has shape "
                f"{shape_b or 'none'}, not [rank, in] and [out, rank]. Export the LoRA again."
            )
        if others := {dtypes[a], dtypes[b]}.difference(FLOATS):
            raise UserError(f"{file}: layer {layer} is stored as {min(others)}. Export the LoRA in bf16 or fp32.")
        _check_rank(file, config, layer, shape_a[0])
        rank, layer_alpha = shape_a[0], alphas.get(names.get("alpha", ""))
        if layer_alpha is None:
            scale = _config_scale(file, config, layer, rank)
        else:
            scale = _check_alpha(file, layer, layer_alpha[0] if len(layer_alpha) == 1 else layer_alpha) / rank
        if scale is None:
            is_incomplete, scale = True, 1.0 if alpha is None else alpha / rank
        pairs[layer] = LoraPair(a, b, rank, shape_a[1], shape_b[0], scale)
    return LoraFile(file, pairs, source if is_incomplete else AlphaSource.FILE, metadata, control)


def describe_lora(file: LoraFile, setting: str) -> list[str]:
    """Return a line that describes a LoRA file, and a warning if its strength is a guess.

    setting: config key or flag to pass an alpha with.
    """
    ranks, scales = join_values(file.ranks), join_values(file.scales)
    with_control = ", with a control video" if file.control else ""
    lines = [
        f"LoRA {file.path}: {len(file.pairs)} layers, rank {ranks}, strength {scales} "
        f"({file.alpha_source.value}){with_control}"
    ]
    if file.alpha_source is AlphaSource.ASSUMED:
        lines.append(
            f"warning: {file.path}: contains no alpha, so alpha = rank is assumed, as in diffusers. If it was trained "
            f"with a different alpha, pass {setting} (CogKit trains with alpha 64 at rank 128, SAT with alpha 1)."
        )
    return lines


def join_values(values: Sequence[object], limit: int = 4) -> str:
    """Format the first few values."""
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")


def _mapping(file: Path, text: str | None) -> dict[str, Any]:
    """Parse a JSON mapping in a file, {} for None. Raises UserError if it is damaged."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its settings are not valid JSON ({error}). Export the LoRA again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: its settings are {text:.60}, not a mapping. Export the LoRA again.")
    return value


def _is_number(value: Any) -> bool:
    # An integer in JSON may be too large for a float.
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_modes(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(mode in MODES and _is_positive(probability) and probability <= 1 for mode, probability in value.items())
    )


def _are_buckets(value: Any) -> bool:
    try:
        return _are_texts(value) and bool([ClipShape.parse(text) for text in value])
    except UserError:
        return False


# Checks of the settings that cogds records and uses.
_IS_VALID: dict[str, Callable[[Any], bool]] = {
    ALPHA_IN_WEIGHTS: lambda value: isinstance(value, bool),
    "base_model": _is_text,
    "task": lambda value: value in TASKS,
    "rank": _is_positive,
    "alpha": _is_positive,
    "targets": _are_texts,
    "init_from": lambda value: value is None or _is_text(value),
    "image_latents": lambda value: _is_text(value) and value in IMAGE_LATENT_CONVENTIONS,
    "image_latent_factor": _is_positive,
    "modes": _are_modes,
    "context_latents": lambda value: type(value) is int and value >= MIN_CONTEXT,
    "keyframe_times": lambda value: isinstance(value, list) and all(_is_number(time) and time >= 0 for time in value),
    "buckets": _are_buckets,
    "fps": _is_positive,
    "trigger_words": _are_texts,
    "instance_prompt": _is_text,
    "example_prompt": _is_text,
    "control": lambda value: isinstance(value, bool),
    "exported_scale": _is_number,
    "comfyui_strength": _is_positive,
}


def _own_metadata(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Return cogds' settings in the header, {} if there are none. Raises UserError for invalid values."""
    metadata = _mapping(file, header.get(OWN_METADATA_KEY))
    for name, is_valid in _IS_VALID.items():
        if name in metadata and not is_valid(metadata[name]):
            raise UserError(
                f"{file}: {name} in its settings is {_as_json(metadata[name])}, which is not valid. Export the LoRA "
                "again, or upgrade cogds if a newer version wrote the file."
            )
    return metadata


def _as_json(value: object) -> str:
    """The start of a value as JSON, for messages."""
    return f"{json.dumps(value):.60}"


def _adapter_config(file: Path, header: Mapping[str, str], names: Iterable[str], alpha: float | None) -> Config:
    """Return the file's LoraConfig from the place where its format stores it, or {} if there is none."""
    text = header.get(LORA_ADAPTER_METADATA_KEY, header.get(FINETRAINERS_KEY))
    is_peft, beside = any(name.startswith(PEFT_PREFIX) for name in names), file.parent / CONFIG_NAME
    if text is None and (is_peft or file.name == SAFETENSORS_WEIGHTS_NAME) and beside.is_file():
        file, text = beside, beside.read_text(encoding="utf-8", errors="replace")
    if text is None and is_peft and alpha is None:
        raise UserError(f"{file}: {CONFIG_NAME} is missing in its folder. Copy the whole folder that PEFT wrote.")
    config = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in _mapping(file, text).items()}
    rank, rslora = config.get("r", 1), config.get("use_rslora")
    problem = ""
    if "lora_alpha" in config and not _is_positive(config["lora_alpha"]):
        problem = f"lora_alpha is {_as_json(config['lora_alpha'])}, not a positive number"
    elif type(rank) is not int or rank < 1:
        problem = f"r is {_as_json(rank)}, not a positive integer"
    elif rslora not in (None, True, False):
        problem = f"use_rslora is {_as_json(rslora)}, not true or false"
    for name in ("alpha_pattern", "rank_pattern"):
        pattern = config.get(name)
        if pattern is not None and not (isinstance(pattern, dict) and all(map(_is_positive, pattern.values()))):
            problem = f"{name} is {_as_json(pattern)}, not a mapping to positive numbers"
        for key in pattern if not problem and pattern else ():
            try:
                re.compile(key)
            except re.error as error:
                problem = f"'{key:.60}' in {name} is not a regular expression ({error})"
    if problem:
        raise UserError(f"{file}: {problem}. Export the LoRA again.")
    return config


def _refuse_other_adapters(file: Path, config: Config, names: Iterable[str]) -> None:
    """Raise UserError if the adapter is more than two matrices and a strength per layer."""
    dora = [name for name in names if "dora_scale" in name or "lora_magnitude_vector" in name]
    biases = [name for name in names if name.endswith(".bias")]
    init = config.get("init_lora_weights")
    if dora or config.get("use_dora"):
        problem = "is a DoRA"
    elif biases or config.get("lora_bias") or config.get("bias") not in (None, "none"):
        problem = "has biases"
    elif config.get("peft_type") not in (None, "LORA"):
        problem = f"is an adapter of type {config['peft_type']}"
    elif beyond := [name for name in BEYOND_LORA if config.get(name)]:
        problem = f"was trained with {beyond[0]}={config[beyond[0]]}"
    elif init not in KEEPS_BASE:
        problem = f"was trained with init_lora_weights={init}, which changes the base model"
    else:
        return
    raise UserError(f"{file}: {problem}, which cogds does not support. Pass a plain LoRA, or convert it to one.")


def _names_by_layer(file: Path, keys: Mapping[str, Key | None]) -> dict[str, dict[str, str]]:
    """Return the names of each layer's A, B and alpha in the file. Raises UserError for any other tensor."""
    if unknown := [name for name, key in keys.items() if key is None]:
        problem = "is not a LoRA" if len(unknown) == len(keys) else "is more than a LoRA"
        raise UserError(
            f"{file}: {problem} of a CogVideoX transformer: {len(unknown)} of its {len(keys)} tensors have unknown "
            f"names, such as '{unknown[0]}'. Pass a LoRA of CogVideoX in one of the formats in docs/operations.md."
        )
    layers: dict[str, dict[str, str]] = {}
    for name, key in keys.items():
        assert key is not None
        parts = layers.setdefault(key.layer, {})
        if key.part in parts:
            raise UserError(
                f"{file}: '{parts[key.part]}' and '{name}' are both {key.part} of layer {key.layer}. Save one adapter "
                "per file."
            )
        parts[key.part] = name
    if not layers:
        raise UserError(f"{file}: contains no tensors. Export the LoRA again.")
    return layers


def _check_rank(file: Path, config: Config, layer: str, rank: int) -> None:
    """Raise UserError if the config has a different rank. It then belongs to a different file, as does its alpha."""
    config_rank = _layer_value(config, "rank_pattern", layer, "r")
    if config_rank not in (None, rank):
        raise UserError(
            f"{file}: layer {layer} has rank {rank}, but the LoRA's config says {config_rank}. Export the LoRA again."
        )


def _layer_value(config: Config, pattern: str, layer: str, default: str) -> Any:
    """Return the config's value for a layer by PEFT's rules: from `pattern`, otherwise from `default`, or None."""
    patterns = config.get(pattern) or {}
    return patterns.get(get_pattern_key(patterns, layer), config.get(default))


def _config_scale(file: Path, config: Config, layer: str, rank: int) -> float | None:
    """Return the scale of BA in one layer by the config, or None if it has no alpha."""
    alpha = _layer_value(config, "alpha_pattern", layer, "lora_alpha")
    if alpha is None:
        return None
    return _check_alpha(file, layer, alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_alpha(file: Path, layer: str, alpha: Any) -> float:
    if not _is_positive(alpha):
        raise UserError(
            f"{file}: layer {layer} has alpha {alpha!r}, which is not a positive number. Export the LoRA again."
        )
    return alpha
