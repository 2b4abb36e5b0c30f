"""A model folder in diffusers' layout, and loading of its parts.

`find_model` checks a hub id or a path and returns a ModelFolder. It reads only JSON, so problems are reported before
any weight is downloaded or loaded. The transformer, the VAE and the text encoder are loaded separately, because
training never holds all three. Only safetensors and JSON are read: pickles and a folder's own Python code could run
anything.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLCogVideoX
from huggingface_hub import HfApi, snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from cogds.core.family import IMAGE_PIPELINE, TEXT_PIPELINE, Family
from cogds.core.geometry import ModelGeometry
from cogds.core.vae_memory import VaeSize
from cogds.errors import BUGS, UserError, brief
from cogds.model.cudnn import check_cudnn
from cogds.model.transformer.forward import Transformer
from cogds.model.transformer.quantize import PackedLinear, pack_block

# Otherwise, every rank shows a progress bar for every part that it loads.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

logger = logging.getLogger(__name__)

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHT_PARTS = ("transformer", "vae", "text_encoder")
# Keys: values of `train.precision`.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES_MODEL = "builtin:shapes"  # a tiny trained model that comes with cogds (docs/shapes.md)
HUB_TIMEOUT_S = 10.0  # without it, the hub client waits for minutes if the network drops packets


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder and its configs.

    hub_id: of a model in the hub's cache, whose weights may not be downloaded yet; else None.
    """

    path: Path
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]
    geometry: ModelGeometry
    hub_id: str | None = None

    def fetch(self, *parts: str) -> None:
        """Download the weights of these parts if they are missing. Every loader calls this first.

        With several ranks, all call it before one of them needs the weights alone: the others wait for the download.
        Raises UserError.
        """
        missing = [part for part in parts if part in WEIGHT_PARTS and not _has_weights(self.path / part)]
        if self.hub_id is None or not missing:
            return
        logger.info("downloading the weights of %s from the hub: %s", self.hub_id, ", ".join(missing))
        failure: Exception | None = None
        try:
            # A snapshot's folder has the name of its commit.
            snapshot_download(self.hub_id, revision=self.path.name, allow_patterns=[f"{part}/*" for part in missing])
        except BUGS:
            raise
        except Exception as error:
            failure = error
        if failure or not all(_has_weights(self.path / part) for part in missing):
            reason = f" ({brief(failure)})" if failure else ""
            raise UserError(
                f"model.path: the weights of {self.hub_id} are not in the hub's cache and cannot be downloaded{reason}."
                f" {_DOWNLOAD_ADVICE.format(id=self.hub_id)}"
            )

    @property
    def family(self) -> Family:
        """What differs between this model and the others of CogVideoX."""
        return self.geometry.family

    @property
    def hidden_size(self) -> int:
        return self.transformer_config["num_attention_heads"] * self.transformer_config["attention_head_dim"]

    @property
    def num_layers(self) -> int:
        return self.transformer_config["num_layers"]

    @cached_property
    def vae_size(self) -> VaeSize:
        """The size of the VAE, without reading its weights."""
        with torch.device("meta"):
            vae = AutoencoderKLCogVideoX.from_config(self.vae_config)
        return VaeSize.from_config(self.vae_config, sum(parameter.numel() for parameter in vae.parameters()))

    @cached_property
    def num_text_parameters(self) -> int:
        """Parameters of T5, without reading its weights."""
        with torch.device("meta"):
            encoder = T5EncoderModel(T5Config.from_dict(_read_json(self.path / "text_encoder/config.json")))
        return sum(parameter.numel() for parameter in encoder.parameters())


_DOWNLOAD_ADVICE = (
    "Check the id and the network, or run `hf download {id} --local-dir FOLDER` on a machine with internet access and "
    "set model.path=FOLDER."
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"model.path: {path} is missing. Pass a complete diffusers model folder.") from None
    except ValueError as error:
        raise UserError(f"model.path: {path} is not valid JSON ({error}). Download the model again.") from None


