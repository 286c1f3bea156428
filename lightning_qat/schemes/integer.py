"""Affine integers of 2 to 16 bits: per tensor, channel, group or token."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ops.affine import choose_scale_zero_point, dequantize_affine, quantize_affine, scale_of_absmax
from lightning_qat.ops.affine_cpu import run_of
from lightning_qat.ops.fake_quantize import fake_quantize
from lightning_qat.ops.int4_dequantize import dequantize_int4, int4_run
from lightning_qat.ops.layout import resolve_layout
from lightning_qat.ops.observe import fake_quantize_by_absmax
from lightning_qat.ops.quantize_packed import quantize_packed_op
from lightning_qat.ops.stochastic import quantize_affine_stochastically
from lightning_qat.ops.straight_through import fake_quantize_through, grid_for, input_gradient
from lightning_qat.schemes.base import Scheme, _register
from lightning_qat.schemes.format import TensorFormat


@_register("int8", "int4", "dynamic", "gptq", "awq")
class IntegerScheme(Scheme):
    """``value = (code - zero_point) * scale`` on the grids of :func:`lightning_qat.ops.quant_range`.

    ``"gptq"`` and ``"awq"`` are integers of 4 bits unless said otherwise, whose codes an algorithm of
    :mod:`lightning_qat.ptq` may choose; where none does, every value gets its nearest code.
    """

    changes_bits = True
    folds_norms = True
    searches_ranges = True
    learns_scales = True
    takes_inputs = True

    def parameters(self, low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        scale, zero_point = choose_scale_zero_point(low, high, bits=fmt.bits, symmetric=fmt.symmetric)
        if zero_point is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return scale, zero_point

    def parameters_of_range(self, low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
        if not fmt.symmetric or type(self).parameters is not IntegerScheme.parameters:
            return super().parameters_of_range(low, high, fmt)
        scale = scale_of_absmax(torch.maximum(high.to(torch.float32), -low.to(torch.float32)), fmt.bits)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        return fake_quantize(
            x,
            scale,
            None if fmt.symmetric else zero_point,
            bits=fmt.bits,
            symmetric=fmt.symmetric,
            axis=fmt.axis,
            group_size=fmt.group_size,
        )

    def fake_quantize_through(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat, *, covered: bool = False
    ) -> Tensor:
        if scale.requires_grad or (zero_point is not None and zero_point.requires_grad):
            return self.fake_quantize(x, scale, zero_point, fmt)
        grid = grid_for(x, scale, fmt.bits, fmt.symmetric, fmt.axis, fmt.group_size)
        return fake_quantize_through(x, scale, None if fmt.symmetric else zero_point, *grid, covered=covered)

    def fake_quantize_by_extremes(self, x: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor] | None:
        """Return :meth:`fake_quantize` with :meth:`parameters_of` ``x``, and the scale; None where in two steps.

        Args:
            x: an ordinary tensor, contiguous, on the CPU, in eager mode; nothing has a gradient.
            fmt: of its codes.
        """
        if not fmt.symmetric or type(self) is not IntegerScheme:
            return None
        return fake_quantize_by_absmax(x, fmt.bits, fmt.axis, fmt.group_size)

    def fake_quantize_gradient(
        self, grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat
    ) -> Tensor:
        grid = grid_for(x, scale, fmt.bits, fmt.symmetric, fmt.axis, fmt.group_size)
        return input_gradient(grad, x, scale, None if fmt.symmetric else zero_point, grid)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        return quantize_affine(
            x,
            scale,
            None if fmt.symmetric else zero_point,
            bits=fmt.bits,
            symmetric=fmt.symmetric,
            axis=fmt.axis,
            group_size=fmt.group_size,
        )

    def quantize_stochastically(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        fmt: TensorFormat,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return quantize_affine_stochastically(
            x,
            scale,
            None if fmt.symmetric else zero_point,
            bits=fmt.bits,
            symmetric=fmt.symmetric,
            axis=fmt.axis,
            group_size=fmt.group_size,
            generator=generator,
        )

    def dequantize(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat, dtype: torch.dtype
    ) -> Tensor:
        zero = None if fmt.symmetric else zero_point
        return dequantize_affine(codes, scale, zero, axis=fmt.axis, group_size=fmt.group_size, dtype=dtype)

    def quantize_packed(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
        own = type(self).quantize is not IntegerScheme.quantize or type(self).pack is not Scheme.pack
        if own or fmt.bits not in (4, 8) or not x.is_floating_point() or not x.numel():
            return super().quantize_packed(x, scale, zero_point, fmt)
        zero = None if fmt.symmetric else zero_point
        run = run_of(x, *resolve_layout(x, scale, zero, fmt.axis, fmt.group_size))
        if run is None:
            return super().quantize_packed(x, scale, zero_point, fmt)
        return quantize_packed_op(x, scale, zero, fmt.bits, fmt.symmetric, run)

    def dequantize_packed(
        self,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        shape: torch.Size,
        fmt: TensorFormat,
        dtype: torch.dtype,
    ) -> Tensor:
        run = int4_run(shape, fmt.axis, fmt.group_size) if fmt.bits == 4 and not fmt.dynamic else None
        if (
            run is None
            or type(self).unpack is not Scheme.unpack
            or type(self).dequantize is not IntegerScheme.dequantize
        ):
            return super().dequantize_packed(packed, scale, zero_point, shape, fmt, dtype)
        return dequantize_int4(packed, scale, None if fmt.symmetric else zero_point, shape, run, dtype)
