"""What benchmark group ``matmul`` makes of a Linear: converted layers, and on a GPU the kernels without a layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.config import PRESETS, BitsAndBytesConfig, QuantizationConfig
from lightning_qat.nn import QuantizedLinear
from lightning_qat.ops.affine import choose_scale_zero_point, dequantize_affine, quantize_affine
from lightning_qat.ops.codebook_tables import codebook
from lightning_qat.quantizers.quantizer import quantize
from lightning_qat.transforms import calibrate, convert, prepare

from ._benchmark_peers import Run, forward_of

_PRESETS = ("int8_dynamic", "llm_int8", "w4a16", "nf4")
_GROUP, _BLOCK = 128, 64


@dataclass(frozen=True)
class Product:
    """A form of the layer.

    Args:
        run: its forward pass.
        weight_bytes: that it stores, scales counted.
        exact: the product in float64 of the numbers that its codes stand for; None where that is not known.
    """

    run: Run
    weight_bytes: int
    exact: Run | None = None


def our_products(layer: nn.Linear, samples: Tensor) -> dict[str, Product]:
    """Return the converted layers; ``samples`` calibrate those that have static ranges.

    Raises:
        RuntimeError: if a layer does not hold the codes that quantizing its weight alone gives.
    """
    found = {}
    for preset in _PRESETS:
        prepared = prepare(nn.Sequential(copy.deepcopy(layer)), preset)
        calibrate(prepared, [samples])
        converted: Any
        (converted,) = convert(prepared).eval().children()
        codes = quantize(layer.weight, PRESETS[preset].weight_config()).codes
        if preset != "llm_int8" and not torch.equal(converted.codes, codes):
            wrong = int((converted.codes != codes).sum())
            raise RuntimeError(f"{wrong} of {codes.numel()} codes of the converted {preset} layer are wrong; not timed")
        size = sum(buffer.nbytes for buffer in converted.buffers())
        found[f"lightning_qat {preset}"] = Product(forward_of(converted), size, _exact(converted))
    return found


def _exact(layer: QuantizedLinear) -> Run:
    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return exact_product(layer.quantized_input(x), layer.weight, layer.bias)

    return run


@torch.inference_mode()
def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in float64."""
    result = x.double() @ weight.double().T
    return result if bias is None else result + bias.double()


def kernel_products(layer: nn.Linear) -> dict[str, Product]:
    """Return W8A8 with a scale per token, W4A16 in groups and NF4; they take the dtype and device of ``layer``."""
    with torch.inference_mode():
        return {"w8a8 kernel, per token": _w8a8(layer), "w4a16 kernel": _int4(layer), "nf4 kernel": _nf4(layer)}


def _w8a8(layer: nn.Linear) -> Product:
    from lightning_qat.kernels.token_quantize import token_quantize_triton
    from lightning_qat.kernels.w8a8_matmul import launch_w8a8_matmul

    held, bias = quantize(layer.weight, QuantizationConfig("int8", per_channel=True)), layer.bias
    codes, scale = held.codes, held.scale

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        rows, row_scale, _ = token_quantize_triton(x)
        return launch_w8a8_matmul(rows, row_scale, codes, scale, bias, dtype=x.dtype)

    @torch.inference_mode()
    def exact(x: Tensor) -> Tensor:
        absmax = x.float().abs().amax(1, keepdim=True)
        row_scale, _ = choose_scale_zero_point(-absmax, absmax, bits=8, symmetric=True)
        rows = dequantize_affine(quantize_affine(x, row_scale, bits=8, symmetric=True), row_scale)
        return exact_product(rows, held.dequantize(torch.float32), bias)

    return Product(run, held.nbytes, exact)


def _int4(layer: nn.Linear) -> Product:
    from lightning_qat.kernels.w4a16_matmul import launch_w4a16_matmul

    held, bias = quantize(layer.weight, QuantizationConfig("int4", group_size=_GROUP)), layer.bias
    packed, scale = held.packed, held.scale

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return launch_w4a16_matmul(x, packed, scale, bias=bias, group_size=_GROUP)

    return Product(run, held.nbytes, lambda x: exact_product(x, held.dequantize(torch.float32), bias))


def _nf4(layer: nn.Linear) -> Product:
    from lightning_qat.kernels.w4a16_matmul import launch_w4a16_matmul

    held = quantize(layer.weight, QuantizationConfig("nf4", bnb=BitsAndBytesConfig(bits=4, block_size=_BLOCK)))
    bias, packed, scale, table = layer.bias, held.packed, held.scale, codebook("nf4", layer.weight.device)

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return launch_w4a16_matmul(x, packed, scale, bias=bias, group_size=_BLOCK, table=table)

    return Product(run, held.nbytes, lambda x: exact_product(x, held.dequantize(torch.float32), bias))
