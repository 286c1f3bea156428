"""Single tensors: quantize, Quantizer, QuantizedTensor."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from tensors import DENORMAL, DTYPES, LARGEST, batches, randn
from torch import Tensor

import lightning_qat as lq
from lightning_qat import BitsAndBytesConfig, QuantizationConfig, QuantizedTensor, Quantizer, quantize
from lightning_qat.ops.affine import choose_scale_zero_point, dequantize_affine, quantize_affine
from lightning_qat.schemes import TensorFormat, get_scheme
from lightning_qat.schemes.codebook import NF4Scheme

#: Its codes times its scale stay within float32, whatever way the scale was rounded.
HUGE = LARGEST / 2

CONFIGS = [
    QuantizationConfig("int8"),
    QuantizationConfig("int8", per_channel=True),
    QuantizationConfig("int8", symmetric=False),
    QuantizationConfig("int8", bits=3, per_channel=True),
    QuantizationConfig("int4", symmetric=False, per_channel=True),
    QuantizationConfig("int8", observer="mse"),
    QuantizationConfig("dynamic", symmetric=False),
    QuantizationConfig("dynamic", dynamic_range="tensor"),
    QuantizationConfig("nf4"),
    QuantizationConfig("nf4", bnb=BitsAndBytesConfig(bits=4, block_size=32, nested_quantization=True)),
    QuantizationConfig("fp4", group_size=7),
    QuantizationConfig("dynamic_tree"),
    QuantizationConfig("llm_int8"),
    QuantizationConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=0.5)),
]


@given(
    shares=st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    end=st.sampled_from((1.0, -1.0)),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    per_channel=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_up_to_the_end_of_a_dtype_codes_stand_for_finite_values(shares, end, dtype, bits, symmetric, per_channel):
    most = min(torch.finfo(dtype).max, LARGEST)
    x = (torch.tensor([[*shares, end], [0.0] * len(shares) + [-end]], dtype=torch.float64) * most).to(dtype)
    config = QuantizationConfig("int8", bits=bits, symmetric=symmetric, per_channel=per_channel)
    quantized = quantize(x, config)
    values = quantized.dequantize()
    assert values.isfinite().all()
    step = quantized.scale.double().reshape(-1, 1)
    lost = torch.finfo(dtype).eps * x.double().abs()  # rounding to the dtype
    assert ((values.double() - x.double()).abs() <= 1.01 * step + lost).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_quantized_stays_what_it_is(config: QuantizationConfig, data: st.DataObject) -> None:
    x, _ = data.draw(batches())
    if config.scheme == "llm_int8":
        x = x.clamp(-6e4, 6e4)  # float16
    if config.bnb is not None and config.bnb.nested_quantization:
        x = x / 64  # up to 41 scales are added up
    before = x.clone()
    held = quantize(x, config)
    values = held.dequantize()
    assert torch.equal(x, before)
    assert (values.shape, values.dtype) == (x.shape, x.dtype)
    assert held.codes.shape == held.shape == x.shape
    for state in (load(save(held.state_dict())), held.state_dict()):
        again = QuantizedTensor.from_state_dict(state)
        assert torch.equal(again.dequantize(), values)
        assert torch.equal(again.codes, held.codes)
        assert (again.nbytes, again.dtype, again.format) == (held.nbytes, held.dtype, held.format)


@settings(max_examples=100, deadline=None)
@given(batches(), st.booleans(), st.integers(2, 8))
def test_integers_are_those_of_the_ops(drawn, symmetric: bool, bits: int) -> None:
    # The witness is the definition of the grid, which fake_quantize's tests compare with exact arithmetic.
    x, _ = drawn
    held = quantize(x, QuantizationConfig("int8", bits=bits, symmetric=symmetric))
    scale, zero = choose_scale_zero_point(x.float().amin(), x.float().amax(), bits=bits, symmetric=symmetric)
    codes = quantize_affine(x, scale, zero, bits=bits, symmetric=symmetric)
    assert torch.equal(held.codes, codes)
    assert torch.equal(held.dequantize(), dequantize_affine(codes, scale, zero, dtype=x.dtype))
    assert (held.zero_point is None) == symmetric


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (), (1,), (1, 1, 1)])
def test_empty_and_tiny_tensors(config: QuantizationConfig, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, -0.75)
    values = quantize(x, config).dequantize()
    assert values.shape == shape
    assert torch.allclose(values, x, atol=0.25)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("value", [0.0, 3.5, -DENORMAL, HUGE, -HUGE])
def test_constant_tensors(config: QuantizationConfig, value: float) -> None:
    x = torch.full((4, 40), value)
    nested = config.bnb is not None and config.bnb.nested_quantization
    if abs(value) == HUGE and (config.scheme == "llm_int8" or nested):
        with pytest.raises(ValueError, match="65504|too large to be nested"):
            quantize(x, config)
        return
    values = quantize(x, config).dequantize()
    assert torch.isfinite(values).all()
    error = (values.double() - x.double()).abs().max()
    assert error <= max(abs(value) / 7, 2.0**-126)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_with_its_place(wrong: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = x[2, 0] = wrong
    with pytest.raises(ValueError, match=r"at index \(1, 2\) \(2 of 12 values"):
        quantize(x, "nf4")


def test_what_is_no_float_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="dtype torch.int64"):
        quantize(torch.arange(3))
    with pytest.raises(TypeError, match="is a list"):
        quantize([1.0])
    with pytest.raises(TypeError, match="config=3"):
        Quantizer(3)
    with pytest.raises(ValueError, match="use group_size="):
        quantize(torch.randn(3, 10), QuantizationConfig("int4", group_size=4))


def test_calibration_takes_the_range_of_the_samples() -> None:
    samples = [randn(5, 8, seed=i) for i in range(6)]
    quantizer = Quantizer(QuantizationConfig("int8"))
    assert quantizer.calibrate(samples) is quantizer
    largest = max(float(s.abs().max()) for s in samples)
    x = randn(5, 8, seed=99) * 10
    assert float(quantizer.quantize(x).scale) == pytest.approx(largest / 127, rel=1e-6)
    assert float(quantize(x).scale) == pytest.approx(float(x.abs().max()) / 127, rel=1e-6)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_calibration_samples(as_tensor: bool) -> None:
    samples = torch.arange(1.0, 11.0).reshape(10, 1)
    quantizer = Quantizer(QuantizationConfig("int8", calibration_samples=4))
    first, rest = (samples[:3], samples[3:]) if as_tensor else (list(samples[:3]), list(samples[3:]))
    quantizer.calibrate(first).calibrate(rest)
    assert float(quantizer.quantize(samples).scale) == pytest.approx(4 / 127, rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [QuantizationConfig("int8", per_channel=True), QuantizationConfig("int4", group_size=4), QuantizationConfig("nf4")],
    ids=str,
)
def test_calibrated_scales_belong_to_shapes(config: QuantizationConfig) -> None:
    quantizer = Quantizer(config).calibrate([randn(3, 8), randn(3, 8, seed=1) * 2])
    held = quantizer.quantize(randn(3, 8) * 0.1)
    both = torch.maximum(quantize(randn(3, 8), config).scale, quantize(randn(3, 8, seed=1) * 2, config).scale)
    assert torch.allclose(held.scale, both)
    with pytest.raises(ValueError, match="calibrate with samples of its shape"):
        quantizer.quantize(randn(40, 8))
    with pytest.raises(ValueError, match="samples have to agree"):
        quantizer.calibrate([randn(40, 8)])


def test_wrong_calibration_is_told() -> None:
    with pytest.raises(ValueError, match="samples holds no value"):
        Quantizer().calibrate([])
    with pytest.raises(ValueError, match="finds its ranges at run time"):
        Quantizer("dynamic").calibrate([randn(2, 2)])
    with pytest.raises(ValueError, match="nan at index"):
        Quantizer().calibrate([torch.tensor([1.0, math.nan])])


@pytest.mark.parametrize(
    ("scheme", "bits"), [("int8", 8), ("int8", 3), ("nf4", 4), ("fp4", 4), ("dynamic_tree", 8), ("llm_int8", 8)]
)
def test_stochastic_rounding_is_unbiased_and_seeded(scheme: str, bits: int) -> None:
    # The same 16 values in many blocks: the mean over blocks goes to the value like 1 / sqrt(blocks).
    blocks = 4000
    values = torch.cat([torch.tensor([1.0, -1.0, 0.0]), randn(13, seed=3).clamp(-1, 1)])
    bnb = BitsAndBytesConfig(bits=4 if bits == 4 else 8, block_size=32, stochastic=True, outlier_threshold=0.0)
    x = values.repeat(blocks, 2)
    config = QuantizationConfig(scheme, bits=bits, bnb=bnb)
    made = [quantize(x, config, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(made[0].codes, made[1].codes)
    assert not torch.equal(made[0].codes, quantize(x, config, generator=torch.Generator().manual_seed(8)).codes)
    inside = values.abs() < 0.8  # not every grid reaches both ends: there it is clamped
    assert inside.sum() > 6
    drawn = made[0].dequantize().double().reshape(-1, 16)[:, inside]
    values = values[inside]
    spread = drawn.std(0) / math.sqrt(drawn.shape[0])
    expected = values.double() if scheme != "llm_int8" else values.half().double()
    assert ((drawn.mean(0) - expected).abs() <= 5 * spread + 1e-6).all()
    nearest = quantize(x, replace(config, bnb=replace(bnb, stochastic=False)))
    biased = (nearest.dequantize().double().reshape(-1, 16)[:, inside].mean(0) - values.double()).abs()
    assert biased.max() > 5 * spread.max()  # what the bound above would catch


def test_outliers_by_quantile_and_by_threshold() -> None:
    x = randn(64, 200).clamp(-3, 3)
    x[5, 17], x[9, 130] = 40.0, -25.0
    for threshold, expected in ((0.99, [17, 130]), (6.0, [17, 130]), (30.0, [17]), (0.0, None), (1.0, None)):
        held = quantize(x, QuantizationConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=threshold)))
        if expected is None:
            assert held.outliers is None
            continue
        assert held.outliers.columns.tolist() == expected
        assert torch.equal(held.outliers.values, x[:, expected].half())
        assert torch.equal(held.dequantize()[:, expected], x[:, expected].half().float())
        assert not held.codes[:, expected].any()
    whole = quantize(x, "llm_int8")
    parts = quantize(x, QuantizationConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=6.0)))
    assert lq.sqnr(x, parts.dequantize()) > lq.sqnr(x, whole.dequantize()) + 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.5, 6.0])
def test_the_largest_numbers_are_finite_outliers(dtype: torch.dtype, threshold: float) -> None:
    largest = torch.finfo(dtype).max
    x = randn(4, 8).to(dtype)
    x[:, 3], x[1, 5] = largest, -largest
    held = quantize(x, QuantizationConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=threshold)))
    expected = min(largest, torch.finfo(torch.bfloat16).max)
    assert held.dequantize()[1, [3, 5]].tolist() == [expected, -expected]
    assert torch.isfinite(held.dequantize()).all()


def test_moving_and_casting() -> None:
    held = quantize(randn(4, 8), QuantizationConfig("nf4", bnb=BitsAndBytesConfig(bits=4, nested_quantization=True)))
    half = held.to(torch.float16)
    assert half.dequantize().dtype == torch.float16
    assert held.dequantize().dtype == torch.float32
    assert torch.equal(half.dequantize(), held.dequantize().half())
    assert held.to("meta").device.type == "meta"
    assert held.to("cpu").packed is held.packed
    for cast in (held.to, held.dequantize):
        with pytest.raises(ValueError, match=r"torch\.int8"):
            cast(torch.int8)


def test_bytes_are_counted() -> None:
    x = randn(64, 64)
    assert quantize(x, QuantizationConfig("int8", per_channel=True)).nbytes == 64 * 64 + 64 * 4
    assert quantize(x, "nf4").nbytes == 64 * 64 // 2 + 64 * 4
    nested = quantize(
        x, QuantizationConfig("nf4", bnb=BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=True))
    )
    assert nested.nbytes == 64 * 64 // 2 + 64 + 4 + 4
    assert nested.bits_per_value == nested.nbytes * 8 / 4096
    assert "4 bits" in repr(nested)


@pytest.mark.parametrize("damage", ["missing", "short", "text", "unknown"])
def test_damaged_state_is_refused(damage: str) -> None:
    state = quantize(randn(4, 8), "nf4").state_dict()
    if damage == "missing":
        del state["packed"]
    if damage == "short":
        state["packed"] = state["packed"][:3]
    if damage == "text":
        state["format"] = state["format"][:10]
    if damage == "unknown":
        state["bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match="state_dict"):
        QuantizedTensor.from_state_dict(state)


def test_state_loads_without_unpickling_code() -> None:
    held, buffer = quantize(randn(4, 8), "nf4"), io.BytesIO()
    torch.save(held.state_dict(), buffer)
    buffer.seek(0)
    again = QuantizedTensor.from_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(again.dequantize(), held.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dtypes_agree_on_codes_that_they_can_hold(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1.0, -0.5, 0.25, 1.0]])
    assert torch.equal(quantize(x.to(dtype), "nf4").codes, quantize(x, "nf4").codes)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.scheme in ("nf4", "fp4", "dynamic_tree")], ids=str)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_codes_and_scales_found_at_once_are_those_found_in_turn(
    config: QuantizationConfig, data: st.DataObject
) -> None:
    x, _ = data.draw(batches())
    found = quantize(x, config).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_scheme(config.scheme)), "quantize_by_own_range", lambda *_: None)
        expected = quantize(x, config).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_scheme_that_changes_a_codebook_is_asked_for_its_own_codes() -> None:
    class Halved(NF4Scheme):
        def parameters_of(self, x: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
            scale, zero_point = super().parameters_of(x, fmt)
            return scale * 0.5, zero_point

    quantizer, x = Quantizer("nf4"), randn(128)
    quantizer.scheme = Halved()
    assert torch.equal(quantizer.quantize(x).scale, quantize(x, "nf4").scale * 0.5)
