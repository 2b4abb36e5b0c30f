"""A model folder in diffusers' layout, and its parts loaded one at a time.

`find_model` turns a hub id or a path into a ModelFolder after reading nothing but JSON, so that whatever is wrong with
a model is said before any weight is loaded. The loaders then bring the transformer, the VAE or the text encoder, each
alone: training never holds all three. They read safetensors and JSON only: a pickle or a folder's own Python code could
do anything.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from huggingface_hub import HfApi, snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer, T5EncoderModel

from cogds.core.geometry import ModelGeometry
from cogds.core.vae_memory import VaeSize
from cogds.errors import BUGS, UserError, brief
from cogds.model.transformer.forward import Transformer
from cogds.model.transformer.quantize import PackedLinear, pack_block

# A bar for every part that loads, on every rank, says nothing that a user asked for.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINE_CLASS = "CogVideoXImageToVideoPipeline"
# Of `train.precision`.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HUB_TIMEOUT_S = 10.0  # by itself the hub's client waits minutes for a network that swallows packets


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder: where it is and what its configs say."""

    path: Path
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]
    geometry: ModelGeometry

    @property
    def hidden_size(self) -> int:
        return self.transformer_config["num_attention_heads"] * self.transformer_config["attention_head_dim"]

    @property
    def num_layers(self) -> int:
        return self.transformer_config["num_layers"]

    @cached_property
    def vae_size(self) -> VaeSize:
        """The VAE's size, found without reading its weights."""
        with torch.device("meta"):
            vae = AutoencoderKLCogVideoX.from_config(self.vae_config)
        return VaeSize.from_config(self.vae_config, sum(parameter.numel() for parameter in vae.parameters()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"model file {path} is missing: model.path must be a whole diffusers model folder") from None
    except ValueError as error:
        raise UserError(f"model file {path} is not JSON ({error}): fetch the model again") from None


def find_model(model_path: str, revision: str | None = None) -> ModelFolder:
    """The model at a local folder, or at a hub id (downloaded once into the hub's cache).

    Raises UserError where there is neither, where a part is missing, or where it is not an image-to-video CogVideoX.
    """
    path = Path(model_path)
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_path):
            raise UserError(
                f"model.path: there is no folder {model_path}; give a diffusers model folder or a hub id such as "
                "zai-org/CogVideoX1.5-5B-I2V"
            )
        path = _fetch(model_path, revision)
    index = _read_json(path / "model_index.json")
    if index.get("_class_name") != PIPELINE_CLASS:
        raise UserError(
            f"model.path: {path} holds a {index.get('_class_name')}; this trains image-to-video models only: give a "
            f"folder whose model_index.json says {PIPELINE_CLASS}, such as CogVideoX1.5-5B-I2V"
        )
    for part in PARTS:
        if not (path / part).is_dir():
            raise UserError(f"model.path: {path} has no {part}/ folder: fetch the whole model again")
    for part in ("transformer", "vae", "text_encoder"):
        _check_weights(path / part)
    transformer, vae = _read_json(path / "transformer/config.json"), _read_json(path / "vae/config.json")
    try:
        geometry = ModelGeometry.from_configs(transformer, vae)
    except KeyError as error:
        raise UserError(f"model.path: the configs in {path} lack {error}: fetch the whole model again") from None
    if transformer["in_channels"] != 2 * vae["latent_channels"]:
        raise UserError(
            f"model.path: the transformer in {path} takes {transformer['in_channels']} channels where image-to-video "
            f"needs {2 * vae['latent_channels']} (latents and image latents): this is not an image-to-video model"
        )
    return ModelFolder(path, transformer, vae, geometry)


def _fetch(model_id: str, revision: str | None) -> Path:
    """The hub's copy of a model, downloaded; where the hub does not answer, the whole copy that it left here before."""
    # The hub client's many exceptions have no common base, and each means the same to the user.
    failure: Exception | None = None
    try:
        HfApi().model_info(model_id, revision=revision, timeout=HUB_TIMEOUT_S)
    except BUGS:
        raise
    except Exception as error:
        failure = error
    try:
        return Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=["*.json", "*/*"], local_files_only=failure is not None
            )
        )
    except BUGS:
        raise
    except Exception as error:
        raise UserError(
            f"model.path: there is no folder {model_id}, and it could not be fetched from the hub as a model id "
            f"({brief(failure or error)}); check the id and the network, or fetch it on a machine with "
            f"internet, `hf download {model_id} --local-dir FOLDER`, and set model.path=FOLDER"
        ) from None


def _check_weights(folder: Path) -> None:
    """Raise UserError where a part has no safetensors files, or not all that its index names."""
    indexes = map(_read_json, folder.glob("*.safetensors.index.json"))
    shards = {name for index in indexes for name in index["weight_map"].values()}
    for name in sorted(shards):
        if not (folder / name).is_file():
            raise UserError(f"model.path: {folder} lacks {name}, which its index names: fetch the whole model again")
    if shards or any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")):
        raise UserError(
            f"model.path: the weights in {folder} are pickles ({pickles[0]}), which can run code when they are opened, "
            "so they are not: give a model with .safetensors files"
        )
    raise UserError(f"model.path: {folder} holds no .safetensors file: fetch the whole model again")


