"""Post-training quantization."""

from lightning_qat.ptq.quantize_model import quantize_model

__all__ = ["quantize_model"]
