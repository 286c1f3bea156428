"""Weights in AWQ's packed layout: int32 ``[K, N / 8]``, 8 outputs of one input in a word."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.ops.affine import dequantize_affine, quantize_affine
from lightning_qat.ops.word_packing import pack_awq_words, unpack_awq_words

#: Outputs of a word.
_WORD = 8


def awq_pack(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    """Return the 4-bit codes of ``weight * input_scale`` as AWQ's GEMM files have them.

    Args:
        weight: floating point ``[N, K]``; ``N`` is a multiple of 8.
        scale: float32 ``[N, groups]``; the groups divide ``K``.
        zero_point: shaped as ``scale``, 0 to 15; None is for codes around zero, which are stored with 8 added.
        input_scale: float32 ``[K]``, or None.

    Returns:
        int32 ``[K, N / 8]``: nibble ``i`` of word ``c`` is the code of output ``8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``.

    Raises:
        ValueError: if a shape, dtype or device does not fit, naming what is allowed.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} of shape {tuple(weight.shape)}; use a floating-point matrix [N, K]")
    if weight.shape[0] % _WORD:
        raise ValueError(f"weight has {weight.shape[0]} outputs; 8 fill a word: use a multiple of 8")
    _check_grid(weight.shape, weight.device, scale, zero_point, input_scale)
    return awq_pack_op(weight, scale, zero_point, input_scale)


def awq_unpack(
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    input_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``(code - zero) * scale / input_scale``, computed in float32, ``[N, K]``.

    Args:
        words: int32 ``[K, N / 8]``, as :func:`awq_pack` returns them.
        scale: see :func:`awq_pack`.
        zero_point: see :func:`awq_pack`.
        input_scale: see :func:`awq_pack`.
        dtype: of the result, floating point.

    Raises:
        ValueError: if a shape, dtype or device does not fit, naming what is allowed.
    """
    if words.dim() != 2 or words.dtype != torch.int32:
        raise ValueError(f"words are {words.dtype} of shape {tuple(words.shape)}; use torch.int32 [K, N / 8]")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not allowed; use a floating-point dtype")
    shape = torch.Size((words.shape[1] * _WORD, words.shape[0]))
    _check_grid(shape, words.device, scale, zero_point, input_scale)
    return awq_unpack_op(words, scale, zero_point, input_scale, dtype)


def _check_grid(
    shape: torch.Size, device: torch.device, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None
) -> None:
    rows, columns = shape
    fits = scale.dim() == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and columns % scale.shape[1] == 0
    if not fits or scale.dtype != torch.float32:
        raise ValueError(
            f"scale is {scale.dtype} of shape {tuple(scale.shape)}; a weight of shape {tuple(shape)} takes "
            f"torch.float32 [{rows}, groups], the groups dividing {columns}"
        )
    if zero_point is not None and (zero_point.shape != scale.shape or zero_point.dtype == torch.bool):
        raise ValueError(f"zero_point has shape {tuple(zero_point.shape)}; use that of the scale, {tuple(scale.shape)}")
    if input_scale is not None and (input_scale.shape != (columns,) or input_scale.dtype != torch.float32):
        raise ValueError(
            f"input_scale is {input_scale.dtype} of shape {tuple(input_scale.shape)}; use torch.float32 [{columns}]"
        )
    for name, tensor in (("scale", scale), ("zero_point", zero_point), ("input_scale", input_scale)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and the weight on {device}; move it there")


def reference_awq_pack(weight: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """The definition: scale, quantize, pack."""
    if not weight.numel():
        return weight.new_empty((weight.shape[1], weight.shape[0] // _WORD), dtype=torch.int32)
    values = weight.to(torch.float32)
    if input_scale is not None:
        values = values * input_scale
    symmetric, group = zero_point is None, weight.shape[1] // scale.shape[1]
    codes = quantize_affine(values.contiguous(), scale, zero_point, bits=4, symmetric=symmetric, group_size=group)
    unsigned = codes.to(torch.int16) + 8 if symmetric else codes.to(torch.int16)
    return pack_awq_words(unsigned.t().contiguous())


def reference_awq_unpack(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The definition: unpack, dequantize, divide."""
    rows, columns = words.shape[1] * _WORD, words.shape[0]
    if not words.numel():
        return scale.new_empty((rows, columns), dtype=dtype)
    codes = unpack_awq_words(words).t().contiguous()
    if zero_point is None:
        codes = codes.to(torch.int8) - 8
    values = dequantize_affine(codes, scale, zero_point, group_size=columns // scale.shape[1])
    return (values if input_scale is None else values / input_scale).to(dtype)


@torch.library.custom_op("lightning_qat::awq_pack", mutates_args=())
def awq_pack_op(weight: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """The unchecked op behind :func:`awq_pack`."""
    return reference_awq_pack(weight, scale, zero_point, input_scale)


@torch.library.custom_op("lightning_qat::awq_unpack", mutates_args=())
def awq_unpack_op(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The unchecked op behind :func:`awq_unpack`."""
    return reference_awq_unpack(words, scale, zero_point, input_scale, dtype)


@awq_pack_op.register_fake
def _(weight: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None) -> Tensor:
    return weight.new_empty((weight.shape[1], weight.shape[0] // _WORD), dtype=torch.int32)


@awq_unpack_op.register_fake
def _(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return words.new_empty((words.shape[1] * _WORD, words.shape[0]), dtype=dtype)


# The kernels of CUDA register themselves; they need what is defined above.
from lightning_qat.ops import awq_cuda as _cuda  # noqa: E402, F401