def find_model(model_path: str, revision: str | None = None, named: str = "model.path") -> ModelFolder:
    """Find a model by local folder or hub id, or `SHAPES_MODEL`. named: the key or flag that names it, for errors.

    Of a hub model, only configs and tokenizer are downloaded, into the hub's cache: `ModelFolder.fetch` does the rest.
    Raises UserError if there is no such model, a part is missing, or it is not a CogVideoX model (`core.family`).
    """
    path = Path(__file__).parents[1] / "shapes/model" if model_path == SHAPES_MODEL else Path(model_path)
    hub_id, files = None, None
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_path):
            raise UserError(
                f"{named}: no such folder: {model_path}. Pass a diffusers model folder or a hub id such as "
                f"zai-org/CogVideoX1.5-5B-I2V, or {SHAPES_MODEL}."
            )
        hub_id = model_path
        path, files = _fetch_configs(hub_id, revision, named)
    pipeline = _read_json(path / "model_index.json").get("_class_name")
    if pipeline not in (IMAGE_PIPELINE, TEXT_PIPELINE):
        raise UserError(
            f"model.path: {path} has the pipeline class {pipeline}, which is not supported. Pass a model with the "
            f"class {IMAGE_PIPELINE} or {TEXT_PIPELINE}, such as CogVideoX1.5-5B-I2V."
        )
    for part in PARTS:
        if not (path / part).is_dir():
            raise UserError(f"model.path: {path} has no {part}/ folder. Download the complete model again.")
        if hub_id is None:  # broken links in the hub's cache are downloaded again
            _check_links(path / part)
    for part in WEIGHT_PARTS:
        if hub_id is None:
            _check_weights(path / part, _file_names(path / part))
        elif files is not None:
            _check_weights(
                path / part, {name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")}
            )
    transformer, vae = _read_json(path / "transformer/config.json"), _read_json(path / "vae/config.json")
    try:
        geometry = ModelGeometry.from_configs(transformer, vae, _read_json(path / "scheduler/scheduler_config.json"))
    except KeyError as error:
        raise UserError(f"model.path: {error} is missing in the configs in {path}. Download the model again.") from None
    except UserError as error:
        raise UserError(f"model.path: {path}/{error}") from None
    if geometry.family.pipeline != pipeline:
        raise UserError(
            f"model.path: {path} has the pipeline class {pipeline}, but a transformer with "
            f"{transformer['in_channels']} input channels, as for {geometry.family.task}. Download the model again."
        )
    return ModelFolder(path, transformer, vae, geometry, hub_id)


def _fetch_configs(model_id: str, revision: str | None, named: str) -> tuple[Path, Collection[str] | None]:
    """Download a model's configs and tokenizer from the hub, and list its files.

    If the hub cannot be reached, use the copy in the local cache. The list is then None.
    """
    files: list[str] | None = None
    # The hub client's exceptions have no common base class, and they all mean the same to the user.
    failure: Exception | None = None
    try:
        info = HfApi().model_info(model_id, revision=revision, timeout=HUB_TIMEOUT_S)
        files = [file.rfilename for file in info.siblings or ()]
    except BUGS:
        raise
    except Exception as error:
        failure = error
    try:
        folder = snapshot_download(
            model_id, revision=revision, allow_patterns=["*.json", "tokenizer/*"], local_files_only=failure is not None
        )
    except BUGS:
        raise
    except Exception as error:
        raise UserError(
            f"{named}: no such folder: {model_id}, and it cannot be downloaded from the hub "
            f"({brief(failure or error)}). {_DOWNLOAD_ADVICE.format(id=model_id)}"
        ) from None
    return Path(folder), files


def _check_links(folder: Path) -> None:
    """Raise UserError for a broken link. The models of a full fine-tune link to parts of their base model."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"model.path: {path} is a link to {path.readlink()}, which is gone. Put the model back that it belongs "
                "to, or copy its vae, text_encoder, tokenizer and scheduler into this folder."
            )


def _has_weights(folder: Path) -> bool:
    """Whether the weights of a part are complete."""
    try:
        _check_weights(folder, _file_names(folder))
    except UserError:
        return False
    return True


def _file_names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()}


def _check_weights(folder: Path, names: Collection[str]) -> None:
    """Raise UserError if a part has no safetensors files, or lacks files named by its index. names: of its files."""
    indexes = map(_read_json, folder.glob("*.safetensors.index.json"))
    shards = {name for index in indexes for name in index["weight_map"].values()}
    for name in sorted(shards):
        if name not in names:
            raise UserError(f"model.path: {folder} lacks {name}, a file of its index. Download the model again.")
    if shards or any(name.endswith(".safetensors") for name in names):
        return
    if pickles := sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))):
        raise UserError(
            f"model.path: the weights in {folder} are pickles ({pickles[0]}), which can run code when they are opened. "
            "Pass a model with .safetensors files."
        )
    raise UserError(f"model.path: {folder} has no .safetensors files. Download the complete model again.")


def load_alphas_cumprod(model: ModelFolder) -> torch.Tensor:
    """Return the scheduler's abar table [T], in the precision that it computes it in."""
    scheduler_class = getattr(diffusers, model.family.scheduler)
    return scheduler_class.from_pretrained(model.path, subfolder="scheduler").alphas_cumprod


def load_transformer(
    model: ModelFolder,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: str = "none",
    fp8_matmul: bool = False,
) -> Transformer:
    """Load the transformer, frozen.

    Weights are read one by one, so only `device` holds all of them, and with quantization no device holds all of them
    unpacked. Raises UserError if the files do not match the config.
    """
    # Drawing random weights only to replace them takes minutes for 5.6 B weights on a CPU.
    transformer = build_transformer(model, dtype, "meta", quantization, fp8_matmul).to_empty(device=device)
    transformer.compute_positions()

    def put(place: Any, weight: Any) -> None:
        if isinstance(place, PackedLinear):
            place.fill(weight[:].to(device, dtype))
        else:
            place.data.copy_(weight[:])

    fill_transformer(transformer, model, put)
    return transformer


def build_transformer(
    model: ModelFolder,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: str = "none",
    fp8_matmul: bool = False,
) -> Transformer:
    """Build the transformer with random weights, frozen, in the caller's context (such as `zero.Init`).

    device: "meta" for a transformer without weights, whose quantized layers are empty. `fill_transformer` sets them.
    quantization, fp8_matmul: of the blocks (`quantize`). Only one block at a time has unpacked weights.
    """

    def build(num_layers: int) -> Transformer:
        return Transformer.from_config({**config, "num_layers": num_layers}).requires_grad_(False)

    config, before = model.transformer_config, torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # because a float32 copy may not fit into memory
    try:
        with torch.device(device):
            if quantization == "none" and not fp8_matmul:
                return build(model.num_layers)
            transformer = build(0)
            for _ in range(model.num_layers):
                block = build(1).transformer_blocks[0]
                pack_block(block, quantization, fp8_matmul, fill=torch.device(device).type != "meta")
                transformer.transformer_blocks.append(block)
            transformer.register_to_config(num_layers=model.num_layers)
            return transformer
    finally:
        torch.set_default_dtype(before)


def fill_transformer(transformer: Transformer, model: ModelFolder, put: Callable[[Any, Any], None]) -> None:
    """Call `put` with every parameter, buffer and `PackedLinear` and its safetensors slice, in the order of the files.

    Fixed position embeddings (CogVideoX-2b), which are computed, may be missing in the files. Raises UserError if the
    files do not match the config.
    """
    packed = {f"{name}.weight": layer for name, layer in transformer.named_modules() if isinstance(layer, PackedLinear)}
    buffers = dict(transformer.named_buffers())
    tensors: dict[str, Any] = {**dict(transformer.named_parameters()), **packed, **buffers}
    computed = buffers.keys() - transformer.state_dict().keys()
    missing, folder = tensors.keys() - computed, model.path / "transformer"
    for name, weight in transformer_weights(model):
        if name not in tensors:
            raise UserError(
                f"{folder}: weight '{name}' is in the files, but not in the model of config.json. Download the model "
                "again."
            )
        # ZeRO-3 keeps the shape of a sharded weight in an attribute.
        shape = tuple(getattr(tensors[name], "ds_shape", tensors[name].shape))
        if shape != tuple(weight.get_shape()):
            raise UserError(
                f"{folder}: weight '{name}' has shape {tuple(weight.get_shape())}, but config.json requires {shape}. "
                "Download the model again."
            )
        put(tensors[name], weight)
        missing.discard(name)
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are missing in the files, such as '{min(missing)}'. Download the model "
            "again."
        )


