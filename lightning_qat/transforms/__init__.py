"""model -> model: match, prepare, calibrate, change phase, convert, verify, save and load."""

from lightning_qat.transforms.calibrate import calibrate
from lightning_qat.transforms.certificate import ParityError, ParityReport, attach_report, parity_report
from lightning_qat.transforms.checkpoint import (
    QuantizedFileError,
    float_state_dict,
    load_quantized,
    read_certificate,
    save_quantized,
)
from lightning_qat.transforms.convert import convert
from lightning_qat.transforms.dequantize import dequantize_model
from lightning_qat.transforms.dynamic import quantize_dynamic
from lightning_qat.transforms.float_checkpoint import float_checkpoint
from lightning_qat.transforms.parity import check_parity
from lightning_qat.transforms.phase import Phase, apply_phase, set_bits
from lightning_qat.transforms.prepare import prepare
from lightning_qat.transforms.ranges import defer_ranges, update_ranges
from lightning_qat.transforms.statistics import LayerStatistics, quantization_statistics

__all__ = [
    "LayerStatistics",
    "ParityError",
    "ParityReport",
    "Phase",
    "QuantizedFileError",
    "apply_phase",
    "attach_report",
    "calibrate",
    "check_parity",
    "convert",
    "defer_ranges",
    "dequantize_model",
    "float_checkpoint",
    "float_state_dict",
    "load_quantized",
    "parity_report",
    "prepare",
    "quantization_statistics",
    "quantize_dynamic",
    "read_certificate",
    "save_quantized",
    "set_bits",
    "update_ranges",
]
