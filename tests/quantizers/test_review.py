"""Faults that a review found, each with what it takes to come back."""

from __future__ import annotations

import pytest
import torch
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat import BitsAndBytesConfig, QuantizationConfig, Quantizer, quantize
from lightning_qat.schemes import Scheme, register_scheme, rows_of, rows_to
from lightning_qat.schemes.base import _REGISTRY
from lightning_qat.testing import check_scheme
from lightning_qat.validation import SCHEME_BITS


@pytest.fixture
def halves():
    """A scheme whose scale is stored in two parts, whose grid is not the integers', and which may be an input's."""

    @register_scheme("halves", bits=(4, 3, 6))
    class Halves(Scheme):
        changes_bits = True
        takes_inputs = True
        linears = 0

        def parameters(self, low, high, fmt):
            scale = torch.exp2(torch.ceil(torch.log2(torch.maximum(-low, high).clamp_min(1e-30))))
            return scale, torch.zeros_like(scale, dtype=torch.int32)

        def quantize(self, x, scale, zero_point, fmt):
            top = 2 ** (fmt.bits - 1) - 1
            rows = rows_of(x, fmt).float() / scale.reshape(-1, 1) * top
            return rows_to(rows.round().clamp(-top, top).to(torch.int8), x, fmt)

        def dequantize(self, codes, scale, zero_point, fmt, dtype):
            top = 2 ** (fmt.bits - 1) - 1
            return rows_to(rows_of(codes, fmt) * scale.reshape(-1, 1) / top, codes, fmt).to(dtype)

        def store_scale(self, scale, fmt):
            mantissa, exponent = torch.frexp(scale)
            return {"": mantissa, "_exponent": exponent}

        def read_scale(self, stored, fmt):
            return torch.ldexp(stored[""], stored["_exponent"])

        def linear(self, x, *args):
            type(self).linears += 1
            return super().linear(x, *args)

    yield Halves
    del _REGISTRY["halves"], SCHEME_BITS["halves"]


def test_a_scheme_of_ones_own_in_every_part(halves) -> None:
    check_scheme("halves")
    x = randn(64, 16)
    plan = lq.QuantizationPlan([lq.LayerRule("*", QuantizationConfig("halves"), QuantizationConfig("halves"))])
    model = lq.prepare(nn.Sequential(nn.Linear(16, 8)), plan)
    lq.calibrate(model, [x])
    model.eval()
    assert lq.sqnr(x, model[0].quantized_input(x)) > 8
    shipped = lq.convert(model, verify=[x])
    halves.linears = 0
    assert torch.equal(shipped(x), model(x))
    assert halves.linears == 1
    with pytest.raises(ValueError, match="from 3 to 6"):
        lq.set_bits(model, 7)
    rule = lq.LayerRule("*", QuantizationConfig("int8"), QuantizationConfig("halves", observer="mse"))
    with pytest.raises(ValueError, match="observer='mse' is not available"):
        lq.prepare(nn.Sequential(nn.Linear(16, 8)), lq.QuantizationPlan([rule]))


def test_compiled_nested_scales_are_those_that_ship() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        bnb = BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=True)
        config = lq.QATConfig("nf4", activation_bits=None, bnb=bnb)
        model = lq.prepare(nn.Sequential(nn.Linear(512, 377, bias=False)), config).eval()
        compiled = torch.compile(lambda model=model: model[0].quantized_weight(), fullgraph=True)()
        assert torch.equal(compiled, lq.convert(model)[0].weight)


def test_a_weight_is_one_sample_where_channels_have_scales() -> None:
    w = randn(16, 16) * torch.logspace(-3, 0, 16)[:, None]
    for config in (QuantizationConfig("int8", per_channel=True), QuantizationConfig("int4", group_size=4), "nf4"):
        held = Quantizer(config).calibrate(w).quantize(w)
        assert torch.equal(held.dequantize(), quantize(w, config).dequantize())


def test_a_tensor_of_samples_is_their_list_for_every_observer() -> None:
    samples = randn(20, 8)
    for observer in (None, "moving_average", "histogram", "percentile", "mse"):
        config = QuantizationConfig("int8", observer=observer)
        one, many = Quantizer(config).calibrate(samples), Quantizer(config).calibrate(list(samples))
        assert torch.equal(one.quantize(samples).scale, many.quantize(samples).scale)


def test_no_more_samples_are_drawn_than_asked_for() -> None:
    drawn = []

    def samples():
        for i in range(5):
            drawn.append(i)
            yield randn(3)

    Quantizer(QuantizationConfig("int8", calibration_samples=2)).calibrate(samples())
    assert drawn == [0, 1]
    with pytest.raises(ValueError, match="no value"):
        Quantizer().calibrate([torch.empty(0, 3)])


def test_magnitudes_beyond_float16() -> None:
    bnb = BitsAndBytesConfig(outlier_threshold=6.0)
    held = quantize(torch.tensor([[1e6, 1.0, 2.0], [3.0, 1.0, 2.0]]), QuantizationConfig("llm_int8", bnb=bnb))
    assert held.dequantize()[0, 0] == pytest.approx(1e6, rel=1e-2)
    with pytest.raises(ValueError, match="magnitudes beyond llm_int8"):
        Quantizer("llm_int8").calibrate([torch.full((2, 3), 1e5)]).quantize(torch.ones(2, 3))
    assert quantize(torch.tensor(10.0), QuantizationConfig("llm_int8", bnb=bnb)).dequantize() == 10.0


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_rows_of_an_embedding_that_end_within_a_byte(bits: int) -> None:
    config = QuantizationConfig("int8", bits=bits, per_channel=True)
    model = lq.prepare(nn.Sequential(nn.Embedding(4, 5)), lq.QuantizationPlan([lq.LayerRule("*", config)])).eval()
    index = torch.tensor([1, 3, 0])
    assert torch.equal(model(index), lq.convert(model)(index))


def test_state_with_wrong_scales_is_refused() -> None:
    state = quantize(randn(8, 64), "nf4").state_dict()
    for wrong in (torch.ones(1), torch.ones(8).half()):
        with pytest.raises(ValueError, match="with its scales"):
            lq.QuantizedTensor.from_state_dict({**state, "scale": wrong})


def test_a_model_built_on_the_meta_device_is_filled(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
    made = lq.quantize_model(model, "int8_weight_only")
    lq.save_quantized(made, tmp_path / "model")
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
    x = randn(3, 16)
    assert torch.equal(lq.load_quantized(tmp_path / "model", fresh)(x), made(x))


def test_quantize_model_leaves_buffers_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x)

    model = Counting()
    lq.quantize_model(model, "int8", [randn(2, 4)] * 3)
    assert model.calls == 0


def test_debug_callbacks_stay_with_who_looks(tmp_path) -> None:
    model = lq.prepare(nn.Sequential(nn.Linear(4, 4)), "int8_weight_only")
    lq.debug_quantizers(model, lambda event: None)
    torch.save(model, tmp_path / "model.pt")
    assert model[0].weight_quantizer.debug_callback is not None


def test_what_is_given_for_nothing_is_told() -> None:
    with pytest.raises(ValueError, match="nothing is random"):
        quantize(randn(4), "int8", generator=torch.Generator())
    assert set(lq.to_bitsandbytes_format(randn(128, 256), BitsAndBytesConfig())) == {"weight", "SCB", "weight_format"}
