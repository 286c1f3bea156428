"""The product of a training step in integers: codes of the input times codes of the weight, as the converted layer.

Exact up to the rounding of its scales, where a float product of fake-quantized values rounds every sum. oneDNN's kernel
reads the weight as it is here: packed, as :mod:`lightning_qat.ops.integer_linear` does it once for all inputs, it would
be used once. 1024 tokens, two cores, milliseconds of this with the weight's codes and of the float product: 256 x 768
0.6 and 1.7, 1024 x 256 1.0 and 3.3.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from lightning_qat.ops.integer_linear import MAX_TERMS, linear_is_exact, multiply_codes, pack_linear

_LOG = logging.getLogger(__name__)

#: With fewer products, or fewer tokens for each weight's code that is made, the float product takes as long.
_FEWEST_PRODUCTS, _FEWEST_TOKENS = 2**24, 64
#: oneDNN 3.12's kernel for AMX takes a weight that is not packed wrongly where its columns do not fill blocks and the
#: zero point is 0, as after ReLU: 300 tokens, 64 x 784, gave other sums in half of the rows, now these, now those.
_BLOCK = 64
#: What a shape is tried with before it is relied on: tokens at most, and zero points.
_TRIED_TOKENS, _TRIED_ZERO_POINTS = 1024, (0, 131)


def product_pays(tokens: int, rows: int, columns: int) -> bool:
    """Return whether the product of so many tokens and a weight ``[rows, columns]`` is to be one of integers."""
    large = tokens >= _FEWEST_TOKENS and tokens * rows * columns >= _FEWEST_PRODUCTS
    if not (large and columns % _BLOCK == 0 and columns <= MAX_TERMS and _takes_plain_weights()):
        return False
    # Batches of every length between two powers of two are tried as one.
    tried = min(1 << tokens.bit_length(), _TRIED_TOKENS) - 1
    return _is_right(tried, rows, columns, torch.get_num_threads())


def codes_product(
    codes: Tensor, scale: float, zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Return ``(codes - zero_point) @ weight * scale * weight_scale + bias``, float32, summed exactly in int32.

    Args:
        codes: uint8, ``[tokens, in_features]``, contiguous.
        scale: of them.
        zero_point: of them, 0 to 255.
        weight: int8, ``[in_features, out_features]``, contiguous; ``in_features`` divides by 64.
        weight_scale: float32, one element or ``[out_features]``.
        bias: float32, ``[out_features]``, or None.
    """
    scales = weight_scale.reshape(-1)
    zeros = torch.zeros(scales.shape, dtype=torch.int32, device="cpu")
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, scale, zero_point, weight.to_mkldnn(), scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


@lru_cache(maxsize=1024)
def _is_right(tokens: int, rows: int, columns: int, threads: int) -> bool:
    """Return whether a product of this shape equals that of the packed weight, which converted layers have; tried once.

    Few others give that kernel weights that are not packed, so it is not taken at its word.
    """
    generator = torch.Generator(device="cpu").manual_seed(tokens + rows + columns)  # nobody else's random numbers
    codes = torch.randint(0, 256, (tokens, columns), generator=generator, dtype=torch.uint8, device="cpu")
    weight = torch.randint(-128, 128, (columns, rows), generator=generator, dtype=torch.int8, device="cpu")
    scale = torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        packed = pack_linear(weight.t(), scale, few=False)
        for zero_point in _TRIED_ZERO_POINTS:
            expected = multiply_codes(codes, 0.5, zero_point, packed, None)
            torch.full_like(codes, 0xA5).repeat(8, 1)  # what a kernel might read without having written it
            if not torch.equal(codes_product(codes, 0.5, zero_point, weight, scale, None), expected):
                _LOG.warning(
                    "oneDNN's product of %d x %d codes with a weight of %d rows is not the one due; float products "
                    "are taken", tokens, columns, rows,
                )  # fmt: skip
                return False
    return True


@lru_cache(maxsize=1)
def _takes_plain_weights() -> bool:
    """Return whether this machine's kernel sums exactly, and takes a weight that is not packed; found once."""
    if not linear_is_exact():
        return False
    x = torch.full((70, 2 * _BLOCK), 255, dtype=torch.uint8, device="cpu")
    x[1::2, ::3] = 7
    w = torch.full((2 * _BLOCK, 48), 127, dtype=torch.int8, device="cpu")
    w[::2, 1::5] = -128
    one = torch.ones(48, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            result = codes_product(x, 1.0, 3, w, one, None)
    except (AttributeError, RuntimeError):  # a build of PyTorch whose tensors for oneDNN hold no integers
        return False
    return torch.equal(result.long(), (x.long() - 3) @ w.long())
