"""Lightning callbacks: *when*, not how."""

from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.batch_norm_folding import BatchNormFolding
from lightning_qat.callbacks.delayed_qat_start import DelayedQATStart
from lightning_qat.callbacks.freeze_quantization import FreezeQuantization
from lightning_qat.callbacks.observer_calibration import ObserverCalibration
from lightning_qat.callbacks.progressive_bit_reduction import ProgressiveBitReduction
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining

__all__ = [
    "BatchNormFolding",
    "DelayedQATStart",
    "FreezeQuantization",
    "ObserverCalibration",
    "ProgressiveBitReduction",
    "QuantizationAwareTraining",
    "QuantizationCallback",
]
