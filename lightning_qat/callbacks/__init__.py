"""Lightning callbacks: *when*, not how."""

from lightning_qat.callbacks.active_schedule import active_schedule
from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.batch_norm_folding import BatchNormFolding
from lightning_qat.callbacks.delayed_qat_start import DelayedQATStart
from lightning_qat.callbacks.freeze_quantization import FreezeQuantization
from lightning_qat.callbacks.learned_scales import LearnedScales
from lightning_qat.callbacks.observer_calibration import ObserverCalibration
from lightning_qat.callbacks.plateau_bit_reduction import PlateauBitReduction
from lightning_qat.callbacks.progressive_bit_reduction import ProgressiveBitReduction
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.quantization_gap import QuantizationGap
from lightning_qat.callbacks.quantization_monitor import QuantizationMonitor
from lightning_qat.callbacks.quantization_penalty import QuantizationPenalty
from lightning_qat.callbacks.quantized_model_checkpoint import QuantizedModelCheckpoint
from lightning_qat.callbacks.self_distillation import SelfDistillation
from lightning_qat.callbacks.sensitivity_bit_reduction import SensitivityBitReduction
from lightning_qat.callbacks.weight_oscillation import WeightOscillation

__all__ = [
    "BatchNormFolding",
    "DelayedQATStart",
    "FreezeQuantization",
    "LearnedScales",
    "ObserverCalibration",
    "PlateauBitReduction",
    "ProgressiveBitReduction",
    "QuantizationAwareTraining",
    "QuantizationCallback",
    "QuantizationGap",
    "QuantizationMonitor",
    "QuantizationPenalty",
    "QuantizedModelCheckpoint",
    "SelfDistillation",
    "SensitivityBitReduction",
    "WeightOscillation",
    "active_schedule",
]