def load_alphas_cumprod(model: ModelFolder) -> torch.Tensor:
    """The schedule's abar table [T], in the precision that the scheduler computes it in."""
    name = _read_json(model.path / "scheduler/scheduler_config.json").get("_class_name")
    scheduler_class = CogVideoXDPMScheduler if name == "CogVideoXDPMScheduler" else CogVideoXDDIMScheduler
    scheduler = scheduler_class.from_pretrained(model.path, subfolder="scheduler")
    if scheduler.config.prediction_type != "v_prediction":
        raise UserError(
            f"the scheduler in {model.path} predicts '{scheduler.config.prediction_type}'; CogVideoX predicts "
            "'v_prediction': check scheduler/scheduler_config.json"
        )
    return scheduler.alphas_cumprod


def load_transformer(
    model: ModelFolder,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: str = "none",
    fp8_matmul: bool = False,
) -> Transformer:
    """The transformer with its weights, frozen. Read one by one: only `device` ever holds all of them, and where they
    are packed (`build_transformer`) nothing does.

    Raises UserError where the files and the config disagree on a weight.
    """
    transformer = build_transformer(model, dtype, device, quantization, fp8_matmul, fill=False)

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
    fill: bool = True,
) -> Transformer:
    """The transformer with random weights, frozen, as the caller's context has it (`zero.Init`).

    quantization, fp8_matmul: of the blocks (`quantize`); only one block at a time holds its full weights.
    fill: false leaves what is packed without weights, for `fill_transformer` to give.
    """

    def build(num_layers: int) -> Transformer:
        return Transformer.from_config({**config, "num_layers": num_layers}).requires_grad_(False)

    config, before = model.transformer_config, torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a float32 copy of it might not fit
    try:
        with torch.device(device):
            if quantization == "none" and not fp8_matmul:
                return build(model.num_layers)
            transformer = build(0)
            for _ in range(model.num_layers):
                block = build(1).transformer_blocks[0]
                pack_block(block, quantization, fp8_matmul, fill)
                transformer.transformer_blocks.append(block)
            transformer.register_to_config(num_layers=model.num_layers)
            return transformer
    finally:
        torch.set_default_dtype(before)


def fill_transformer(transformer: Transformer, model: ModelFolder, put: Callable[[Any, Any], None]) -> None:
    """Call `put` with every parameter, buffer and `PackedLinear` and its slice of a safetensors file, in their order.

    Raises UserError where the files and the config disagree on a weight.
    """
    packed = {f"{name}.weight": layer for name, layer in transformer.named_modules() if isinstance(layer, PackedLinear)}
    wanted = {**dict(transformer.named_parameters()), **packed}
    tensors: dict[str, Any] = {**wanted, **dict(transformer.named_buffers())}
    missing = set(wanted)
    for name, weight in transformer_weights(model):
        if name not in tensors:
            raise UserError(
                f"the transformer's files in {model.path} hold '{name}', which its config.json does not have"
            )
        # Where ZeRO-3 has shared a weight out, the whole one's shape stands beside it.
        shape = tuple(getattr(tensors[name], "ds_shape", tensors[name].shape))
        if shape != tuple(weight.get_shape()):
            raise UserError(
                f"weight '{name}' in {model.path} is {tuple(weight.get_shape())}, config.json says {shape}: "
                "fetch the model again"
            )
        put(tensors[name], weight)
        missing.discard(name)
    if missing:
        raise UserError(
            f"the transformer's files in {model.path} lack {len(missing)} weights, such as '{min(missing)}'"
        )


def empty_transformer(model: ModelFolder) -> Transformer:
    """The transformer's layers without memory for their weights: to look at names and sizes."""
    return build_transformer(model, torch.float32, "meta")


def transformer_weights(model: ModelFolder) -> Iterator[tuple[str, Any]]:
    """Name and safetensors slice of every weight of the transformer; `slice[:]` reads it, and nothing else does."""
    for file in sorted((model.path / "transformer").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_slice(name)


def load_vae(model: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLCogVideoX:
    """The VAE, frozen, in eval mode."""
    vae = AutoencoderKLCogVideoX.from_pretrained(model.path, subfolder="vae", dtype=dtype, use_safetensors=True)
    return vae.requires_grad_(False).eval().to(device)


def load_tokenizer(model: ModelFolder) -> Any:
    """The text encoder's tokenizer. Raises UserError where the folder holds none that transformers itself knows."""
    try:
        return AutoTokenizer.from_pretrained(model.path / "tokenizer", trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise UserError(
            f"the tokenizer in {model.path / 'tokenizer'} cannot be loaded ({reason}): fetch the whole model again"
        ) from None


def num_truncated(captions: Sequence[str], model: ModelFolder) -> int:
    """How many captions are longer than the model's text length, so that their ends are not seen."""
    tokenizer, limit = load_tokenizer(model), model.geometry.text_tokens
    return sum(len(ids) > limit for ids in tokenizer(list(captions)).input_ids) if captions else 0


class TextEncoder:
    """T5 and its tokenizer: captions in, states out, exactly as the pipeline's `_get_t5_prompt_embeds`."""

    def __init__(self, model: ModelFolder, dtype: torch.dtype, device: torch.device | str):
        self.num_tokens = model.geometry.text_tokens
        self.tokenizer = load_tokenizer(model)
        encoder = T5EncoderModel.from_pretrained(
            model.path, subfolder="text_encoder", dtype=dtype, use_safetensors=True
        )
        self.encoder = encoder.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def encode(self, caption: str) -> torch.Tensor:
        """States [text_tokens, dim] of one caption: padded to the model's length, no attention mask."""
        tokens = self.tokenizer(
            caption, padding="max_length", max_length=self.num_tokens, truncation=True, return_tensors="pt"
        )
        return self.encoder(tokens.input_ids.to(self.encoder.device))[0][0]
