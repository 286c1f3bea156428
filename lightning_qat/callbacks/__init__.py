"""Lightning callbacks: *when*, not how."""

from lightning_qat.callbacks.active_schedule import active_schedule
from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.batch_norm_folding import BatchNormFolding
from lightning_qat.callbacks.delayed_qat_start import DelayedQATStart
from lightning_qat.callbacks.freeze_quantization import FreezeQuantization
from lightning_qat.callbacks.observer_calibration import ObserverCalibration
from lightning_qat.callbacks.progressive_bit_reduction import ProgressiveBitReduction
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.quantization_gap import QuantizationGap
from lightning_qat.callbacks.quantization_monitor import QuantizationMonitor
from lightning_qat.callbacks.quantized_model_checkpoint import QuantizedModelCheckpoint

__all__ = [
    "BatchNormFolding",
    "DelayedQATStart",
    "FreezeQuantization",
    "ObserverCalibration",
    "ProgressiveBitReduction",
    "QuantizationAwareTraining",
    "QuantizationCallback",
    "QuantizationGap",
    "QuantizationMonitor",
    "QuantizedModelCheckpoint",
    "active_schedule",
]
