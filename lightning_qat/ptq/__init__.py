"""Post-training quantization."""

from lightning_qat.ptq.awq import AWQOptions
from lightning_qat.ptq.awq_quantizer import AWQQuantizer
from lightning_qat.ptq.bit_allocation import (
    LayerSensitivity,
    allocate_bits,
    measure_sensitivity,
    mixed_plan,
    write_plan,
)
from lightning_qat.ptq.clipping import ClippingOptions
from lightning_qat.ptq.equalization import GroupEqualization, equalize
from lightning_qat.ptq.equalizing_scales import EqualizationOptions
from lightning_qat.ptq.gptq import GPTQOptions
from lightning_qat.ptq.gptq_quantizer import GPTQQuantizer
from lightning_qat.ptq.gram_sensitivity import gram_sensitivity
from lightning_qat.ptq.methods import PTQOptions
from lightning_qat.ptq.outcome import LayerOutcome, PTQObserver, PTQReport, ptq_report
from lightning_qat.ptq.preflight import LayerTask, preflight
from lightning_qat.ptq.quantize_model import quantize_model
from lightning_qat.ptq.smoothing import SmoothingOptions
from lightning_qat.ptq.weight_files import WeightFiles, without_weights

__all__ = [
    "AWQOptions",
    "AWQQuantizer",
    "ClippingOptions",
    "EqualizationOptions",
    "GPTQOptions",
    "GPTQQuantizer",
    "GroupEqualization",
    "LayerOutcome",
    "LayerSensitivity",
    "LayerTask",
    "PTQObserver",
    "PTQOptions",
    "PTQReport",
    "SmoothingOptions",
    "WeightFiles",
    "allocate_bits",
    "equalize",
    "gram_sensitivity",
    "measure_sensitivity",
    "mixed_plan",
    "preflight",
    "ptq_report",
    "quantize_model",
    "without_weights",
    "write_plan",
]
