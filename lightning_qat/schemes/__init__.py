"""What a number format *is*: one file each, behind a registry."""

from lightning_qat.schemes.base import Scheme, TensorFormat, get_scheme, registered_schemes
from lightning_qat.schemes.integer import IntegerScheme

__all__ = ["IntegerScheme", "Scheme", "TensorFormat", "get_scheme", "registered_schemes"]
