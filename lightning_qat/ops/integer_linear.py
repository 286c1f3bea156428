"""Matrix products of integer codes on the CPU: a kernel of our own for few rows, oneDNN's uint8 x int8 one for more.

A code product is exact: ``acc = sum((x_code - x_zero_point) * w_code)`` in int32. The result is
``acc * (x_scale * w_scale) + bias`` in float32, with a rounding for each of its steps: the product of the
scales, the conversion, the product and the sum. The codes are those of
:func:`lightning_qat.ops.affine.quantize_affine`, bit for bit. Both kernels do it so, but for small shapes, for which
oneDNN multiplies the sum by one scale after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_qat.native.library import without_native
from lightning_qat.native.linear_int8 import (
    GIVEN,
    OF_TENSOR,
    OF_TOKENS,
    TokenProduct,
    has_linear_int8,
    linear_int8_is_fast,
    multiply_codes_native,
    quantize_by_range,
    quantize_unsigned_native,
)
from lightning_qat.ops.affine import choose_scale_zero_point
from lightning_qat.ops.fake_quantize import absmax_divisor, quant_range
from lightning_qat.ops.layout import NO_AXIS, NO_GROUP, channel_blocks, empty_scratch, view_channels, view_scratch

#: The kernel multiplies unsigned inputs, so symmetric codes are shifted. (It takes int8 inputs too, by a
#: scalar loop: 4.9 s where uint8 takes 0.9 ms, 32 x 4096 x 4096.)
SIGNED_OFFSET = 128

#: Most products of 255 * 128 whose sum stays within int32.
MAX_TERMS = (2**31 - 1) // (255 * 128)

#: Rows of codes up to which the kernel that reads the weight as it is stored is faster. 4096 x 4096, one core,
#: milliseconds of it and of oneDNN's: one row 0.9 and 1.7, eight 1.7 and 2.0, twelve 2.2 and 2.0.
FEW_ROWS = 8
#: The same for weights of up to so many elements: 2048 x 2048, twelve rows 0.65 and 0.75, sixteen 0.8 and 0.9.
_FEW_ROWS_OF_SMALL, _SMALL = 16, 4 * 2**20
#: The same on processors without instructions for it.
_FEW_ROWS_IN_LOOPS = 2

#: Inputs of more than two blocks go through float scratch memory of one: 64 x 128 x 32 x 32 takes 3 ms on two
#: cores, where a fresh float tensor of that size makes it 13.
_BLOCK_ELEMENTS = 1024 * 1024

#: Adding it to ``|v| < 2**22`` rounds ``v`` half to even and leaves it, modulo 256, in the lowest byte.
_ROUNDER = 1.5 * 2**23


@dataclass(frozen=True)
class CodeRange:
    """The uint8 codes of an input: 0.0 is ``zero_point``, the rest are clamped to ``low .. high``."""

    zero_point: int
    low: int
    high: int


def code_range(bits: int, symmetric: bool, zero_point: int = 0) -> CodeRange:
    """Return the uint8 codes that stand for a grid of 2 to 8 bits.

    Raises:
        ValueError: if ``bits`` is not an integer from 2 to 8.
    """
    low, high = quant_range(bits, symmetric)
    if bits > 8:
        raise ValueError(f"bits={bits} is not allowed for integer kernels; use 2 to 8")
    if symmetric:
        return CodeRange(SIGNED_OFFSET, low + SIGNED_OFFSET, high + SIGNED_OFFSET)
    return CodeRange(zero_point, low, high)


def quantize_unsigned(x: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """Return the uint8 codes of ``x``: those of ``quantize_affine``, shifted where symmetric.

    Clamping before rounding is the same between integer bounds. Converting through the bits takes half the
    time of ``round_().add_().clamp_().to(torch.uint8)``, whose last step is not vectorized. A NaN becomes
    the code of 0.0.

    Args:
        x: floating point up to 32 bits, any shape and strides.
        scale: float32, broadcasts against ``x``.
        codes: see :class:`CodeRange`.
    """
    if scale.numel() == 1 and _is_dense(x):
        result, value = torch.empty_like(x, dtype=torch.uint8), scale.item()
        if quantize_unsigned_native(x, result, value, codes.zero_point, codes.low, codes.high):
            return result
    if x.numel() <= 2 * _BLOCK_ELEMENTS:
        ratio = torch.div(x.to(torch.float32), scale)
        return _round(ratio, codes).to(torch.uint8).add_(codes.zero_point % 256)
    result = torch.empty_like(x, dtype=torch.uint8)
    out, (values,) = view_channels(result, (x,), NO_AXIS, x.shape[-1] if scale.numel() > 1 else NO_GROUP)
    step, scratch = scale.reshape(-1, 1), empty_scratch(out, _BLOCK_ELEMENTS)
    for block in channel_blocks(out.shape, _BLOCK_ELEMENTS):
        target = out[block]
        ratio = view_scratch(scratch, target).copy_(values[block]).div_(step[block[1]])
        target.copy_(_round(ratio, codes)).add_(codes.zero_point % 256)
    return result


def _is_dense(x: Tensor) -> bool:
    """Return whether ``x`` is plain float32 memory without gaps, whose layout ``empty_like`` keeps."""
    if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
        return False
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _round(ratio: Tensor, codes: CodeRange) -> Tensor:
    """Return integers whose lowest byte is the code less the zero point; works in ``ratio``."""
    ratio.clamp_(codes.low - codes.zero_point, codes.high - codes.zero_point)
    # A NaN may have any bits; those that PyTorch makes of float16's have all.
    return ratio.nan_to_num_(0.0).add_(_ROUNDER).view(torch.int32)


#: ``GIVEN``, smallest and largest code less the zero point, scale, zero point; or the kind of range, bits, symmetric.
_Grid = tuple[int, int, int, float, int] | tuple[int, int, bool]


@dataclass(frozen=True)
class PackedWeight:
    """int8 codes of a convolution in oneDNN's own layout, with their scale."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class LinearWeight:
    """A weight for both kernels: int8 codes as they are, which need not be a copy, and in oneDNN's own layout.

    Args:
        codes: contiguous int8, ``[out_features, in_features]``.
        scale: float32, one element or ``[out_features]``.
        few: keep ``codes`` for few rows; else oneDNN's kernel takes all.
    """

    def __init__(self, codes: Tensor, scale: Tensor, *, few: bool) -> None:
        self.scale = scale
        self.zero_point = torch.zeros_like(scale, dtype=torch.int32)
        #: Rows of an input that are few.
        self.few = few_rows(codes.numel()) if few else 0
        self.codes: Any = codes if self.few else None
        self._products: dict[_Grid, TokenProduct] = {}
        if not self.few:
            self.packed = _prepack(codes)

    @cached_property
    def packed(self) -> Tensor:
        """The codes in oneDNN's layout, made for the first input of many rows."""
        return _prepack(self.codes)

    @cached_property
    def sums(self) -> Tensor:
        """The sum of each row of codes, int32."""
        sums: Tensor = self.codes.sum(1, dtype=torch.int32)
        return sums

    def takes(self, x: Tensor, rows: int) -> bool:
        """Return whether ``x``, of so many rows, is multiplied by the weight as it is."""
        return rows <= self.few and type(x) is Tensor and has_linear_int8()

    def of_few(self, x: Tensor, grid: _Grid, bias: Tensor | None) -> Tensor | None:
        """Return ``x @ weight.T + bias`` with ``x`` on ``grid``, in its dtype; None where ``x`` is not a few tokens."""
        count = x.numel()
        if not count or type(x) is not Tensor:
            return None
        columns = x.shape[-1]
        tokens = count // columns
        if tokens > self.few:
            return None
        product = self._products.get(grid)
        if product is None:
            # Those of a few bits are those of a layer; a grid that changes from call to call is not kept.
            product = _product(self, grid)
            self._products = {grid: product}
        if tokens * product.columns != count:
            return None
        # Each operation that changes nothing costs its call.
        shift = bias if bias is None or bias.dtype == torch.float32 else bias.to(torch.float32)
        result = product(_plain(x), tokens, shift if shift is None or shift.is_contiguous() else shift.contiguous())
        if result is None:
            return None
        result = result if x.dim() == 2 else result.view(*x.shape[:-1], product.rows)
        return result if x.dtype == torch.float32 else result.to(x.dtype)


