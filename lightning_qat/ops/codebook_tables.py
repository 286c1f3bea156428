"""The tables of the codebook formats and the rules that choose a code: constants, and what follows from them.

Values and code order are those of bitsandbytes: nf4 (QLoRA, Dettmers et al. 2023), fp4 with two exponent bits, one of
mantissa and one of sign, and the 8-bit dynamic map (8-bit Optimizers via Block-wise Quantization, Dettmers et al.
2022).

Every rule has the same form. The values of a block, divided by its absmax, fall into bins that thresholds separate; a
value on a threshold belongs to the bin below; each bin has a code. What bitsandbytes' CPU and CUDA kernels do
differs in the thresholds, in the order of the bins and in the code of a NaN, so a rule is these three.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: Bits of a code.
CODEBOOK_BITS = {"nf4": 4, "fp4": 4, "dynamic_tree": 8}
#: Whose decisions are followed: those of bitsandbytes' CPU or of its CUDA kernels.
RULES = ("cpu", "cuda")

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
#: In units of a twelfth. The second half, codes 8 to 15, is the negatives; both zeros are 0.0.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
#: The values between zero and one of the dynamic map, which also holds their negatives, 0.0 and 1.0.
_DYNAMIC_TREE = """
    5.5000004e-07 3.2500002e-06 7.75e-06 2.1249998e-05 4.375e-05 6.625e-05 8.875e-05 0.00015625001 0.00026875004
    0.00038125002 0.00049375003 0.0006062501 0.00071875006 0.00083125 0.0009437501 0.0012812499 0.00184375 0.00240625
    0.00296875 0.0035312497 0.00409375 0.0046562497 0.0052187503 0.00578125 0.00634375 0.00690625 0.00746875 0.00803125
    0.00859375 0.009156249 0.00971875 0.01140625 0.01421875 0.01703125 0.019843752 0.02265625 0.02546875 0.028281251
    0.03109375 0.03390625 0.036718752 0.03953125 0.042343747 0.04515625 0.04796875 0.05078125 0.05359375 0.05640625
    0.059218753 0.06203125 0.06484375 0.067656256 0.070468746 0.07328125 0.07609375 0.07890625 0.08171876 0.08453125
    0.08734375 0.09015625 0.092968754 0.09578126 0.09859375 0.107031256 0.12109375 0.13515624 0.14921875 0.16328125
    0.17734376 0.19140625 0.20546874 0.21953125 0.23359375 0.24765624 0.26171875 0.27578127 0.28984374 0.30390626
    0.31796873 0.33203125 0.34609374 0.36015624 0.37421876 0.38828123 0.40234375 0.41640624 0.43046874 0.44453126
    0.45859373 0.47265625 0.4867187 0.50078124 0.5148437 0.5289062 0.54296875 0.5570313 0.5710938 0.58515626 0.5992187
    0.61328125 0.6273438 0.6414063 0.65546876 0.6695312 0.68359375 0.6976563 0.7117188 0.72578126 0.7398437 0.75390625
    0.7679688 0.78203124 0.79609376 0.8101562 0.82421875 0.8382813 0.85234374 0.86640626 0.8804687 0.89453125 0.9085938
    0.92265624 0.93671876 0.9507812 0.96484375 0.9789063 0.99296874
