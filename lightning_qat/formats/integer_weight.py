"""Integer weights as the files of other libraries hold them: unsigned codes, and scales in the dtype of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.formats.contents import Contents, check_weight_only
from lightning_qat.nn import QuantizedLayer
from lightning_qat.schemes import IntegerScheme, get_scheme


@dataclass(frozen=True)
class Setting:
    """What all layers of a file have in common.

    Args:
        bits: of a code.
        group_size: inputs that share a scale; -1 is all.
        symmetric: every zero point is in the middle.
    """

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True, eq=False)
class UnsignedWeight:
    """An integer weight, whatever its grid.

    Args:
        codes: ``0 .. 2**bits - 1``, int32 ``[out_features, in_features]``.
        scale: ``[out_features, groups]``, float32.
        zero_point: int32, shaped as ``scale``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, layer: QuantizedLayer) -> UnsignedWeight:
        """Return the weight of a layer in an integer format; one scale for the tensor becomes one for each channel."""
        fmt, rows = layer.weight_format, layer.weight_shape[0]
        middle = 2 ** (fmt.bits - 1)
        codes, scale = layer.codes.to(torch.int32).cpu(), layer.weight_scale.detach().cpu()
        zero = torch.full_like(scale, middle) if fmt.symmetric else layer.weight_zero_point.cpu()
        if fmt.group_size is None:
            scale, zero = (t.reshape(-1, 1).expand(rows, 1) for t in (scale, zero))
        return cls(codes + middle if fmt.symmetric else codes, scale.contiguous(), zero.to(torch.int32).contiguous())


def common_setting(layers: Mapping[str, QuantizedLayer], kind: str) -> Setting:
    """Return the setting of all layers.

    Raises:
        ValueError: if one is not integer or quantizes its input, or two of them differ in bits or group size.
    """
    first, found = "", None
    for name, layer in layers.items():
        check_integer(name, layer, kind)
        check_weight_only(name, layer, kind)
        fmt = layer.weight_format
        setting = (fmt.bits, fmt.group_size or -1)
        if found is None:
            first, found = name, setting
        if setting != found:
            raise ValueError(
                f"layer {name!r} has bits={setting[0]}, group_size={setting[1]} and layer {first!r} bits={found[0]}, "
                f"group_size={found[1]}, and a file of {kind} has one setting for all; quantize them alike, or use "
                "format='compressed_tensors'"
            )
    bits, group_size = found or (4, -1)
    return Setting(bits, group_size, all(layer.weight_format.symmetric for layer in layers.values()))


def check_integer(name: str, layer: QuantizedLayer, kind: str) -> None:
    """Raise if the weight is not in an integer format that :class:`UnsignedWeight` reads."""
    fmt = layer.weight_format
    if type(get_scheme(fmt.scheme)) is not IntegerScheme or fmt.axis not in (None, 0):
        raise ValueError(
            f"layer {name!r} is in {fmt.scheme}, which {kind} has no codes for; quantize it in 'int4' or 'int8', or "
            "use format='bitsandbytes' for 'nf4', 'fp4' and 'llm_int8'"
        )


def check_choice_of_groups(contents: Contents, setting: Setting, kind: str, allowed: tuple[int, ...]) -> None:
    """Raise if gptqmodel, which transformers loads ``kind`` with, has no kernel for the group size."""
    if setting.group_size not in allowed:
        ways = ", ".join(str(size) for size in allowed if size > 0)
        raise ValueError(
            f"group_size={setting.group_size} (layer {next(iter(contents.layers))!r}) is not one that loaders of "
            f"{kind} take; use {ways}, or per_channel=True"
        )


def rounded_scale(name: str, weight: UnsignedWeight, dtype: torch.dtype, kind: str) -> Tensor:
    """Return the scales in ``dtype``, rounded once; the codes stay the same.

    To float16 the relative change is at most 2**-11, or 2**-25 absolutely where the scale is below 6.1e-5.

    Raises:
        ValueError: if ``dtype`` cannot hold a scale. Where all codes of a group stand for zero, any scale does.
    """
    rounded = weight.scale.to(dtype)
    lost = ~torch.isfinite(rounded) | ((rounded == 0) & (weight.scale != 0))
    if not bool(lost.any()):
        return rounded
    group = weight.codes.shape[1] // weight.scale.shape[1]
    empty = (weight.codes == weight.zero_point.repeat_interleave(group, 1)).reshape(*weight.scale.shape, group).all(-1)
    bad = lost & ~empty
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"layer {name!r} has the scale {float(weight.scale[row, column]):.3g} (output channel {row}, group {column}"
            f"), and scales of {kind} are {str(dtype).removeprefix('torch.')}, up to {torch.finfo(dtype).max:.5g}; "
            "use a float32 model with format='compressed_tensors', or leave the layer in float with "
            f"LayerRule({name!r})"
        )
    return torch.where(lost, torch.ones_like(rounded), rounded)
