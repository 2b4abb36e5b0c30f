"""A LoRA extracted from a fine-tuned model: the best approximation, by singular values, of what training changed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogds.errors import UserError
from cogds.model.load import ModelFolder, empty_transformer, transformer_weights
from cogds.model.lora.adapter import linear_layers
from cogds.model.lora.convert import Adapter, Layer
from cogds.model.weight_files import PATCH_EMBEDDING, scale_image_channels

# Matrices up to this size are decomposed exactly. For larger ones, a randomized decomposition is many times faster.
EXACT_SIZE = 1024
OVERSAMPLING, POWER_ITERATIONS = 32, 4


@dataclass(frozen=True)
class Extraction:
    """An extracted LoRA and what it lacks.

    Attributes:
        error: norm of the difference between the fine-tuned weights and base with LoRA, relative to the whole change.
        layer_errors: the same for each layer that has a LoRA, relative to the change of that layer.
        outside: share of the squared change that is in weights without a LoRA, such as norms and biases.
    """

    adapter: Adapter
    error: float
    layer_errors: Mapping[str, float]
    outside: float

    @property
    def num_bytes(self) -> int:
        """Size of the LoRA."""
        return sum(layer.a.nbytes + layer.b.nbytes for layer in self.adapter.layers.values())


def extract_lora(
    base: ModelFolder, tuned: ModelFolder, rank: int, dtype: torch.dtype, metadata: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> Extraction:  # fmt: skip
    """Return the LoRA of this rank that is nearest to the fine-tuned model, in `dtype`. Reads one weight at a time.

    The base's weights are first rounded to the dtype of the fine-tuned model, as training did. Otherwise, the rounding
    would count as a change of every weight. An `image_latent_factor` in the metadata is in the fine-tuned model's patch
    embedding (`FullExport`). It does not become a part of the LoRA, which has it in its metadata.

    Raises UserError if the models differ in their weights' names or shapes, or not at all, or a weight is not finite.
    """
    factor, in_channels = metadata.get("image_latent_factor", 1.0), base.transformer_config["in_channels"]
    linears = linear_layers(empty_transformer(base))
    tuned_weights = dict(transformer_weights(tuned))
    layers: dict[str, Layer] = {}
    errors: dict[str, float] = {}
    total = residual = outside = 0.0
    for name, weight in transformer_weights(base):
        other = tuned_weights.pop(name, None)
        if other is None or other.get_shape() != weight.get_shape():
            raise UserError(
                f"{tuned.path}: weight '{name}' of {base.path} is missing or has another shape. Pass with --model the "
                "model that the fine-tuning started from."
            )
        after = other[:]
        before = weight[:].to(after.dtype)
        if name == PATCH_EMBEDDING and factor != 1.0:
            before = scale_image_channels(before.float(), in_channels, factor).to(after.dtype)
        change = after.float() - before.float()
        if name == PATCH_EMBEDDING and factor != 1.0:
            change = scale_image_channels(change, in_channels, 1 / factor)
        square = float(change.double().square().sum())
        if not math.isfinite(square):
            raise UserError(f"{tuned.path}: weight '{name}' is not finite. Pass a model from before training diverged.")
        total += square
        layer = name.removesuffix(".weight")
        if layer == name or layer not in linears or square == 0:
            residual += square
            outside += square
            continue
        b, a = (part.to(dtype) for part in _decompose(change.to(device), rank))
        left = float((change - (b.float() @ a.float()).cpu()).double().square().sum())
        layers[layer] = Layer(a.cpu().contiguous(), b.cpu().contiguous(), 1.0)
        errors[layer], residual = (left / square) ** 0.5, residual + left
    if tuned_weights:
        raise UserError(f"{tuned.path}: weight '{min(tuned_weights)}' is not in {base.path}. Pass the right --model.")
    if not layers:
        raise UserError(f"{tuned.path}: no linear layer differs from {base.path}. Pass a fine-tuned model.")
    return Extraction(Adapter(layers, dict(metadata)), (residual / total) ** 0.5, errors, outside / total)


def _decompose(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B [out, r] and A [r, in] whose product is nearest to the matrix, with equal norms, r <= rank."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_SIZE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            size = min(rank + OVERSAMPLING, *matrix.shape)
            left, values, transposed = torch.svd_lowrank(matrix, size, POWER_ITERATIONS)
            right = transposed.T
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