def empty_transformer(model: ModelFolder) -> Transformer:
    """Build the transformer on the meta device, without memory for weights, to read names and sizes."""
    return build_transformer(model, torch.float32, "meta")


def transformer_weights(model: ModelFolder) -> Iterator[tuple[str, Any]]:
    """Yield the name and safetensors slice of every weight. Only `slice[:]` reads the data."""
    model.fetch("transformer")
    for file in sorted((model.path / "transformer").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_slice(name)


def load_vae(model: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLCogVideoX:
    """Load the VAE, frozen and in eval mode. Raises UserError if this GPU would compute it wrongly (`cudnn`)."""
    check_cudnn(torch.device(device), dtype)
    model.fetch("vae")
    vae = AutoencoderKLCogVideoX.from_pretrained(model.path, subfolder="vae", dtype=dtype, use_safetensors=True)
    return vae.requires_grad_(False).eval().to(device)


def load_tokenizer(model: ModelFolder) -> Any:
    """Load the text encoder's tokenizer. Raises UserError if it is not one of transformers' own classes."""
    try:
        return AutoTokenizer.from_pretrained(model.path / "tokenizer", trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise UserError(
            f"{model.path / 'tokenizer'}: the tokenizer cannot be loaded ({reason}). Download the complete model again."
        ) from None


def are_truncated(captions: Sequence[str], model: ModelFolder) -> list[bool]:
    """Return for each caption whether it exceeds the model's text length and is truncated."""
    tokenizer, limit = load_tokenizer(model), model.geometry.text_tokens
    return [len(ids) > limit for ids in tokenizer(list(captions)).input_ids] if captions else []


class TextEncoder:
    """T5 and its tokenizer. The states equal those of the pipeline's `_get_t5_prompt_embeds`."""

    def __init__(self, model: ModelFolder, dtype: torch.dtype, device: torch.device | str):
        self.num_tokens = model.geometry.text_tokens
        self.tokenizer = load_tokenizer(model)
        model.fetch("text_encoder")
        # Straight onto the device: the ranks of a node would hold 9.5 GB each in host memory.
        encoder = T5EncoderModel.from_pretrained(
            model.path, subfolder="text_encoder", dtype=dtype, use_safetensors=True, device_map={"": device}
        )
        self.encoder = encoder.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, caption: str) -> torch.Tensor:
        """Encode one caption: [text_tokens, dim], padded to the model's length, without an attention mask."""
        tokens = self.tokenizer(
            caption, padding="max_length", max_length=self.num_tokens, truncation=True, return_tensors="pt"
        )
        return self.encoder(tokens.input_ids.to(self.encoder.device))[0][0]
