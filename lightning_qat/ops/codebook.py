"""Block-wise codebook formats: codes that name values of a table, in units of the largest magnitude of their block.

Blocks run over the flattened tensor in contiguous order, whatever its strides; the last may be short. The functions
called ``reference_*`` are the definition, in plain traceable PyTorch and for every device. Everything else here equals
them bit for bit. Codes equal those of bitsandbytes 0.50.2 for input that both accept.

Sources: Dettmers et al. 2022 (8-bit optimizers: block-wise quantization, the dynamic map) and 2023 (QLoRA: nf4);
bitsandbytes for fp4, the nibble order and every decision on a tie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qat.ops.affine_cpu import takes_pieces
from lightning_qat.ops.codebook_tables import (
    CODEBOOK_BITS,
    bin_codes,
    check_codebook,
    divides_last_block,
    least_absmax,
    nan_code,
    thresholds,
)
from lightning_qat.ops.codebook_tables import (
    codebook as codebook_values,
)
from lightning_qat.ops.layout import match_layout
from lightning_qat.ops.nibbles import pack_nibbles as pack_nibbles
from lightning_qat.ops.nibbles import unpack_nibbles as unpack_nibbles
from lightning_qat.ops.transformed import is_transformed, straight_through

if TYPE_CHECKING:
    pass

#: A value up to this many times its block's absmax has its gradient. The slack is for the block's maximum where
#: the absmax went through another rounding.
EDGE = 1 + 2.0**-10


# --- what is public -------------------------------------------------------------------------------


def block_absmax(x: Tensor, block_size: int, *, codebook: str | None = None, rule: str = "cpu") -> Tensor:
    """Return the largest magnitude of every block, float32 ``[ceil(numel / block_size)]``; NaN if it holds one.

    Args:
        x: floating point, any shape and strides.
        block_size: consecutive elements that share a scale, 1 or more.
        codebook: given, the absmax of a short last block is what bitsandbytes stores for that format: its 4-bit
            CPU kernel writes 1e-38 for a smaller one, such as 0.0.
        rule: "cpu" or "cuda".

    Raises:
        ValueError: if ``x`` is not floating point, or ``block_size``, ``codebook`` or ``rule`` is not allowed.
    """
    _check_values(x)
    _check_block_size(block_size)
    if codebook is None:
        return _absmax(x.reshape(-1), block_size)
    check_codebook(codebook, rule)
    return codebook_absmax_op(x, codebook, block_size, rule)


def quantize_codebook(
    x: Tensor,
    absmax: Tensor,
    *,
    codebook: str,
    block_size: int,
    rule: str = "cpu",
    generator: torch.Generator | None = None,
    stochastic: bool = False,
) -> Tensor:
    """Return the code of every element.

    Computed in float32. Values beyond the absmax get an end code. A NaN, also one that comes of an infinite absmax or
    of the infinite reciprocal of one below 3e-39, gets the code in which the kernel's comparisons end.

    Args:
        x: floating point, any shape and strides.
        absmax: one for each block, see :func:`block_absmax`.
        codebook: "nf4", "fp4" or "dynamic_tree".
        block_size: consecutive elements that share a scale.
        rule: how bitsandbytes decides on a CPU or on a GPU. The two differ for fp4 near five thresholds and around
            zero, for the 8-bit map in about 0.2 % of normal values, and for nf4 where an absmax is 0.0 or the last
            block is short. (The GPU's own reciprocal may be off by one unit in the last place; this one is exact.)
        generator: of the random numbers, on the device of ``x``.
        stochastic: take one of the two neighbouring values with a probability that makes it the mean; unbiased
            within the values of the table (the smallest of the dynamic map is -0.993).

    Returns:
        uint8, contiguous and shaped as ``x``.

    Raises:
        ValueError: if a dtype, shape, device or name does not fit, naming what is allowed.
    """
    _check(x, absmax, codebook, block_size, rule)
    if stochastic:
        return _quantize_stochastically(x, absmax, codebook, block_size, rule, generator)
    if generator is not None:
        raise ValueError("generator is given with stochastic=False, which takes no random numbers; leave it out")
    stored, _ = codebook_quantize_op(x, absmax, codebook, block_size, rule)
    return unpack_nibbles(stored, x.shape) if CODEBOOK_BITS[codebook] == 4 else stored.view(x.shape)


def dequantize_codebook(
    codes: Tensor, absmax: Tensor, *, codebook: str, block_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``table[code] * absmax`` of the block, computed in float32 and then cast.

    Args:
        codes: uint8 of 0 to 15 or 0 to 255, any shape.
        absmax: one for each block.
        codebook: "nf4", "fp4" or "dynamic_tree".
        block_size: consecutive elements that share a scale.
        dtype: of the result, floating point.

    Raises:
        ValueError: if a dtype, shape, device or name does not fit, naming what is allowed.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes have dtype {codes.dtype}; use torch.uint8")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not allowed; use a floating-point dtype")
    _check_blocks(codes, absmax, codebook, block_size)
    stored = pack_nibbles(codes, codebook) if CODEBOOK_BITS[codebook] == 4 else codes.reshape(-1)
    return codebook_dequantize_op(stored, absmax, codes.numel(), codebook, block_size, dtype).view(codes.shape)


def fake_quantize_codebook(
    x: Tensor,
    absmax: Tensor,
    *,
    codebook: str,
    block_size: int,
    rule: str = "cpu",
    stored_absmax: Tensor | None = None,
) -> Tensor:
    """Return ``x`` quantized and dequantized, with a straight-through gradient.

    The gradient of ``x`` is the incoming one where ``|x| <= absmax`` of the block and 0 elsewhere (at a NaN too).
    NaN stays NaN. The scales get no gradient. Keeps nothing for the backward pass but the arguments.

    Args:
        x: floating point, any shape and strides.
        absmax: with which codes are chosen, one for each block.
        codebook: "nf4", "fp4" or "dynamic_tree".
        block_size: consecutive elements that share a scale.
        rule: see :func:`quantize_codebook`.
        stored_absmax: with which values are computed, where scales are stored less exactly (nested); None is
            ``absmax``.

    Returns:
        A new tensor with the shape, dtype and strides of ``x``.

    Raises:
        ValueError: if a dtype, shape, device or name does not fit, naming what is allowed.
    """
    _check(x, absmax, codebook, block_size, rule)
    if stored_absmax is not None:
        _check_blocks(x, stored_absmax, codebook, block_size)
    if not is_transformed():
        return codebook_fake_quantize_op(x, absmax, stored_absmax, codebook, block_size, rule)
    return straight_through(
        x,
        lambda *of: codebook_fake_quantize_op(*of, codebook, block_size, rule),
        lambda grad, x, absmax, _: inside_blocks(grad, x, absmax, block_size),
        absmax,
        stored_absmax,
    )


# --- the checks -----------------------------------------------------------------------------------


def _check_values(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; use a floating-point dtype")


def _check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"block_size={block_size!r} is not allowed; use an integer of 1 or more")


def _check(x: Tensor, absmax: Tensor, codebook: str, block_size: int, rule: str) -> None:
    _check_values(x)
    check_codebook(codebook, rule)
    _check_blocks(x, absmax, codebook, block_size)


def _check_blocks(x: Tensor, absmax: Tensor, codebook: str, block_size: int) -> None:
    check_codebook(codebook)
    _check_block_size(block_size)
    blocks = -(-x.numel() // block_size)
    if absmax.dtype != torch.float32 or absmax.numel() != blocks:
        raise ValueError(
            f"absmax is {absmax.dtype} of shape {tuple(absmax.shape)}; {x.numel()} elements in blocks of {block_size} "
            f"take torch.float32 with {blocks} elements"
        )
    if absmax.device != x.device:
        raise ValueError(f"absmax is on {absmax.device} and the tensor on {x.device}; move it to {x.device}")


# --- the definition -------------------------------------------------------------------------------


def _absmax(flat: Tensor, block_size: int) -> Tensor:
    if flat.numel() == 0:
        return flat.new_empty(0, dtype=torch.float32)
    full = flat.numel() // block_size * block_size
    parts = [flat[:full].view(-1, block_size)] if full else []
    if full < flat.numel():
        parts.append(flat[full:].view(1, -1))
    # Not of abs(): that would take memory for all of it.
    return torch.cat([torch.maximum(p.amax(1), -p.amin(1)) for p in parts]).abs().to(torch.float32)


def reference_absmax(flat: Tensor, name: str, block_size: int, rule: str) -> Tensor:
    """Return the absmax of every block of one-dimensional values as bitsandbytes stores it."""
    absmax = _absmax(flat, block_size)
    if flat.numel() % block_size and divides_last_block(name, rule):
        absmax = torch.cat((absmax[:-1], absmax[-1:].clamp_min(least_absmax(name, rule))))
    return absmax


def spread(absmax: Tensor, block_size: int, count: int) -> Tensor:
    """Return the absmax of every element, ``[count]``."""
    return absmax.reshape(-1, 1).expand(-1, block_size).reshape(-1)[:count]


def reference_ratios(flat: Tensor, absmax: Tensor, name: str, block_size: int, rule: str) -> Tensor:
    """Return one-dimensional values in units of their block's absmax, float32."""
    values = flat.to(torch.float32)
    divisor = absmax.reshape(-1).clamp_min(least_absmax(name, rule))
    ratios = values * spread(1.0 / divisor, block_size, flat.numel())
    full = flat.numel() // block_size * block_size
    if full < flat.numel() and divides_last_block(name, rule):
        ratios = torch.cat((ratios[:full], values[full:] / divisor[-1:]))
    return ratios


def choose_codes(ratios: Tensor, name: str, rule: str) -> Tensor:
    """Return the code of every ratio of a one-dimensional tensor, uint8."""
    bins = torch.bucketize(ratios, thresholds(name, rule, ratios.device))
    codes = bin_codes(name, rule, ratios.device).index_select(0, bins)
    return codes.masked_fill(ratios.isnan(), nan_code(name, rule))


def reference_quantize(
    x: Tensor, absmax: Tensor | None, name: str, block_size: int, rule: str
) -> tuple[Tensor, Tensor]:
    """Return codes as they are stored, and a new tensor of the absmax of every block."""
    flat = x.reshape(-1)
    absmax = reference_absmax(flat, name, block_size, rule) if absmax is None else absmax.reshape(-1).clone()
    codes = choose_codes(reference_ratios(flat, absmax, name, block_size, rule), name, rule)
    return (pack_nibbles(codes, name) if CODEBOOK_BITS[name] == 4 else codes), absmax


def reference_dequantize(
    packed: Tensor, absmax: Tensor, numel: int, name: str, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the values of stored codes, one-dimensional."""
    codes = unpack_nibbles(packed, (numel,)) if CODEBOOK_BITS[name] == 4 else packed.reshape(-1)
    values = codebook_values(name, packed.device)[codes.to(torch.int64)]
    return (values * spread(absmax, block_size, numel)).to(dtype)


def reference_fake_quantize(
    x: Tensor, absmax: Tensor, stored: Tensor | None, name: str, block_size: int, rule: str
) -> Tensor:
    """Return the fake-quantized ``x``."""
    packed, _ = reference_quantize(x, absmax, name, block_size, rule)
    scale = absmax if stored is None else stored
    values = reference_dequantize(packed, scale, x.numel(), name, block_size, x.dtype).view(x.shape)
    return match_layout(torch.where(x.isnan(), x, values), x)


def reference_fake_quantize_backward(grad: Tensor, x: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Return the gradient of ``x``."""
    return match_layout(inside_blocks(grad, x, absmax, block_size), x)


def inside_blocks(grad: Tensor, x: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Return the gradient of ``x`` in operations that can be differentiated again by ``grad``, in whatever layout."""
    flat = x.reshape(-1).to(torch.float32)
    inside = spread(absmax * EDGE, block_size, flat.numel()) - flat.abs() >= 0
    return torch.where(inside.view(x.shape), grad, 0.0)


def _quantize_stochastically(
    x: Tensor, absmax: Tensor, name: str, block_size: int, rule: str, generator: torch.Generator | None
) -> Tensor:
    noise = torch.rand(x.numel(), generator=generator, device=x.device, dtype=torch.float32)
    drawn = _cpu.drawn_codes(x, absmax, noise, name, block_size, rule) if takes_pieces(x, absmax) else None
    if drawn is not None:
        return drawn.view(x.shape)
    ratios = reference_ratios(x.reshape(-1), absmax, name, block_size, rule)
    order = bin_codes(name, rule, x.device)
    values = codebook_values(name, x.device)[order.to(torch.int64)]
    below = (torch.bucketize(ratios, values, right=True) - 1).clamp(0, len(values) - 2)
    # Between the two zeros of fp4 there is no distance, and no ratio that is not 0.0 already.
    upward = (ratios - values[below]) / (values[below + 1] - values[below])
    codes = order[below + (noise < upward)].masked_fill(ratios.isnan(), nan_code(name, rule))
    return codes.view(x.shape)


# --- the ops --------------------------------------------------------------------------------------


@torch.library.custom_op("lightning_qat::codebook_absmax", mutates_args=())
def codebook_absmax_op(x: Tensor, name: str, block_size: int, rule: str) -> Tensor:
    """Unchecked: the absmax of every block as it is stored; see :func:`reference_absmax`."""
    return reference_absmax(x.reshape(-1), name, block_size, rule)


@torch.library.custom_op("lightning_qat::codebook_quantize", mutates_args=())
def codebook_quantize_op(
    x: Tensor, absmax: Tensor | None, name: str, block_size: int, rule: str
) -> tuple[Tensor, Tensor]:
    """Unchecked: codes as they are stored (nibbles or bytes, flat) and a new absmax; see :func:`reference_quantize`."""
    return reference_quantize(x, absmax, name, block_size, rule)


@torch.library.custom_op("lightning_qat::codebook_dequantize", mutates_args=())
def codebook_dequantize_op(
    packed: Tensor, absmax: Tensor, numel: int, name: str, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Unchecked: the values of stored codes, one-dimensional; see :func:`reference_dequantize`."""
    return reference_dequantize(packed, absmax, numel, name, block_size, dtype)


@torch.library.custom_op("lightning_qat::codebook_fake_quantize", mutates_args=())
def codebook_fake_quantize_op(
    x: Tensor, absmax: Tensor, stored: Tensor | None, name: str, block_size: int, rule: str
) -> Tensor:
    """The unchecked op behind :func:`fake_quantize_codebook`; see :func:`reference_fake_quantize`."""
    return reference_fake_quantize(x, absmax, stored, name, block_size, rule)


@torch.library.custom_op("lightning_qat::codebook_fake_quantize_backward", mutates_args=())
def codebook_fake_quantize_backward_op(grad: Tensor, x: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """The gradient of :func:`codebook_fake_quantize_op`; see :func:`reference_fake_quantize_backward`."""
    return reference_fake_quantize_backward(grad, x, absmax, block_size)


@codebook_absmax_op.register_fake
def _(x: Tensor, name: str, block_size: int, rule: str) -> Tensor:
    return x.new_empty((x.numel() + block_size - 1) // block_size, dtype=torch.float32)


@codebook_quantize_op.register_fake
def _(x: Tensor, absmax: Tensor | None, name: str, block_size: int, rule: str) -> tuple[Tensor, Tensor]:
    count = (x.numel() + 1) // 2 if CODEBOOK_BITS[name] == 4 else x.numel()
    blocks = (x.numel() + block_size - 1) // block_size
    return x.new_empty(count, dtype=torch.uint8), x.new_empty(blocks, dtype=torch.float32)


@codebook_dequantize_op.register_fake
def _(packed: Tensor, absmax: Tensor, numel: int, name: str, block_size: int, dtype: torch.dtype) -> Tensor:
    return absmax.new_empty(numel, dtype=dtype)


@codebook_fake_quantize_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@codebook_fake_quantize_backward_op.register_fake
def _(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, absmax, _, _, ctx.block_size, _ = inputs
    ctx.save_for_backward(x, absmax)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, absmax = ctx.saved_tensors
    # Where it may be differentiated again, as under create_graph=True.
    find = inside_blocks if torch.is_grad_enabled() else codebook_fake_quantize_backward_op
    gradient = find(grad, x, absmax, ctx.block_size) if ctx.needs_input_grad[0] else None
    return gradient, None, None, None, None, None


codebook_fake_quantize_op.register_autograd(_backward, setup_context=_setup_context)


# The kernels of the CPU and of CUDA register themselves; they need what is defined above.
from lightning_qat.ops import codebook_cpu as _cpu  # noqa: E402
from lightning_qat.ops import codebook_cuda as _cuda  # noqa: E402, F401