def _prepack(codes: Tensor) -> Tensor:
    packed: Tensor = _onednn().qlinear_prepack(codes, None)
    return packed


def pack_linear(codes: Tensor, scale: Tensor, *, few: bool = True) -> LinearWeight:
    """Return a weight as the kernels read it.

    Args:
        codes: int8, ``[out_features, in_features]``; not to be changed afterwards.
        scale: one for the tensor or ``[out_features]``; may be negative.
        few: whether inputs of few rows are to be expected.
    """
    flat = scale.detach().reshape(-1).to(torch.float32, copy=True)
    return LinearWeight(codes.contiguous(), flat, few=few)


def few_rows(weights: int) -> int:
    """Return up to how many rows so many weights are multiplied by as they are stored; 0 where there is no compiler."""
    if not has_linear_int8():
        return 0
    if not linear_int8_is_fast():
        return _FEW_ROWS_IN_LOOPS
    return FEW_ROWS if weights > _SMALL else _FEW_ROWS_OF_SMALL


def integer_linear(
    x: Tensor, scale: Tensor, codes: CodeRange, weight: LinearWeight, bias: Tensor | None, scale_value: float
) -> Tensor:
    """Return ``x @ weight.T + bias`` with ``x`` quantized per tensor, in the dtype of ``x``.

    Args:
        x: ``[..., in_features]``.
        scale: of ``x``, float32, one element without dimensions.
        codes: of ``x``.
        weight: of :func:`pack_linear`.
        bias: ``[out_features]`` or None.
        scale_value: ``scale`` as a number, which the caller keeps so that no call has to read it.
    """
    low, high = codes.low - codes.zero_point, codes.high - codes.zero_point
    few = weight.of_few(x, (GIVEN, low, high, scale_value, codes.zero_point), bias)
    if few is not None:
        return few
    rows = quantize_unsigned(x.reshape(-1, x.shape[-1]), scale, codes)
    result = multiply_codes(
        rows, scale_value, codes.zero_point, weight, None if bias is None else bias.to(torch.float32)
    )
    return result.view(*x.shape[:-1], result.shape[-1]).to(x.dtype)


