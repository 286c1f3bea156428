"""What a number format *is*: one file each, behind a registry."""

from lightning_qat.schemes.base import Scheme, get_scheme, register_scheme, registered_schemes
from lightning_qat.schemes.choice import blocks_end_with_rows, input_format, rows_of_scale, weight_format
from lightning_qat.schemes.codebook import CodebookScheme
from lightning_qat.schemes.format import TensorFormat, rows_of, rows_to, scale_shape
from lightning_qat.schemes.integer import IntegerScheme
from lightning_qat.schemes.llm_int8 import LLMInt8Scheme

__all__ = [
    "CodebookScheme",
    "IntegerScheme",
    "LLMInt8Scheme",
    "Scheme",
    "TensorFormat",
    "blocks_end_with_rows",
    "get_scheme",
    "input_format",
    "register_scheme",
    "registered_schemes",
    "rows_of",
    "rows_of_scale",
    "rows_to",
    "scale_shape",
    "weight_format",
]
