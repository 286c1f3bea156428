"""Every registered number format keeps its contract."""

from __future__ import annotations

import pytest
import torch

from lightning_qat import BitsAndBytesConfig, QuantizationConfig, quantize
from lightning_qat.quantizers.dynamic_range import dynamic_parameters
from lightning_qat.schemes import IntegerScheme, get_scheme, input_format, registered_schemes
from lightning_qat.testing import check_scheme


@pytest.mark.parametrize("name", registered_schemes())
def test_every_scheme_keeps_its_contract(name: str) -> None:
    check_scheme(name)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 12, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_other_bits(bits: int, symmetric: bool) -> None:
    check_scheme("int8", QuantizationConfig("int8", bits=bits, symmetric=symmetric, per_channel=True))


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "dynamic_tree"])
@pytest.mark.parametrize("rule", ["cpu", "cuda"])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks(scheme: str, rule: str, nested: bool) -> None:
    bits = 8 if scheme == "dynamic_tree" else 4
    bnb = BitsAndBytesConfig(bits=bits, block_size=32, nested_quantization=nested, rule=rule)
    check_scheme(scheme, QuantizationConfig(scheme, bnb=bnb))


def test_a_broken_scheme_is_told() -> None:
    from lightning_qat.schemes import IntegerScheme, register_scheme
    from lightning_qat.schemes.base import _REGISTRY
    from lightning_qat.validation import SCHEME_BITS

    @register_scheme("broken", bits=4)
    class Broken(IntegerScheme):
        def pack(self, codes, fmt):
            return super().pack((codes + 1).clamp(max=7), fmt)

    try:
        with pytest.raises(AssertionError, match="unpack.pack.codes.. is not codes"):
            check_scheme("broken")
    finally:
        del _REGISTRY["broken"], SCHEME_BITS["broken"]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("covers", ["token", "tensor"])
@pytest.mark.parametrize("bits", [8, 5, 4])
def test_ranges_found_at_run_time(symmetric: bool, covers: str, bits: int) -> None:
    config = QuantizationConfig("dynamic", bits=bits, symmetric=symmetric, dynamic_range=covers)
    for x in (torch.randn(3, 7), torch.randn(2, 5, 6).half(), torch.zeros(2, 4), torch.randn(9, 4).t()):
        fmt, scheme = input_format(config), get_scheme("dynamic")
        scale, zero_point, fmt = dynamic_parameters(x, fmt, None)
        codes = scheme.quantize(x, scale, zero_point, fmt)
        unpacked = scheme.unpack(scheme.pack(codes, fmt), x.shape, fmt)
        assert torch.equal(unpacked, codes)
        values = scheme.dequantize(unpacked, scale, zero_point, fmt, x.dtype)
        assert torch.equal(values, scheme.fake_quantize(x, scale, zero_point, fmt))
        assert torch.equal(quantize(x, config).dequantize(), values)


def test_ranges_found_at_run_time_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = IntegerScheme.dequantize

    def wrong(self, codes, scale, zero_point, fmt, dtype):
        return right(self, codes, scale, zero_point, fmt, dtype) * (1.5 if fmt.dynamic else 1.0)

    monkeypatch.setattr(IntegerScheme, "dequantize", wrong)
    with pytest.raises(AssertionError, match="what is packed is not what fake_quantize trains with"):
        check_scheme("dynamic")
