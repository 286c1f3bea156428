"""Post-training quantization."""

from lightning_qat.ptq.bit_allocation import (
    LayerSensitivity,
    allocate_bits,
    measure_sensitivity,
    mixed_plan,
    write_plan,
)
from lightning_qat.ptq.gptq import GPTQOptions
from lightning_qat.ptq.gptq_quantizer import GPTQQuantizer
from lightning_qat.ptq.quantize_model import quantize_model

__all__ = [
    "GPTQOptions",
    "GPTQQuantizer",
    "LayerSensitivity",
    "allocate_bits",
    "measure_sensitivity",
    "mixed_plan",
    "quantize_model",
    "write_plan",
]
