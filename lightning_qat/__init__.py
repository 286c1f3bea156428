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
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose2d,
    QuantizedEmbedding,
    QuantizedLinear,
    fold_bn_into_conv,
)
from lightning_qat.ops.fake_quantize import fake_quantize
from lightning_qat.quantizers.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)
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
    read_certificate,
    save_quantized,
    set_bits,
    update_ranges,
)

if TYPE_CHECKING:
    from lightning_qat.callbacks import (
        BatchNormFolding,
        DelayedQATStart,
        FreezeQuantization,
        ObserverCalibration,
        ProgressiveBitReduction,
        QuantizationAwareTraining,
        QuantizationGap,
        QuantizationMonitor,
        QuantizedModelCheckpoint,
    )
    from lightning_qat.metrics import quantization_error, sqnr

__version__ = "0.1.0"

# Lightning takes seconds to import; who only prepares and converts a plain model does not wait for it.
_LAZY = {
    "BatchNormFolding": "callbacks",
    "DelayedQATStart": "callbacks",
    "FreezeQuantization": "callbacks",
    "ObserverCalibration": "callbacks",
    "ProgressiveBitReduction": "callbacks",
    "QuantizationAwareTraining": "callbacks",
    "QuantizationGap": "callbacks",
    "QuantizationMonitor": "callbacks",
    "QuantizedModelCheckpoint": "callbacks",
    "quantization_error": "metrics",
    "sqnr": "metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


__all__ = [
    "PRESETS",
    "BatchNormFolding",
    "BitsAndBytesConfig",
    "DelayedQATStart",
    "FreezeQuantization",
    "HistogramObserver",
    "LayerRule",
    "LayerStatistics",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "ObserverCalibration",
    "Observer",
    "ParityError",
    "ParityReport",
    "PercentileObserver",
    "Phase",
    "ProgressiveBitReduction",
    "QATConfig",
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATConvTranspose2d",
    "QATEmbedding",
    "QATLinear",
    "QuantizationAwareTraining",
    "QuantizationConfig",
    "QuantizationGap",
    "QuantizationMonitor",
    "QuantizationPlan",
    "QuantizationScheme",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose2d",
    "QuantizedEmbedding",
    "QuantizedFileError",
    "QuantizedLinear",
    "QuantizedModelCheckpoint",
    "apply_phase",
    "calibrate",
    "check_parity",
    "convert",
    "defer_ranges",
    "fake_quantize",
    "float_checkpoint",
    "float_state_dict",
    "fold_bn_into_conv",
    "load_quantized",
    "parity_report",
    "prepare",
    "quantization_error",
    "quantization_statistics",
    "read_certificate",
    "save_quantized",
    "set_bits",
    "sqnr",
    "update_ranges",
]
