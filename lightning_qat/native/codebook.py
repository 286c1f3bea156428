"""Codebook formats on the CPU: choosing codes, and fake quantization through them, in one pass over memory.

Tensors are contiguous and not empty, blocks run over them in order. Each function is told by its result if it did
nothing, which is where there is no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_qat.native.library import FloatFamily, threads_for

_RULE = "ppppiiifi"
_FAMILY = FloatFamily(
    "codebook",
    {
        "absmax": "ppqqfi",
        "quantize": f"ppppqq{_RULE}i",
        "fake_quantize": f"ppppqq{_RULE}i",
        "gradient": "ppppqqi",
        "draw": f"pppppqq{_RULE}i",
    },
)


@dataclass(frozen=True, eq=False)
class Rule:
    """How codes are chosen; see :mod:`lightning_qat.ops.codebook_tables`.

    Args:
        thresholds: what separates the bins, float32.
        codes: of the bins, uint8.
        values: of the codes, float32.
        steps: the table of 65,536 equal steps that decides instead of thresholds, uint8, or None.
        bits: 4 or 8.
        nan_code: of a NaN.
        fill_code: of what fills the last byte.
        least: what a smaller absmax is taken for; 0.0 is nothing.
        divides: whether a short last block is divided by its absmax.
    """

    thresholds: Tensor
    codes: Tensor
    values: Tensor
    steps: Tensor | None
    bits: int
    nan_code: int
    fill_code: int
    least: float
    divides: bool

    def arguments(self) -> tuple[Any, ...]:
        """Return what the kernels take."""
        steps = 0 if self.steps is None else self.steps.data_ptr()
        addresses = self.thresholds.data_ptr(), self.codes.data_ptr(), self.values.data_ptr(), steps
        return (*addresses, self.bits, self.nan_code, self.fill_code, self.least, self.divides)


def _find(name: str, x: Tensor) -> Any:
    return _FAMILY.of(name, x.dtype) if x.numel() else None


def block_absmax(flat: Tensor, out: Tensor, block_size: int, least: float) -> bool:
    """Write the absmax of every block, float32; that of a short last block is at least ``least``."""
    function = _find("absmax", flat)
    if function is None:
        return False
    function(flat.data_ptr(), out.data_ptr(), flat.numel(), block_size, least, threads_for(flat.numel()))
    return True


def quantize(flat: Tensor, given: Tensor | None, absmax: Tensor, stored: Tensor, block_size: int, rule: Rule) -> bool:
    """Write codes as they are stored, and the absmax of every block: those ``given``, or its own."""
    function = _find("quantize", flat)
    if function is None:
        return False
    addresses = flat.data_ptr(), 0 if given is None else given.data_ptr(), absmax.data_ptr(), stored.data_ptr()
    function(*addresses, flat.numel(), block_size, *rule.arguments(), threads_for(flat.numel()))
    return True


def fake_quantize(x: Tensor, absmax: Tensor, stored: Tensor, out: Tensor, block_size: int, rule: Rule) -> bool:
    """Write values of codes chosen with ``absmax``, computed with ``stored``, into ``out``, of one dtype with ``x``."""
    function = _find("fake_quantize", x)
    if function is None:
        return False
    addresses = x.data_ptr(), absmax.data_ptr(), stored.data_ptr(), out.data_ptr()
    function(*addresses, x.numel(), block_size, *rule.arguments(), threads_for(x.numel()))
    return True


def gradient(grad: Tensor, x: Tensor, limits: Tensor, out: Tensor, block_size: int) -> bool:
    """Write ``grad`` where a magnitude is within its block's limit, else 0; all but ``limits`` have one dtype."""
    function = _find("gradient", x)
    if function is None or not grad.dtype == x.dtype == out.dtype:
        return False
    addresses = grad.data_ptr(), x.data_ptr(), limits.data_ptr(), out.data_ptr()
    function(*addresses, x.numel(), block_size, threads_for(x.numel()))
    return True


def draw(
    flat: Tensor, absmax: Tensor, noise: Tensor, ordered: Tensor, codes: Tensor, block_size: int, rule: Rule
) -> bool:
    """Write the code of the value below or, where ``noise`` is less than the share of the way to it, above.

    Args:
        flat: the values.
        absmax: of every block.
        noise: float32 of 0 to 1, one for each value.
        ordered: the values of the bins, float32.
        codes: gets one code a byte.
        block_size: consecutive elements that share a scale.
        rule: of the codebook.
    """
    function = _find("draw", flat)
    if function is None:
        return False
    addresses = flat.data_ptr(), absmax.data_ptr(), noise.data_ptr(), ordered.data_ptr(), codes.data_ptr()
    function(*addresses, flat.numel(), block_size, *rule.arguments(), threads_for(flat.numel()))
    return True
