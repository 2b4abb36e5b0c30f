"""The transformer's memory-bound operations, with as few passes over the sequence as possible without a compiler.

Each is an autograd function over one sequence that starts with the text tokens. It saves what the plain operations
would save, without copies in between. `torch.compile` traces and fuses them further. The norms' own weights get
gradients only if they are trained, that is in a full fine-tune.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from cogds.model.transformer.quantize import Packed, PackedLinear, packed_matmul, packed_matmul_backward

Tensors = tuple[torch.Tensor | None, ...]


class Modulation(NamedTuple):
    """Shift, scale and gate for video and text tokens, each [B, 1, D], in the order of CogVideoXLayerNormZero."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor
    text_shift: torch.Tensor
    text_scale: torch.Tensor
    text_gate: torch.Tensor


def _split_text(x: torch.Tensor, num_text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the text tokens and of the video tokens."""
    return x[:, :num_text], x[:, num_text:]


def _without_autocast(x: torch.Tensor) -> torch.autocast | contextlib.nullcontext[None]:
    """Disable autocast, which on CUDA would run a norm in float32, but not the norm's backward pass."""
    return torch.autocast("cuda", enabled=False) if x.is_cuda else contextlib.nullcontext()


def _norm_backward(
    needs: Sequence[bool], gradient: torch.Tensor, x: torch.Tensor, *norm: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of LayerNorm(x) for x, weight and bias, None for those that are not needed.

    needs: which are needed, in the same order. norm: weight, bias, mean and reciprocal standard deviation.
    """
    weight, bias, mean, rstd = norm
    backward = torch.ops.aten.native_layer_norm_backward
    gradients = backward(gradient, x, [x.shape[-1]], mean, rstd, weight, bias, list(needs))
    return tuple(value if is_needed else None for value, is_needed in zip(gradients, needs))


# All tokens are modulated like those of the video. Then the text tokens, which are few, are overwritten.
class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, num_text: int,
        *modulation: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        shift, scale, text_shift, text_scale = modulation
        with _without_autocast(x):
            normed, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
        out = torch.addcmul(shift, normed, 1 + scale)
        out[:, :num_text].copy_(torch.addcmul(text_shift, normed[:, :num_text], 1 + text_scale))
        ctx.save_for_backward(x, weight, bias, mean, rstd, scale, text_scale)
        ctx.eps, ctx.num_text = eps, num_text
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Tensors:
        x, weight, bias, mean, rstd, scale, text_scale = ctx.saved_tensors
        text_grad, video_grad = _split_text(gradient, ctx.num_text)
        modulation_grads: list[torch.Tensor | None] = [None] * 4
        if any(ctx.needs_input_grad[5:]):  # the layers that produce shift and scale are trained
            normed = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, ctx.eps)[0]
            text, video = _split_text(normed, ctx.num_text)
            modulation_grads = [
                video_grad.sum(1, keepdim=True),
                (video_grad * video).sum(1, keepdim=True),
                text_grad.sum(1, keepdim=True),
                (text_grad * text).sum(1, keepdim=True),
            ]
        normed_grad = gradient * (1 + scale)
        normed_grad[:, : ctx.num_text].copy_(text_grad * (1 + text_scale))
        norm_grads = _norm_backward(ctx.needs_input_grad[:3], normed_grad, x, weight, bias, mean, rstd)
        return *norm_grads, None, None, *modulation_grads


def norm_modulate(x: torch.Tensor, norm: nn.LayerNorm, modulation: Modulation, num_text: int) -> torch.Tensor:
    """LayerNorm(x) * (1 + scale) + shift for x [B, S, D], with separate values for text and video tokens.

    Source: diffusers' CogVideoXLayerNormZero, which takes text and video separately.
    """
    return _NormModulate.apply(
        x, norm.weight, norm.bias, norm.eps, num_text,
        modulation.shift, modulation.scale, modulation.text_shift, modulation.text_scale,
    )  # fmt: skip


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, num_text: int, gate: torch.Tensor, text_gate: torch.Tensor
    ) -> torch.Tensor:
        out = torch.addcmul(x, y, gate)
        out[:, :num_text].copy_(torch.addcmul(x[:, :num_text], y[:, :num_text], text_gate))
        ctx.num_text, ctx.needs_gates = num_text, gate.requires_grad or text_gate.requires_grad
        ctx.save_for_backward(y if ctx.needs_gates else None, gate, text_gate)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Tensors:
        y, gate, text_gate = ctx.saved_tensors
        text_grad, video_grad = _split_text(gradient, ctx.num_text)
        gate_grads: list[torch.Tensor | None] = [None, None]
        if ctx.needs_gates:
            text, video = _split_text(y, ctx.num_text)
            gate_grads = [(video_grad * video).sum(1, keepdim=True), (text_grad * text).sum(1, keepdim=True)]
        y_grad = gradient * gate
        y_grad[:, : ctx.num_text].copy_(text_grad * text_gate)
        return gradient, y_grad, None, *gate_grads


def gated_sum(x: torch.Tensor, y: torch.Tensor, modulation: Modulation, num_text: int) -> torch.Tensor:
    """x + gate * y for x, y [B, S, D], with separate gates for text and video tokens."""
    return _GatedSum.apply(x, y, num_text, modulation.gate, modulation.text_gate)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate neighboring pairs of x [B, S, H, d] by angles with cosines and sines [S, d / 2]. Returns float32."""
    even, odd = x[..., ::2], x[..., 1::2]
    cosines, sines = cosines[None, :, None], sines[None, :, None]
    return torch.stack((even * cosines - odd * sines, odd * cosines + even * sines), dim=-1).flatten(-2)


class _NormRotate(torch.autograd.Function):
    # Not *rotary: without gradients, torch 2.11's compiler drops ctx if a call has as many arguments, ctx aside, as
    # `forward` has parameters (torch/_dynamo/variables/misc.py).
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
        cosines: torch.Tensor, sines: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        with _without_autocast(x):
            out, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
        video = out[:, x.shape[1] - len(cosines) :]
        video.copy_(_rotate(video, cosines, sines))
        ctx.save_for_backward(x, weight, bias, mean, rstd, cosines, sines)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Tensors:
        x, weight, bias, mean, rstd, cosines, sines = ctx.saved_tensors
        normed_grad = gradient.clone(memory_format=torch.contiguous_format)
        video_grad = normed_grad[:, x.shape[1] - len(cosines) :]
        video_grad.copy_(_rotate(video_grad, cosines, -sines))
        norm_grads = _norm_backward(ctx.needs_input_grad[:3], normed_grad, x, weight, bias, mean, rstd)
        return *norm_grads, None, None, None


def norm_rotate(x: torch.Tensor, norm: nn.LayerNorm, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """LayerNorm over the last axis of x [B, S, H, d], then rotary position embeddings on the video tokens at the end.

    rotary: cosines and sines, float32 [video tokens, d], with every value repeated as in diffusers' tables.
    Source: diffusers' CogVideoXAttnProcessor2_0.
    """
    if rotary is None:
        return norm(x)
    return _NormRotate.apply(x, norm.weight, norm.bias, norm.eps, rotary[0][:, ::2], rotary[1][:, ::2])


def _linear(rows: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """rows W^T + bias."""
    if isinstance(weight, Packed):
        return packed_matmul(rows, weight, bias)
    return torch.addmm(bias, rows, weight.t()) if bias is not None else rows @ weight.t()


def _add_input_grad(total: torch.Tensor | None, gradient: torch.Tensor, weight: torch.Tensor | Packed) -> torch.Tensor:
    """total + gradient W, in place."""
    if isinstance(weight, Packed):
        input_grad = packed_matmul_backward(gradient, weight)
        return input_grad if total is None else total.add_(input_grad)
    return gradient @ weight if total is None else total.addmm_(gradient, weight)


class _LoraLinears(torch.autograd.Function):
    """Several linear layers with LoRA on the same input. The matrix products accumulate the sums."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: Sequence[float], *weights: Any) -> tuple[torch.Tensor, ...]:
        rows, outs, lows = x.flatten(0, -2), [], []  # lows: the products with A, [rows, rank]
        for index, scale in enumerate(scales):
            weight, bias, a, b = weights[4 * index : 4 * index + 4]
            out = _linear(rows, weight, bias)
            low = rows @ a.t()
            out.addmm_(low, b.t(), alpha=scale)
            outs.append(out.view(*x.shape[:-1], -1))
            lows.append(low)
        ctx.scales = scales
        ctx.packed = [weight if isinstance(weight, Packed) else None for weight in weights[::4]]
        # The backward pass does not need biases.
        saved = [None if isinstance(w, Packed) else w for index, w in enumerate(weights) if index % 4 != 1]
        ctx.save_for_backward(x, *lows, *saved)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Tensors:
        x, *saved = ctx.saved_tensors
        lows, weights = saved[: len(ctx.scales)], saved[len(ctx.scales) :]
        rows, x_grad, weight_grads = x.flatten(0, -2), None, []
        for index, (scale, low) in enumerate(zip(ctx.scales, lows)):
            weight, a, b = weights[3 * index : 3 * index + 3]
            gradient = gradients[index].flatten(0, -2)
            low_grad = (gradient @ b) * scale
            weight_grads += [None, None, low_grad.t() @ rows, (gradient.t() @ low) * scale]
            if ctx.needs_input_grad[0]:
                x_grad = _add_input_grad(x_grad, gradient, weight if ctx.packed[index] is None else ctx.packed[index])
                x_grad.addmm_(low_grad, a)
        return x_grad.view(x.shape) if x_grad is not None else None, None, *weight_grads


class _LoraParts(NamedTuple):
    weight: torch.Tensor | Packed
    bias: torch.Tensor | None
    a: nn.Parameter
    b: nn.Parameter
    scale: float


def _lora_parts(layer: Any, x: torch.Tensor) -> _LoraParts | None:
    """The inputs of `_LoraLinears` for a plain LoRA on a frozen linear layer in the dtype of x, otherwise None."""
    if type(layer) is not LoraLinear or type(layer.base_layer) not in (nn.Linear, PackedLinear):
        return None
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or type(layer.lora_dropout[name]) is not nn.Identity:
        return None
    a, b, base = layer.lora_A[name], layer.lora_B[name], layer.base_layer
    weight: Any = base.packed if isinstance(base, PackedLinear) else base.weight
    if {a.weight.dtype, b.weight.dtype, weight.dtype} != {x.dtype} or b.bias is not None:
        return None
    return _LoraParts(weight, base.bias, a.weight, b.weight, layer.scaling[name])


def lora_linears(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """Apply linear layers, with or without LoRA, to the same input x [B, S, D].

    Plain LoRAs are computed together: W x + b + scale B A x, without an extra pass over the outputs for the sum, and
    with one gradient for x. Layers with other peft features (dropout, DoRA) run peft's own code.
    """
    parts = [_lora_parts(layer, x) for layer in layers]
    loras = [lora for lora in parts if lora is not None]
    if len(loras) < len(layers):
        return tuple(layer(x) for layer in layers)
    weights = [tensor for lora in loras for tensor in lora[:4]]
    return _LoraLinears.apply(x, tuple(lora.scale for lora in loras), *weights)
