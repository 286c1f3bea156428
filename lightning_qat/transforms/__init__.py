"""model -> model: match, prepare, calibrate, change phase, convert, save and load."""

from lightning_qat.transforms.calibrate import calibrate
from lightning_qat.transforms.checkpoint import QuantizedFileError, float_state_dict, load_quantized, save_quantized
from lightning_qat.transforms.convert import convert
from lightning_qat.transforms.phase import Phase, apply_phase, set_bits
from lightning_qat.transforms.prepare import prepare

__all__ = [
    "Phase",
    "QuantizedFileError",
    "apply_phase",
    "calibrate",
    "convert",
    "float_state_dict",
    "load_quantized",
    "prepare",
    "save_quantized",
    "set_bits",
]