def integer_linear_per_tensor(
    x: Tensor, bits: int, symmetric: bool, weight: LinearWeight, bias: Tensor | None
) -> Tensor:
    """Return ``x @ weight.T + bias`` with ``x`` on one grid, that of its range, found now.

    A NaN spoils the range and so the whole result, which is NaN.

    Args:
        x: ``[..., in_features]``, not empty.
        bits: of the codes, 2 to 8.
        symmetric: codes around zero.
        weight: of :func:`pack_linear`.
        bias: ``[out_features]`` or None.
    """
    few = weight.of_few(x, (OF_TENSOR, bits, symmetric), bias)
    if few is not None:
        return few
    found = _by_range(x, bits, symmetric=symmetric, per_token=False)
    if found is None:
        scale, zero_point = choose_scale_zero_point(*torch.aminmax(x), bits=bits, symmetric=symmetric)
        codes = code_range(bits, symmetric, 0 if zero_point is None else int(zero_point.item()))
        return integer_linear(x, scale, codes, weight, bias, scale.item())
    rows, scale, zero = found
    shift = None if bias is None else bias.to(torch.float32)
    result = multiply_codes(rows, scale.item(), int(zero.item()), weight, shift)
    return result.view(*x.shape[:-1], result.shape[-1]).to(x.dtype)


