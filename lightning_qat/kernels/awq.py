"""AWQ's packed layout: scale, quantize and pack a weight in one pass, and back.

The layout is that of AWQ's GEMM files: int32 ``[K, N / 8]``, a word being 8 outputs of one input, in the order of
nibbles 0, 2, 4, 6, 1, 3, 5, 7. Codes are those of :func:`lightning_qat.ops.awq.reference_awq_pack`: the product with
the input scale is rounded, then the correctly rounded quotient, half to even. A tile is read along the inputs and
written along the outputs, so that both sides are whole lines of memory.

Bytes moved per weight of ``b`` bytes: ``b + 1/2``, once, and the scales once per group.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qat.kernels.arithmetic import round_half_even
from lightning_qat.kernels.fake_quantize import codes_of
from lightning_qat.kernels.launch import EXACT, Tuned, blocks_of, on_device_of

#: Outputs of a word.
WORD = 8
#: Words and inputs of a tile: 64 outputs times 64 inputs, 16 to a thread; twice as many take 210 registers.
_WORDS, _INPUTS = 8, 64
_WARPS = 8


@triton.jit
def _shifts(lane):
    """Return where the code of output ``8 c + lane`` lies in word ``c``."""
    return 4 * (lane // 2 + 4 * (lane % 2))


@triton.jit
def _grid(pointer, output, inputs, N, K, group):
    """Return the scale or zero point of every weight of a tile, float32 ``[outputs, inputs]``."""
    exists = (output < N)[:, None] & (inputs < K)[None, :]
    at = output.to(tl.int64)[:, None] * (K // group) + (inputs // group)[None, :]
    return tl.load(pointer + at, mask=exists, other=1.0).to(tl.float32)


@triton.jit
def awq_pack_kernel(
    weight_ptr, input_ptr, scale_ptr, zero_ptr, words_ptr, N, K, group,
    INPUT: tl.constexpr, ZERO: tl.constexpr, WORDS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Pack ``WORDS * 8`` outputs of ``INPUTS`` inputs."""
    outputs: tl.constexpr = WORDS * 8
    output = tl.program_id(1) * outputs + tl.arange(0, outputs)
    inputs = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    exists = (output < N)[:, None] & (inputs < K)[None, :]
    weight = tl.load(weight_ptr + output.to(tl.int64)[:, None] * K + inputs[None, :], mask=exists, other=0.0)
    weight = weight.to(tl.float32)
    if INPUT:
        weight *= tl.load(input_ptr + inputs, mask=inputs < K, other=1.0)[None, :]
    scale = _grid(scale_ptr, output, inputs, N, K, group)
    zero = tl.zeros((outputs, INPUTS), tl.float32)
    low: tl.constexpr = 0.0 if ZERO else -8.0
    if ZERO:
        zero = round_half_even(_grid(zero_ptr, output, inputs, N, K, group))
    code = codes_of(weight, scale, zero, low, low + 15.0, ZERO) + zero
    # A NaN has no code and gets that of 0.0.
    code = tl.where(code == code, code, zero)
    code = tl.minimum(tl.maximum(code, low), low + 15.0).to(tl.int32) - (0 if ZERO else -8)
    lane = tl.arange(0, 8)
    word = tl.sum(tl.reshape(code, (WORDS, 8, INPUTS)) << _shifts(lane)[None, :, None], 1)
    index = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    at = words_ptr + inputs.to(tl.int64)[:, None] * (N // 8) + index[None, :]
    tl.store(at, tl.trans(word), mask=(inputs < K)[:, None] & (index < N // 8)[None, :])


@triton.jit
def awq_unpack_kernel(
    words_ptr, input_ptr, scale_ptr, zero_ptr, out_ptr, N, K, group,
    INPUT: tl.constexpr, ZERO: tl.constexpr, WORDS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Dequantize ``WORDS * 8`` outputs of ``INPUTS`` inputs."""
    outputs: tl.constexpr = WORDS * 8
    output = tl.program_id(1) * outputs + tl.arange(0, outputs)
    inputs = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    index = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    at = words_ptr + inputs.to(tl.int64)[:, None] * (N // 8) + index[None, :]
    word = tl.trans(tl.load(at, mask=(inputs < K)[:, None] & (index < N // 8)[None, :], other=0))
    lane = tl.arange(0, 8)
    code = (tl.reshape(word, (WORDS, 1, INPUTS)) >> _shifts(lane)[None, :, None]) & 15
    value = tl.reshape(code, (outputs, INPUTS)).to(tl.float32)
    if ZERO:
        value -= round_half_even(_grid(zero_ptr, output, inputs, N, K, group))
    else:
        value -= 8.0
    value *= _grid(scale_ptr, output, inputs, N, K, group)
    if INPUT:
        divisor = tl.load(input_ptr + inputs, mask=inputs < K, other=1.0)[None, :]
        value = tl.div_rn(value, tl.broadcast_to(divisor, value.shape))
    exists = (output < N)[:, None] & (inputs < K)[None, :]
    out_at = out_ptr + output.to(tl.int64)[:, None] * K + inputs[None, :]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=exists)


def launch_awq_pack(weight: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """Return the packed codes of ``weight * input_scale``, int32 ``[K, N / 8]``.

    Args:
        weight: floating point ``[N, K]``; ``N`` is a multiple of 8.
        scale: float32 ``[N, groups]``.
        zero_point: shaped as ``scale``; None is 8, for codes around zero.
        input_scale: float32 ``[K]`` or None.
    """
    words = torch.empty((weight.shape[1], weight.shape[0] // WORD), dtype=torch.int32, device=weight.device)
    _launch(awq_pack_kernel, weight, words, weight.shape, scale, zero_point, input_scale)
    return words


def launch_awq_unpack(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``(code - zero) * scale / input_scale``, ``[N, K]`` in ``dtype``.

    Args:
        words: int32 ``[K, N / 8]``, what :func:`launch_awq_pack` returned.
        scale: float32 ``[N, groups]``.
        zero_point: shaped as ``scale``; None is 8.
        input_scale: float32 ``[K]`` or None.
        dtype: of the result.
    """
    out = torch.empty((words.shape[1] * WORD, words.shape[0]), dtype=dtype, device=words.device)
    _launch(awq_unpack_kernel, words, out, out.shape, scale, zero_point, input_scale)
    return out


def _launch(
    kernel: Any,
    source: Tensor,
    result: Tensor,
    shape: torch.Size,
    scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
) -> None:
    rows, columns = shape
    if not rows * columns:
        return
    group = columns // scale.shape[1]
    scale = scale.contiguous()
    with on_device_of(source):
        kernel[(blocks_of(columns, _INPUTS), blocks_of(rows, _WORDS * WORD))](
            source.contiguous(), scale if input_scale is None else input_scale.contiguous(), scale,
            scale if zero_point is None else zero_point.contiguous(), result, rows, columns, group,
            INPUT=input_scale is not None, ZERO=zero_point is not None, WORDS=_WORDS, INPUTS=_INPUTS,
            num_warps=_WARPS, **EXACT,
        )  # fmt: skip


def _tuned() -> dict[str, Tuned]:
    ends = {"input_ptr": "*fp32:16", "scale_ptr": "*fp32:16", "N": "i32:16", "K": "i32:16", "group": "i32:16"}
    found = {}
    for way, zero in (("symmetric", False), ("zero", True)):
        constexprs = {"INPUT": True, "ZERO": zero, "WORDS": _WORDS, "INPUTS": _INPUTS}
        point = {"zero_ptr": "*i32:16" if zero else "*fp32:16", "words_ptr": "*i32:16"}
        for kernel, name, other in (
            (awq_pack_kernel, "pack", {"weight_ptr": "*bf16:16"}),
            (awq_unpack_kernel, "unpack", {"out_ptr": "*bf16:16"}),
        ):
            found[f"{name}-{way}"] = Tuned(
                kernel=kernel, signature={**ends, **point, **other}, constexprs=constexprs, num_warps=_WARPS
            )
    return found


TUNED = _tuned()
