"""The frozen base held smaller: the linear layers of the blocks with codes and scales in place of their weights.

int8, fp8      eight bits a number, a float32 scale for every row of a weight; torchao makes and reads them
nf4            four bits a number, a float32 scale for every 64; bitsandbytes makes and reads them
fp8_matmul     the frozen weights multiply as float8, the other operand rounded to it row by row, in both directions;
               torchao makes the codes, torch multiplies. With quantization=none a weight is held twice, for either
               direction, in as many bytes as before

A weight is packed as it arrives and unpacked, one layer at a time, by the product that needs it, forward and backward.
What is unpacked is not kept: a product and its gradient are one operation each for autograd and for the compiler,
which would else keep the unpacked weight from one to the other.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cogds.errors import UserError

QUANTIZATIONS = ("none", "int8", "fp8", "nf4")
# Kinds of `Packed`: a quantization, or float8 on both sides of the product.
_MATMUL = "fp8 matmul"
_LIBRARIES = {"int8": "torchao", "fp8": "torchao", _MATMUL: "torchao", "nf4": "bitsandbytes"}
_NF4_BLOCK = 64
# A row of zeros (the last block's text tokens have no gradient) has no largest value to scale by: torchao takes this.
_SMALLEST = 1e-30
# What torch's fp8 matmul asks of a weight's sides.
_DIVISOR = 16
# Ada and Hopper are the first with float8.
_FP8_CAPABILITY = (8, 9)


class Packed(NamedTuple):
    """A weight [out, in] as a library holds it. dtype: what it unpacks to.

    parts: codes and scales; with fp8 matmul, if ready for the way back too, those of the transposed weight.
    """

    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    parts: tuple[torch.Tensor, ...]


def check_quantization(quantization: str, fp8_matmul: bool, precision: str, stage: int, device: torch.device) -> None:
    """Raise UserError if this run, this device or what is installed rules the quantization out.

    quantization, fp8_matmul: of `model`; precision: `train.precision`; stage: of ZeRO.
    """
    if quantization == "none" and not fp8_matmul:
        return
    keys = {"model.quantization=" + quantization: quantization != "none", "model.fp8_matmul=true": fp8_matmul}
    asked = " and ".join(key for key, is_set in keys.items() if is_set)
    if fp8_matmul and quantization not in ("none", "fp8"):
        raise UserError(f"{asked}: fp8 matmul needs fp8 weights; set model.quantization to fp8 or none")
    if stage == 3:
        raise UserError(
            f"{asked} does not go with ZeRO stage 3, which shares out whole weights of one number format, not codes "
            "with scales: take stage 2 (ds_configs/zero2.json), where each GPU holds the quantized base, or "
            "model.quantization=none"
        )
    if fp8_matmul and precision != "bf16":
        raise UserError(f"{asked} needs train.precision=bf16, but it is {precision}: fp8 matmul gives bf16")
    for kind in {quantization, *([_MATMUL] if fp8_matmul else [])} - {"none"}:
        library = _LIBRARIES[kind]
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{asked} needs {library}, which is not installed: pip install -e '.[quant]'")
    if device.type == "cuda" and (quantization == "fp8" or fp8_matmul):
        capability = torch.cuda.get_device_capability(device)
        if capability < _FP8_CAPABILITY:
            raise UserError(
                f"{asked} needs a GPU with float8, compute capability 8.9 (Ada, Hopper), but this one has "
                f"{capability[0]}.{capability[1]}: set model.quantization=int8, which is as small, and "
                f"model.fp8_matmul=false"
            )


def pack(weight: torch.Tensor, quantization: str, fp8_matmul: bool = False) -> Packed:
    """A weight [out, in] in codes. fp8_matmul=True: ready for fp8 matmul, whatever the quantization."""
    kind = _MATMUL if fp8_matmul else quantization
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        # Whole blocks, a row each: on a CPU, bitsandbytes 0.50 reads rows of any other width with wrong scales.
        flat = weight.reshape(-1)
        blocks = F.pad(flat, (0, -len(flat) % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
        codes, state = quantize_4bit(blocks, blocksize=_NF4_BLOCK, quant_type="nf4")
        parts = [codes, state.absmax]
    elif kind == "int8":
        from torchao.quantization import Int8Tensor, PerRow

        parts = _parts(Int8Tensor.from_hp(weight, granularity=PerRow()))
    else:
        parts = _fp8(weight)
        if kind == _MATMUL and quantization == "none":
            parts += _fp8(weight.t().contiguous())
    return Packed(kind, (weight.shape[0], weight.shape[1]), weight.dtype, tuple(parts))


def _fp8(weight: torch.Tensor) -> list[torch.Tensor]:
    from torchao.quantization import Float8Tensor, PerRow

    return _parts(Float8Tensor.from_hp(weight, granularity=PerRow(), hp_value_lb=_SMALLEST))


def _parts(tensor: Any) -> list[torch.Tensor]:
    return [tensor.qdata, tensor.scale]


def unpack(packed: Packed) -> torch.Tensor:
    """The weight [out, in] that the codes stand for."""
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
    """rows W^T + bias in float8 on both sides, rows rounded row by row: plain operations, which a compiler fuses."""
    largest = torch.finfo(codes.dtype).max
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=_SMALLEST) / largest
    rounded = (rows / scale).clamp_(-largest, largest).to(codes.dtype)  # in place: it is in float32
    # The kernel with scales by row is slow without fast accumulation.
    return torch._scaled_mm(
        rounded, codes.t(), scale_a=scale, scale_b=scales.t(), bias=bias, out_dtype=rows.dtype, use_fast_accum=True
    )


class _Fp8Product(torch.autograd.Function):
    """rows W^T + bias for a weight that is ready for fp8 matmul: parts of `Packed`."""

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
        back = product_back(gradient.contiguous(), Packed(_MATMUL, ctx.shape, gradient.dtype, parts))
        return back, None, None, *[None] * len(parts)


@torch.library.custom_op("cogds::packed_product", mutates_args=())
def _product(
    rows: torch.Tensor, kind: str, shape: list[int], parts: list[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(rows, _unpack(kind, shape, rows.dtype, parts), bias)


@torch.library.custom_op("cogds::packed_product_back", mutates_args=())
def _product_back(gradient: torch.Tensor, kind: str, shape: list[int], parts: list[torch.Tensor]) -> torch.Tensor:
    weight = _unpack(kind, shape, gradient.dtype, parts)
    if kind != _MATMUL:
        return gradient @ weight
    codes, scales = _fp8(weight.t().contiguous())
    return _fp8_linear(gradient, codes, scales, None)


@_product.register_fake
def _(rows: torch.Tensor, _kind: str, shape: list[int], *_: Any) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], shape[0])


@_product_back.register_fake
def _(gradient: torch.Tensor, _kind: str, shape: list[int], *_: Any) -> torch.Tensor:
    return gradient.new_empty(gradient.shape[0], shape[1])


def _keep(ctx: Any, inputs: Any, output: torch.Tensor) -> None:  # noqa: ARG001
    _, ctx.kind, ctx.shape, parts, _ = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    return _product_back(gradient.contiguous(), ctx.kind, ctx.shape, parts), None, None, [None] * len(parts), None


_product.register_autograd(_backward, setup_context=_keep)


def product(rows: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """rows W^T + bias for rows [N, in] -> [N, out]; `product_back` is its gradient."""
    if weight.kind == _MATMUL:  # nothing is unpacked
        return _fp8_linear(rows, weight.parts[0], weight.parts[1], bias)
    return _product(rows, weight.kind, list(weight.shape), list(weight.parts), bias)


def product_back(gradient: torch.Tensor, weight: Packed) -> torch.Tensor:
    """gradient W for gradient [N, out] -> [N, in]."""
    if weight.kind == _MATMUL and len(weight.parts) > 2:
        return _fp8_linear(gradient, weight.parts[2], weight.parts[3], None)
    return _product_back(gradient, weight.kind, list(weight.shape), list(weight.parts))


class PackedLinear(nn.Linear):
    """A frozen linear layer with codes in place of its weight, `packed`, which is no parameter of the module.

    So DeepSpeed neither sends it to the other ranks, which read the same files, nor casts it, and `to(device)` leaves
    it where it was filled. `weight` unpacks it at every look, for whoever asks for its dtype and device (peft).
    """

    def __init__(self, linear: nn.Linear, quantization: str, fp8_matmul: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.quantization, self.fp8_matmul = quantization, fp8_matmul
        self.packed: Packed | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: [out, in]."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        assert self.packed is not None
        return unpack(self.packed)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor) -> None:
        """Pack this weight [out, in], in its dtype and on its device."""
        self.packed = pack(weight, self.quantization, self.fp8_matmul)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None
        rows, packed = x.flatten(0, -2), self.packed
        if packed.kind == _MATMUL:
            out = _Fp8Product.apply(rows, self.bias, packed.shape, *packed.parts)
        else:
            out = product(rows, packed, self.bias)
        return out.unflatten(0, x.shape[:-1])


def pack_block(block: nn.Module, quantization: str, fp8_matmul: bool, fill: bool) -> None:
    """Put `PackedLinear`s in place of a block's linear layers. fill: with their weights, else empty.

    fp8 matmul is for the layers on a sequence: those that make shift, scale and gate have a row a clip.
    """
    for name, linear in list(block.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        long = not name.startswith("norm") and not (linear.in_features % _DIVISOR or linear.out_features % _DIVISOR)
        own = fp8_matmul and long
        if quantization == "none" and not own:
            continue
        packed = PackedLinear(linear, quantization, own)
        if fill:
            packed.fill(linear.weight)
        block.set_submodule(name, packed)