"""

#: Codes of fp4 from the smallest to the largest value. The zeros are in the order in which either rule meets them.
_FP4_ORDER = {
    "cpu": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
    "cuda": (11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3),
}
#: The constants of bitsandbytes' CUDA kernel, which compares magnitudes. Five are no midpoints in float32.
_FP4_CUDA_MAGNITUDES = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


def check_codebook(name: str, rule: str = "cpu") -> None:
    """Raise ``ValueError`` unless there is a codebook called ``name`` and a rule called ``rule``."""
    if name not in CODEBOOK_BITS:
        raise ValueError(f"codebook={name!r} is not known; use one of: {', '.join(map(repr, CODEBOOK_BITS))}")
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; use one of: {', '.join(map(repr, RULES))}")


def codebook(name: str, device: torch.device | str) -> Tensor:
    """Return the value of every code, float32 ``[16]`` or ``[256]`` in units of the block's absmax. Do not change it.

    Args:
        name: "nf4", "fp4" or "dynamic_tree".
        device: where to.

    Raises:
        ValueError: if there is no such codebook.
    """
    check_codebook(name)
    return _tensor(("values", name, ""), str(torch.device(device)))


def thresholds(name: str, rule: str, device: torch.device | str) -> Tensor:
    """Return what separates the bins, float32 ``[15]`` or ``[255]``, ascending: bin = how many are below the value."""
    check_codebook(name, rule)
    return _tensor(("thresholds", name, rule), str(torch.device(device)))


def bin_codes(name: str, rule: str, device: torch.device | str) -> Tensor:
    """Return the code of every bin, uint8 ``[16]`` or ``[256]``, from the smallest values to the largest."""
    check_codebook(name, rule)
    return _tensor(("codes", name, rule), str(torch.device(device)))


def nan_code(name: str, rule: str) -> int:
    """Return the code that a NaN gets: where the comparisons of the kernel end up with it."""
    return {"nf4": 15, "fp4": 3}.get(name, 0) if rule == "cpu" else 0


def zero_code(name: str) -> int:
    """Return the code whose value is 0.0. It also fills the last byte of an odd number of 4-bit codes.

    The 8-bit CPU rule never chooses it: of 65,536 steps none is at 0.0, which gets the value 2.1e-5 instead.
    """
    return {"nf4": 7, "fp4": 0, "dynamic_tree": 127}[name]


def least_absmax(name: str, rule: str) -> float:
    """Return what a smaller absmax is taken for when values are divided by it.

    bitsandbytes' 4-bit CPU kernel does so, which keeps its reciprocal finite; the others have no such floor.
    """
    return 1e-38 if rule == "cpu" and CODEBOOK_BITS[name] == 4 else 0.0


def divides_last_block(name: str, rule: str) -> bool:
    """Return whether a short last block is divided by its absmax, and not multiplied by the reciprocal as all others.

    bitsandbytes' 4-bit CPU kernel does so. It also stores that block's absmax as at least :func:`least_absmax`.
    """
    return least_absmax(name, rule) > 0


# --- tensors, kept by device ----------------------------------------------------------------------


def _tensor(key: tuple[str, str, str], device: str) -> Tensor:
    # A tensor made while tracing is not a real one, and must not be kept.
    return _make_tensor(key, device) if torch.compiler.is_compiling() else _kept_tensor(key, device)


@lru_cache(maxsize=64)
def _kept_tensor(key: tuple[str, str, str], device: str) -> Tensor:
    with torch.inference_mode(False):
        return _make_tensor(key, device)


def _make_tensor(key: tuple[str, str, str], device: str) -> Tensor:
    kind, name, rule = key
    dtype = torch.uint8 if kind == "codes" else torch.float32
    return torch.tensor(_numbers(kind, name, rule), dtype=dtype, device=device)


@lru_cache(maxsize=16)
def _numbers(kind: str, name: str, rule: str) -> tuple[float, ...]:
    with torch.inference_mode(False), torch.device("cpu"):
        if kind == "values":
            return _values(name)
        if kind == "codes":
            return _FP4_ORDER[rule] if name == "fp4" else tuple(range(2 ** CODEBOOK_BITS[name]))
        return tuple(_thresholds(name, rule).tolist())


def _values(name: str) -> tuple[float, ...]:
    if name == "nf4":
        return _NF4
    if name == "fp4":
        return tuple(sign * value / 12 + 0.0 for sign in (1, -1) for value in _FP4_TWELFTHS)
    positive = [float(value) for value in _DYNAMIC_TREE.split()]
    return (*(-value for value in reversed(positive)), 0.0, *positive, 1.0)


# --- thresholds -----------------------------------------------------------------------------------


def _thresholds(name: str, rule: str) -> Tensor:
    order = torch.tensor(_numbers("codes", name, rule), dtype=torch.int64)
    values = torch.tensor(_values(name), dtype=torch.float32)[order]
    midpoints = (values[:-1] + values[1:]) / 2
    if name == "nf4" or (name == "fp4" and rule == "cpu"):
        return midpoints
    if name == "dynamic_tree":
        return _dynamic_tree_cpu(midpoints) if rule == "cpu" else _dynamic_tree_cuda(midpoints)
    positive = torch.tensor(_FP4_CUDA_MAGNITUDES, dtype=torch.float32)
    # A magnitude on a threshold belongs to the bin nearer to zero, which for negative values is the bin above;
    # 0.0 itself is not negative.
    negative = _just_below(torch.cat((-positive.flip(0), torch.zeros(1, dtype=torch.float32))))
    return torch.cat((negative, positive))


def _just_below(values: Tensor) -> Tensor:
    """Return the next smaller float32: a threshold there puts the value itself into the bin above."""
    return torch.nextafter(values, torch.tensor(float("-inf"), dtype=torch.float32))


def _dynamic_tree_cuda(midpoints: Tensor) -> Tensor:
    """The CUDA kernel searches by halves and ends at an even code, which also gets its midpoints on both sides."""
    odd = torch.arange(len(midpoints)) % 2 == 1
    return torch.where(odd, _just_below(midpoints), midpoints)


def dynamic_tree_steps(values: Tensor) -> Tensor:
    """Return the entry, 0 to 65535, of bitsandbytes' CPU table that ``values`` of -1.0 to 1.0 fall into, in float32."""
    return ((values + 1.0) * 32767.5 + 0.5).floor()


def dynamic_tree_step_codes() -> Tensor:
    """Return bitsandbytes' CPU table: the code of each of 65,536 equal steps from -1.0 to 1.0, uint8."""
    values = torch.tensor(_values("dynamic_tree"), dtype=torch.float32, device="cpu")
    return _step_codes((values[:-1] + values[1:]) / 2).to(torch.uint8)


def _step_codes(midpoints: Tensor) -> Tensor:
    steps = torch.arange(65536, dtype=torch.float32, device="cpu")
    return torch.bucketize(-1.0 + 2.0 * steps / 65535.0, midpoints)


def _dynamic_tree_cpu(midpoints: Tensor) -> Tensor:
    """Return, for each code but the last, the largest float32 that the table gives that code or a smaller one."""
    codes = _step_codes(midpoints)

    def is_above(values: Tensor) -> Tensor:
        return codes[dynamic_tree_steps(values).long()] > torch.arange(255)

    low, high = torch.full_like(midpoints, -1.0), torch.full_like(midpoints, 1.0)
    # 2**-59 is less than the distance of neighbouring float32 numbers at any of these thresholds.
    for _ in range(60):
        middle = ((low.double() + high.double()) / 2).float()
        above = is_above(middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low
