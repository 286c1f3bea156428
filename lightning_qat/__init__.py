"""Quantization-aware training and post-training quantization for PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_qat.config import (
    PRESETS,
    BitsAndBytesConfig,
    LayerRule,
    QATConfig,
    QuantizationConfig,
    QuantizationPlan,
    QuantizationScheme,
)
from lightning_qat.nn import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose2d,
    QATEmbedding,
    QATLinear,
    QATMultiheadAttention,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    fold_bn_into_conv,
)
from lightning_qat.ops.fake_quantize import fake_quantize
from lightning_qat.ptq import (
    GPTQOptions,
    GPTQQuantizer,
    PTQObserver,
    PTQOptions,
    PTQReport,
    preflight,
    ptq_report,
    quantize_model,
)
from lightning_qat.quantizers.clipping import add_clipping_decay
from lightning_qat.quantizers.debug import QuantizationEvent, debug_quantizers
from lightning_qat.quantizers.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)
from lightning_qat.quantizers.quantizer import Quantizer, quantize
from lightning_qat.quantizers.tensor_statistics import QuantizationStats
from lightning_qat.schemes import Scheme, register_scheme
from lightning_qat.schemes.quantized_tensor import QuantizedTensor
from lightning_qat.transforms import (
    LayerStatistics,
    ParityError,
    ParityReport,
    Phase,
    QuantizedFileError,
    apply_phase,
    calibrate,
    check_parity,
    convert,
    defer_ranges,
    float_checkpoint,
    float_state_dict,
    load_quantized,
    parity_report,
    prepare,
    quantization_statistics,
    quantize_dynamic,
    read_certificate,
    save_quantized,
    set_bits,
    update_ranges,
)
from lightning_qat.transforms.param_groups import quantization_param_groups
from lightning_qat.transforms.penalty import qat_loss, quantization_penalty

if TYPE_CHECKING:
    from lightning_qat.callbacks import (
        BatchNormFolding,
        DelayedQATStart,
        FreezeQuantization,
        LearnedScales,
        ObserverCalibration,
        PlateauBitReduction,
        ProgressiveBitReduction,
        QuantizationAwareTraining,
        QuantizationGap,
        QuantizationMonitor,
        QuantizationPenalty,
        QuantizedModelCheckpoint,
        SelfDistillation,
        SensitivityBitReduction,
        WeightOscillation,
    )
    from lightning_qat.formats.bitsandbytes import (
        dequantize_bitsandbytes,
        from_bitsandbytes_format,
        quantize_4bit,
        quantize_dynamic_tree,
        quantize_int8,
        to_bitsandbytes_format,
    )
    from lightning_qat.metrics import quantization_error, sqnr

__version__ = "0.1.0"

# Lightning takes seconds to import; who only prepares and converts a plain model does not wait for it.
_LAZY = {
    "BatchNormFolding": "callbacks",
    "DelayedQATStart": "callbacks",
    "FreezeQuantization": "callbacks",
    "LearnedScales": "callbacks",
    "ObserverCalibration": "callbacks",
    "PlateauBitReduction": "callbacks",
    "ProgressiveBitReduction": "callbacks",
    "QuantizationAwareTraining": "callbacks",
    "QuantizationGap": "callbacks",
    "QuantizationMonitor": "callbacks",
    "QuantizationPenalty": "callbacks",
    "QuantizedModelCheckpoint": "callbacks",
    "SelfDistillation": "callbacks",
    "SensitivityBitReduction": "callbacks",
    "WeightOscillation": "callbacks",
    "dequantize_bitsandbytes": "formats.bitsandbytes",
    "from_bitsandbytes_format": "formats.bitsandbytes",
    "quantize_4bit": "formats.bitsandbytes",
    "quantize_dynamic_tree": "formats.bitsandbytes",
    "quantize_int8": "formats.bitsandbytes",
    "to_bitsandbytes_format": "formats.bitsandbytes",
    "quantization_error": "metrics",
    "sqnr": "metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


__all__ = [
    "BatchNormFolding",
    "BitsAndBytesConfig",
    "DelayedQATStart",
    "FreezeQuantization",
    "GPTQOptions",
    "GPTQQuantizer",
    "HistogramObserver",
    "LayerRule",
    "LayerStatistics",
    "LearnedScales",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "ObserverCalibration",
    "PRESETS",
    "ParityError",
    "ParityReport",
    "PercentileObserver",
    "Phase",
    "PlateauBitReduction",
    "ProgressiveBitReduction",
    "QATConfig",
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATConvTranspose2d",
    "QATEmbedding",
    "QATLinear",
    "QATMultiheadAttention",
    "QuantizationAwareTraining",
    "QuantizationConfig",
    "QuantizationEvent",
    "QuantizationGap",
    "QuantizationMonitor",
    "QuantizationPenalty",
    "QuantizationPlan",
    "QuantizationScheme",
    "QuantizationStats",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose2d",
    "QuantizedEmbedding",
    "QuantizedFileError",
    "QuantizedLinear",
    "QuantizedModelCheckpoint",
    "QuantizedMultiheadAttention",
    "QuantizedTensor",
    "Quantizer",
    "Scheme",
    "SelfDistillation",
    "SensitivityBitReduction",
    "WeightOscillation",
    "add_clipping_decay",
    "apply_phase",
    "calibrate",
    "check_parity",
    "convert",
    "debug_quantizers",
    "defer_ranges",
    "dequantize_bitsandbytes",
    "fake_quantize",
    "float_checkpoint",
    "float_state_dict",
    "fold_bn_into_conv",
    "from_bitsandbytes_format",
    "load_quantized",
    "parity_report",
    "prepare",
    "qat_loss",
    "quantization_error",
    "quantization_penalty",
    "quantization_param_groups",
    "quantization_statistics",
    "quantize",
    "quantize_4bit",
    "quantize_dynamic",
    "quantize_dynamic_tree",
    "quantize_int8",
    "PTQObserver",
    "PTQOptions",
    "PTQReport",
    "preflight",
    "ptq_report",
    "quantize_model",
    "read_certificate",
    "register_scheme",
    "save_quantized",
    "set_bits",
    "sqnr",
    "to_bitsandbytes_format",
    "update_ranges",
]