def integer_linear_per_token(x: Tensor, bits: int, weight: LinearWeight, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` with every token of ``x`` on a symmetric grid of its own, found now.

    A token that holds NaN gives NaN.

    Args:
        x: ``[..., in_features]``.
        bits: of the codes, 2 to 8.
        weight: of :func:`pack_linear`.
        bias: ``[out_features]`` or None.
    """
    few = weight.of_few(x, (OF_TOKENS, bits, True), bias)
    if few is not None:
        return few
    found = _by_range(x, bits, symmetric=True, per_token=True)
    if found is None:
        rows = x.reshape(-1, x.shape[-1])
        scale, _ = choose_scale_zero_point(
            rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits=bits, symmetric=True
        )
        codes = quantize_unsigned(rows, scale, code_range(bits, True))
    else:
        codes, scale, _ = found
    result = multiply_codes(codes, 1.0, SIGNED_OFFSET, weight, None).mul_(scale.view(-1, 1))
    if bias is not None:
        result.add_(bias)
    return result.view(*x.shape[:-1], result.shape[-1]).to(x.dtype)


def _product(weight: LinearWeight, grid: _Grid) -> TokenProduct:
    held = (weight.codes, weight.sums, weight.scale, grid[0])
    if grid[0] == GIVEN:
        _, low, high, scale, zero_point = grid  # type: ignore[misc]
        return TokenProduct(*held, low, high, scale=scale, zero_point=zero_point)
    quant_min, quant_max, divisor = _grid(int(grid[1]), bool(grid[2]))
    return TokenProduct(*held, quant_min, quant_max, divisor=divisor)


def _by_range(x: Tensor, bits: int, *, symmetric: bool, per_token: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return codes, scale and zero point on the grids that ``choose_scale_zero_point`` gives, or None."""
    grid = _grid(bits, symmetric)
    return quantize_by_range(_rows(x), *grid, per_token=per_token) if type(x) is Tensor and x.numel() else None


def _grid(bits: int, symmetric: bool) -> tuple[int, int, float]:
    """Return the end codes, and what a symmetric range is divided by."""
    code_range(bits, symmetric)  # or an error
    quant_min, quant_max = quant_range(bits, symmetric)
    return quant_min, quant_max, absmax_divisor(bits)


def _plain(x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float32 else x.to(torch.float32)
    return x if x.is_contiguous() else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    return _plain(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def multiply_codes(rows: Tensor, scale: float, zero_point: int, weight: LinearWeight, bias: Tensor | None) -> Tensor:
    """Return ``(rows - zero_point) @ weight.T * scale + bias`` in float32, summed exactly in int32.

    Args:
        rows: uint8 codes, ``[rows, in_features]``.
        scale: of the codes.
        zero_point: of the codes, 0 to 255.
        weight: of :func:`pack_linear`.
        bias: float32, ``[out_features]``, or None.
    """
    result: Any
    bias = None if bias is None else bias.contiguous()  # neither kernel asks how it lies
    if weight.takes(rows, len(rows)):
        held = (weight.codes, weight.sums, weight.scale, bias)
        result = multiply_codes_native(rows.contiguous(), scale, zero_point, *held)
        return result
    result = _onednn().qlinear_pointwise(
        rows, scale, zero_point, weight.packed, weight.scale, weight.zero_point, bias,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return result


@lru_cache(maxsize=1)
def linear_is_exact() -> bool:
    """Return whether this machine's kernel is there and sums codes exactly; found once, by a tiny product.

    Without VNNI instructions pairs of products may saturate at 16 bits.
    """
    x = torch.full((3, 70), 255, dtype=torch.uint8, device="cpu")
    x[1, ::3] = 7
    w = torch.full((5, 70), 127, dtype=torch.int8, device="cpu")
    w[1, ::2] = -128
    try:
        with without_native():
            result = multiply_codes(x, 1.0, 3, pack_linear(w, torch.ones(1, dtype=torch.float32, device="cpu")), None)
    except (AttributeError, RuntimeError):  # a build of PyTorch without oneDNN or without this op
        return False
    return torch.equal(result.long(), (x.long() - 3) @ w.long().T)


def _onednn() -> Any:
    return torch.ops.onednn
