"""Quantization of the frozen base: the linear layers of the blocks store codes and scales in place of their weights.

int8, fp8      8 bits per weight, one float32 scale per row, packed and unpacked by torchao
nf4            4 bits per weight, one float32 scale per 64 weights, packed and unpacked by bitsandbytes
fp8_matmul     multiply frozen weights in float8 in the forward and backward pass, with the other operand rounded to
               float8 row by row. torchao packs, torch multiplies. With quantization=none, each weight is stored twice,
               once per direction, in as many bytes as before

A weight is packed when it is loaded. In the forward and the backward pass, it is unpacked for one product at a time and
then dropped. A product and its gradient are single operations for autograd and the compiler, which would otherwise keep
the unpacked weight from the forward to the backward pass.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cogds.errors import UserError

QUANTIZATIONS = ("none", "int8", "fp8", "nf4")
# `Packed.kind` is a quantization, or this for float8 operands on both sides of the product.
FP8_MATMUL = "fp8 matmul"
_LIBRARIES = {"int8": "torchao", "fp8": "torchao", FP8_MATMUL: "torchao", "nf4": "bitsandbytes"}
_NF4_BLOCK = 64
# Smallest maximum to scale a row by, also passed to torchao. Rows may be all zeros: the text tokens of the last block
# have no gradient.
_MIN_ROW_MAX = 1e-30
# torch's fp8 matmul requires that both sides of a weight are multiples of this.
_FP8_MATMUL_MULTIPLE = 16
# Compute capability of Ada, the first architecture with float8.
_FP8_CAPABILITY = (8, 9)


class Packed(NamedTuple):
    """A quantized weight [out, in].

    Attributes:
        dtype: of the unpacked weight.
        parts: codes and scales. For fp8 matmuls without quantization, also those of the transposed weight, for the
            backward pass.
    """

    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    parts: tuple[torch.Tensor, ...]


def check_quantization(quantization: str, fp8_matmul: bool, precision: str, stage: int, device: torch.device) -> None:
    """Raise UserError if the run's config, the device or the installed packages do not support the quantization.

    quantization, fp8_matmul: of section `model`; precision: `train.precision`; stage: of ZeRO.
    """
    if quantization == "none" and not fp8_matmul:
        return
    keys = {"model.quantization=" + quantization: quantization != "none", "model.fp8_matmul=true": fp8_matmul}
    settings = " and ".join(key for key, is_set in keys.items() if is_set)
    if fp8_matmul and quantization not in ("none", "fp8"):
        raise UserError(f"{settings}: fp8 matmuls require fp8 weights. Set model.quantization to fp8 or none.")
    if stage == 3:
        raise UserError(
            f"{settings}: not supported with ZeRO stage 3, which cannot shard quantized weights. Use stage 2 "
            "(ds_configs/zero2.json), where each GPU holds the whole quantized base, or model.quantization=none and "
            "model.fp8_matmul=false."
        )
    if fp8_matmul and precision != "bf16":
        raise UserError(
            f"{settings}: fp8 matmuls produce bf16, but train.precision is {precision}. Set train.precision=bf16."
        )
    for kind in {quantization, *([FP8_MATMUL] if fp8_matmul else [])} - {"none"}:
        library = _LIBRARIES[kind]
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{settings}: requires {library}, which is not installed. Run pip install -e '.[quant]'.")
    if device.type == "cuda" and (quantization == "fp8" or fp8_matmul):
        capability = torch.cuda.get_device_capability(device)
        if capability < _FP8_CAPABILITY:
            raise UserError(
                f"{settings}: requires a GPU with float8 (compute capability 8.9 or higher: Ada, Hopper or later), but "
                f"this GPU has {capability[0]}.{capability[1]}. Set model.quantization=int8, which needs as little "
                "memory, and model.fp8_matmul=false."
            )


def pack(weight: torch.Tensor, quantization: str, fp8_matmul: bool = False) -> Packed:
    """Quantize a weight [out, in]. fp8_matmul: prepare it for fp8 matmuls (quantization is then "fp8" or "none")."""
    kind = FP8_MATMUL if fp8_matmul else quantization
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        # One block per row: on a CPU, bitsandbytes 0.50 reads rows of any other width with wrong scales.
        flat = weight.reshape(-1)
        blocks = F.pad(flat, (0, -len(flat) % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
        codes, state = quantize_4bit(blocks, blocksize=_NF4_BLOCK, quant_type="nf4")
        parts = [codes, state.absmax]
    elif kind == "int8":
        from torchao.quantization import Int8Tensor, PerRow

        parts = _codes_and_scales(Int8Tensor.from_hp(weight, granularity=PerRow()))
    else:
        parts = _pack_fp8(weight)
        if kind == FP8_MATMUL and quantization == "none":
            parts += _pack_fp8(weight.t().contiguous())
    return Packed(kind, (weight.shape[0], weight.shape[1]), weight.dtype, tuple(parts))


def _pack_fp8(weight: torch.Tensor) -> list[torch.Tensor]:
    from torchao.quantization import Float8Tensor, PerRow

    return _codes_and_scales(Float8Tensor.from_hp(weight, granularity=PerRow(), hp_value_lb=_MIN_ROW_MAX))


def _codes_and_scales(tensor: Any) -> list[torch.Tensor]:
    return [tensor.qdata, tensor.scale]


def unpack(packed: Packed) -> torch.Tensor:
    """Dequantize a weight: [out, in]."""
    return _unpack(packed.kind, packed.shape, packed.dtype, packed.parts)


def _unpack(kind: str, shape: Any, dtype: torch.dtype, parts: Any) -> torch.Tensor:
    codes, scales = parts[:2]
    if kind == "nf4":
        from bitsandbytes.functional import QuantState, dequantize_4bit

        blocks = torch.Size([len(scales), _NF4_BLOCK])
        state = QuantState(scales, blocks, blocksize=_NF4_BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(codes, state).flatten()[: shape[0] * shape[1]].view(shape[0], shape[1])
    from torchao.quantization import Float8Tensor, Int8Tensor

    per_row = [1, shape[1]]
    if kind == "int8":
        return Int8Tensor(codes, scales, per_row, dtype).dequantize()
    return Float8Tensor(codes, scales, block_size=per_row, dtype=dtype).dequantize()


def _fp8_linear(
    rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """rows W^T + bias with both operands in float8, scaled per row. Plain operations, which a compiler can fuse."""
    max_code = torch.finfo(codes.dtype).max
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=_MIN_ROW_MAX) / max_code
    rounded = (rows / scale).clamp_(-max_code, max_code).to(codes.dtype)  # in place, because it is float32
    # The kernel for row-wise scales is slow without fast accumulation.
    return torch._scaled_mm(
        rounded, codes.t(), scale_a=scale, scale_b=scales.t(), bias=bias, out_dtype=rows.dtype, use_fast_accum=True
    )


class _Fp8Matmul(torch.autograd.Function):
    """rows W^T + bias in fp8. parts: of a `Packed` weight of kind FP8_MATMUL."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, int], *parts: torch.Tensor
    ) -> torch.Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*parts)
        return _fp8_linear(rows, parts[0], parts[1], bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        parts = ctx.saved_tensors
        packed = Packed(FP8_MATMUL, ctx.shape, gradient.dtype, parts)
        return packed_matmul_backward(gradient.contiguous(), packed), None, None, *[None] * len(parts)


@torch.library.custom_op("cogds::packed_product", mutates_args=())
def _matmul(
    rows: torch.Tensor, kind: str, shape: list[int], parts: list[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(rows, _unpack(kind, shape, rows.dtype, parts), bias)


@torch.library.custom_op("cogds::packed_product_back", mutates_args=())
def _matmul_backward(gradient: torch.Tensor, kind: str, shape: list[int], parts: list[torch.Tensor]) -> torch.Tensor:
    weight = _unpack(kind, shape, gradient.dtype, parts)
    if kind != FP8_MATMUL:
        return gradient @ weight
    codes, scales = _pack_fp8(weight.t().contiguous())
    return _fp8_linear(gradient, codes, scales, None)


@_matmul.register_fake
def _(rows: torch.Tensor, _kind: str, shape: list[int], *_: Any) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], shape[0])


@_matmul_backward.register_fake
def _(gradient: torch.Tensor, _kind: str, shape: list[int], *_: Any) -> torch.Tensor:
    return gradient.new_empty(gradient.shape[0], shape[1])


def _save_parts(ctx: Any, inputs: Any, output: torch.Tensor) -> None:  # noqa: ARG001
    _, ctx.kind, ctx.shape, parts, _ = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    return _matmul_backward(gradient.contiguous(), ctx.kind, ctx.shape, parts), None, None, [None] * len(parts), None


_matmul.register_autograd(_backward, setup_context=_save_parts)


def packed_matmul(rows: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """rows W^T + bias: [N, in] -> [N, out]."""
    if weight.kind == FP8_MATMUL:  # multiplies the codes without unpacking them
        return _fp8_linear(rows, weight.parts[0], weight.parts[1], bias)
    return _matmul(rows, weight.kind, list(weight.shape), list(weight.parts), bias)


def packed_matmul_backward(gradient: torch.Tensor, weight: Packed) -> torch.Tensor:
    """gradient W, the gradient of `packed_matmul` for its rows: [N, out] -> [N, in]."""
    if weight.kind == FP8_MATMUL and len(weight.parts) > 2:
        return _fp8_linear(gradient, weight.parts[2], weight.parts[3], None)
    return _matmul_backward(gradient, weight.kind, list(weight.shape), list(weight.parts))


class PackedLinear(nn.Linear):
    """A frozen linear layer with a quantized weight, `packed`, which is not a parameter of the module.

    DeepSpeed therefore does not broadcast it (every rank reads the same files) or cast it, and `to(device)` does not
    move it. `weight` unpacks it on every access, for peft, which reads its dtype and device.
    """

    def __init__(self, linear: nn.Linear, quantization: str, fp8_matmul: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.quantization, self.fp8_matmul = quantization, fp8_matmul
        self.packed: Packed | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight: [out, in]."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        assert self.packed is not None
        return unpack(self.packed)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor) -> None:
        """Quantize and store a weight [out, in]. Its dtype and device become those of the layer."""
        self.packed = pack(weight, self.quantization, self.fp8_matmul)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None
        rows, packed = x.flatten(0, -2), self.packed
        if packed.kind == FP8_MATMUL:
            out = _Fp8Matmul.apply(rows, self.bias, packed.shape, *packed.parts)
        else:
            out = packed_matmul(rows, packed, self.bias)
        return out.unflatten(0, x.shape[:-1])


def pack_block(block: nn.Module, quantization: str, fp8_matmul: bool, fill: bool) -> None:
    """Replace a block's linear layers by `PackedLinear`s. fill: quantize their weights; otherwise they stay empty.

    Only layers that process the sequence use fp8 matmuls. The modulation layers have only one row per clip.
    """
    for name, linear in list(block.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        is_modulation = name.startswith("norm")
        is_multiple = not any(size % _FP8_MATMUL_MULTIPLE for size in (linear.in_features, linear.out_features))
        use_fp8_matmul = fp8_matmul and is_multiple and not is_modulation
        if quantization == "none" and not use_fp8_matmul:
            continue
        packed = PackedLinear(linear, quantization, use_fp8_matmul)
        if fill:
            packed.fill(linear.weight)
        block.set_submodule(name, packed)
