"""The transformer's memory-bound parts with as few passes over the sequence as torch allows without a compiler.

Each is an autograd function over one sequence, text tokens first, that keeps what the plain operations would keep and
makes no copy between them. Under `torch.compile` their bodies are traced and fused further. The base is frozen: no
gradient goes to weights or biases other than a LoRA's.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from cogds.model.transformer.quantize import Packed, PackedLinear, product, product_back

Tensors = tuple[torch.Tensor | None, ...]


class Modulation(NamedTuple):
    """Shift, scale and gate of video and of text tokens, [B, 1, D] each, in the order of CogVideoXLayerNormZero."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor
    text_shift: torch.Tensor
    text_scale: torch.Tensor
    text_gate: torch.Tensor


def _parts(x: torch.Tensor, num_text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the text's and of the video's tokens."""
    return x[:, :num_text], x[:, num_text:]


def _text(x: torch.Tensor, num_text: int) -> torch.Tensor:
    """The text's few tokens: written over what was computed for all with the video's numbers."""
    return x[:, :num_text]


def _as_written(x: torch.Tensor) -> Any:
    """Autocast on CUDA makes a norm float32, but not the norm's gradient."""
    return torch.autocast("cuda", enabled=False) if x.is_cuda else contextlib.nullcontext()


def _norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, norm: tuple[Any, ...], mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    weight, bias = norm
    size = [x.shape[-1]]
    return torch.ops.aten.native_layer_norm_backward(gradient, x, size, mean, rstd, weight, bias, [True, False, False])[
        0
    ]


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, num_text: int,
        shift: torch.Tensor, scale: torch.Tensor, text_shift: torch.Tensor, text_scale: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        with _as_written(x):
            normed, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
        out = torch.addcmul(shift, normed, 1 + scale)
        _text(out, num_text).copy_(torch.addcmul(text_shift, _text(normed, num_text), 1 + text_scale))
        ctx.save_for_backward(x, weight, bias, mean, rstd, scale, text_scale)
        ctx.eps, ctx.num_text = eps, num_text
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Tensors:
        x, weight, bias, mean, rstd, scale, text_scale = ctx.saved_tensors
        to_text, to_video = _parts(gradient, ctx.num_text)
        modulations: list[torch.Tensor | None] = [None] * 4
        if any(ctx.needs_input_grad[5:]):  # an adapter on the layers that make shift and scale
            text, video = _parts(torch.native_layer_norm(x, [x.shape[-1]], weight, bias, ctx.eps)[0], ctx.num_text)
            modulations = [
                to_video.sum(1, keepdim=True),
                (to_video * video).sum(1, keepdim=True),
                to_text.sum(1, keepdim=True),
                (to_text * text).sum(1, keepdim=True),
            ]
        before = gradient * (1 + scale)
        _text(before, ctx.num_text).copy_(to_text * (1 + text_scale))
        return _norm_backward(before, x, (weight, bias), mean, rstd), None, None, None, None, *modulations


def norm_modulate(x: torch.Tensor, norm: nn.LayerNorm, modulation: Modulation, num_text: int) -> torch.Tensor:
    """LayerNorm(x) (1 + scale) + shift for x [B, S, D], text and video tokens each by their own.

    Source: diffusers' CogVideoXLayerNormZero, which takes text and video apart.
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
        _text(out, num_text).copy_(torch.addcmul(_text(x, num_text), _text(y, num_text), text_gate))
        ctx.num_text, ctx.needs_gates = num_text, gate.requires_grad or text_gate.requires_grad
        ctx.save_for_backward(y if ctx.needs_gates else None, gate, text_gate)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Tensors:
        y, gate, text_gate = ctx.saved_tensors
        to_text, to_video = _parts(gradient, ctx.num_text)
        gates: list[torch.Tensor | None] = [None, None]
        if ctx.needs_gates:
            text, video = _parts(y, ctx.num_text)
            gates = [(to_video * video).sum(1, keepdim=True), (to_text * text).sum(1, keepdim=True)]
        to_y = gradient * gate
        _text(to_y, ctx.num_text).copy_(to_text * text_gate)
        return gradient, to_y, None, *gates


def gated_sum(x: torch.Tensor, y: torch.Tensor, modulation: Modulation, num_text: int) -> torch.Tensor:
    """x + gate y for x, y [B, S, D], text and video tokens each by their own gate."""
    return _GatedSum.apply(x, y, num_text, modulation.gate, modulation.text_gate)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of x [B, S, H, d] by angles whose cosines and sines are [S, d / 2]. float32."""
    even, odd = x[..., ::2], x[..., 1::2]
    cosines, sines = cosines[None, :, None], sines[None, :, None]
    return torch.stack((even * cosines - odd * sines, odd * cosines + even * sines), dim=-1).flatten(-2)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        with _as_written(x):
            out, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
        video = out[:, x.shape[1] - len(cosines) :]
        video.copy_(_rotate(video, cosines, sines))
        ctx.save_for_backward(x, weight, bias, mean, rstd, cosines, sines)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Tensors:
        x, weight, bias, mean, rstd, cosines, sines = ctx.saved_tensors
        before = gradient.clone(memory_format=torch.contiguous_format)
        video = before[:, x.shape[1] - len(cosines) :]
        video.copy_(_rotate(video, cosines, -sines))
        return _norm_backward(before, x, (weight, bias), mean, rstd), None, None, None, None, None


def norm_rotate(x: torch.Tensor, norm: nn.LayerNorm, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """LayerNorm over the last axis of x [B, S, H, d], then rotary tables on the last tokens, as many as they have rows.

    rotary: cosines and sines, float32 [video tokens, d] with every value twice, as diffusers makes them.
    Source: diffusers' CogVideoXAttnProcessor2_0.
    """
    if rotary is None:
        return norm(x)
    return _NormRotate.apply(x, norm.weight, norm.bias, norm.eps, rotary[0][:, ::2], rotary[1][:, ::2])


def _times(rows: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """rows W^T + bias."""
    if isinstance(weight, Packed):
        return product(rows, weight, bias)
    return torch.addmm(bias, rows, weight.t()) if bias is not None else rows @ weight.t()


def _add_times_back(total: torch.Tensor | None, gradient: torch.Tensor, weight: torch.Tensor | Packed) -> torch.Tensor:
    """total + gradient W, written over total."""
    if isinstance(weight, Packed):
        back = product_back(gradient, weight)
        return back if total is None else total.add_(back)
    return gradient @ weight if total is None else total.addmm_(gradient, weight)


class _LoraLinears(torch.autograd.Function):
    """Linear layers with LoRA on one input: what they add is accumulated by the matrix products themselves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: Sequence[float], *weights: Any) -> tuple[torch.Tensor, ...]:
        rows, outs, middles = x.flatten(0, -2), [], []
        for index, scale in enumerate(scales):
            weight, bias, a, b = weights[4 * index : 4 * index + 4]
            out = _times(rows, weight, bias)
            middle = rows @ a.t()
            out.addmm_(middle, b.t(), alpha=scale)
            outs.append(out.view(*x.shape[:-1], -1))
            middles.append(middle)
        ctx.scales = scales
        ctx.packed = [one if isinstance(one, Packed) else None for one in weights[::4]]
        # A bias is not needed.
        kept = [None if isinstance(one, Packed) else one for index, one in enumerate(weights) if index % 4 != 1]
        ctx.save_for_backward(x, *middles, *kept)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Tensors:
        x, *kept = ctx.saved_tensors
        middles, weights = kept[: len(ctx.scales)], kept[len(ctx.scales) :]
        rows, to_x, to_weights = x.flatten(0, -2), None, []
        for index, (scale, middle) in enumerate(zip(ctx.scales, middles)):
            plain, a, b = weights[3 * index : 3 * index + 3]
            gradient = gradients[index].flatten(0, -2)
            to_middle = (gradient @ b) * scale
            to_weights += [None, None, to_middle.t() @ rows, (gradient.t() @ middle) * scale]
            if ctx.needs_input_grad[0]:
                to_x = _add_times_back(to_x, gradient, plain if ctx.packed[index] is None else ctx.packed[index])
                to_x.addmm_(to_middle, a)
        return to_x.view(x.shape) if to_x is not None else None, None, *to_weights


class _Adapted(NamedTuple):
    weight: torch.Tensor | Packed
    bias: torch.Tensor | None
    a: nn.Parameter
    b: nn.Parameter
    scale: float


def _adapted(layer: Any, x: torch.Tensor) -> _Adapted | None:
    """What `_LoraLinears` needs, where the layer is a plain LoRA on a frozen linear layer in one dtype; else None."""
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
    return _Adapted(weight, base.bias, a.weight, b.weight, layer.scaling[name])


def linears(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """Each layer's output for x [B, S, D]: linear layers, with a LoRA or without.

    Plain LoRAs are computed together: W x + b + scale B A x, without a pass over the outputs for the sum and with one
    gradient for x. Whatever else peft has on a layer (dropout, DoRA) runs as peft has it.
    """
    adapted = [_adapted(layer, x) for layer in layers]
    if None in adapted:
        return tuple(layer(x) for layer in layers)
    weights = [tensor for one in adapted for tensor in (one.weight, one.bias, one.a, one.b)]  # type: ignore[union-attr]
    return _LoraLinears.apply(x, tuple(one.scale for one in adapted), *weights)  # type: ignore[union-attr]
