"""Does a number format keep its contract?"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lightning_qat.config import QATConfig, QuantizationConfig, QuantizationScheme
from lightning_qat.quantizers.dynamic_range import dynamic_parameters
from lightning_qat.quantizers.quantizer import quantize
from lightning_qat.schemes import TensorFormat, get_scheme, input_format, weight_format
from lightning_qat.schemes.quantized_tensor import QuantizedTensor
from lightning_qat.transforms.checkpoint import load_quantized, save_quantized
from lightning_qat.transforms.convert import convert
from lightning_qat.transforms.prepare import prepare

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_scheme(name: str, config: QuantizationConfig | None = None) -> None:
    """Assert that the scheme called ``name`` keeps its contract, alone and in models.

    What a prepared layer computes with is bit for bit what its codes stand for, also packed, saved and read again;
    codes are integers that fit the bits; nothing changes its arguments; gradients are finite and go straight through;
    models with it train, convert, save and load. Ranges found at run time (``"dynamic"``) are those of inputs, beside
    8-bit weights.

    Args:
        name: of a registered scheme.
        config: how it is used; None means ``QuantizationConfig(name)``, and per channel too where the scheme takes it.

    Raises:
        AssertionError: naming what differs and for which tensor.
    """
    for chosen in [config] if config is not None else _configs(name):
        for what, x in _tensors():
            if x.numel() or not chosen.dynamic:
                found = _found(chosen, x)
                _check_codes(f"{chosen}, {what}", x, *found)
                _check_gradient(f"{chosen}, {what}", x, *found)
            _check_tensor(f"{chosen}, {what}", x, chosen)
        if not chosen.dynamic:
            _check_linear(str(chosen), chosen)
        _check_model(str(chosen), chosen)


def _configs(name: str) -> Iterator[QuantizationConfig]:
    yield QuantizationConfig(name)
    if name == QuantizationScheme.DYNAMIC:
        yield QuantizationConfig(name, symmetric=False)
        yield QuantizationConfig(name, dynamic_range="tensor")
    elif get_scheme(name).block_size is None:
        yield QuantizationConfig(name, per_channel=True)


def _tensors() -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of all sorts, each with a name for messages."""
    generator = torch.Generator().manual_seed(0)
    for dtype in _DTYPES:
        for shape in ((5, 24), (3, 7), (1, 1), (64,), (2, 3, 3, 5)):
            yield f"{dtype} of shape {shape}", torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(6, 16, generator=generator)
    yield "not contiguous", torch.randn(16, 6, generator=generator).t()
    yield "zeros", torch.zeros(4, 8)
    yield "constant", torch.full((4, 8), -0.3)
    yield "large", x * 1e4
    yield "small", x * 1e-4
    yield "empty", torch.empty(0, 8)


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise AssertionError(f"{what} ({where})")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _found(config: QuantizationConfig, x: Tensor) -> tuple[Tensor, Tensor, TensorFormat]:
    """Return scale and zero point of the ranges that ``x`` has, and its format."""
    if config.dynamic:
        return dynamic_parameters(x, input_format(config), None)
    fmt = weight_format(config, x.shape)
    return *get_scheme(fmt.scheme).parameters_of(x, fmt), fmt


def _check_codes(where: str, x: Tensor, scale: Tensor, zero_point: Tensor, fmt: TensorFormat) -> None:
    scheme = get_scheme(fmt.scheme)
    given = [t.clone() for t in (x, scale, zero_point)]
    codes = scheme.quantize(x, scale, zero_point, fmt)
    _require(not codes.is_floating_point() and codes.shape == x.shape, where, "quantize returns no integers like x")
    packed = scheme.pack(codes, fmt)
    most = -(-x.numel() * fmt.bits // 8)
    size = packed.numel() * packed.element_size()
    _require(size <= max(most, 2 * x.numel() * (fmt.bits > 8)), where, f"pack wastes memory: {size} bytes for {most}")
    _require(_equal(scheme.quantize_packed(x, scale, zero_point, fmt), packed), where, "quantize_packed is not pack")
    unpacked = scheme.unpack(packed, x.shape, fmt)
    _require(_equal(unpacked, codes), where, "unpack(pack(codes)) is not codes")
    stored = scheme.read_scale(scheme.store_scale(scale, fmt), fmt)
    _require(_equal(stored, scheme.effective_scale(scale, fmt)), where, "effective_scale is not the scale read again")
    values = scheme.dequantize(unpacked, stored, zero_point, fmt, x.dtype)
    straight = scheme.dequantize_packed(packed, stored, zero_point, x.shape, fmt, x.dtype)
    _require(_equal(straight, values), where, "dequantize_packed is not dequantize of the unpacked codes")
    faked = scheme.fake_quantize(x, scale, zero_point, fmt)
    _require(_equal(values, faked), where, "what is packed is not what fake_quantize trains with")
    through = scheme.fake_quantize_through(x, scale, zero_point, fmt)
    _require(_equal(values, through), where, "fake_quantize_through is not fake_quantize")
    for before, after in zip(given, (x, scale, zero_point), strict=True):
        _require(torch.equal(before, after), where, "a method changed its argument")


def _check_gradient(where: str, x: Tensor, scale: Tensor, zero_point: Tensor, fmt: TensorFormat) -> None:
    if not x.numel():
        return
    scheme = get_scheme(fmt.scheme)
    source = x.detach().clone().requires_grad_()
    gradient = torch.autograd.grad(scheme.fake_quantize(source, scale, zero_point, fmt).sum(), source)[0]
    _require(bool(torch.isfinite(gradient).all()), where, "fake_quantize has a gradient that is not finite")
    _require(bool(gradient.count_nonzero()), where, "fake_quantize has no gradient, so nothing would train")
    again = scheme.fake_quantize_gradient(torch.ones_like(x), x, scale, zero_point, fmt)
    _require(_equal(again, gradient), where, "fake_quantize_gradient is not the gradient of fake_quantize")


def _check_tensor(where: str, x: Tensor, config: QuantizationConfig) -> None:
    held = quantize(x, config)
    values = held.dequantize()
    _require(values.shape == x.shape and values.dtype == x.dtype, where, "dequantize returns another shape or dtype")
    saved = load_tensors(save_tensors({name: t.contiguous() for name, t in held.state_dict().items()}))
    buffer = io.BytesIO()
    torch.save(held.state_dict(), buffer)
    pickled = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    for state in (saved, pickled):
        read = QuantizedTensor.from_state_dict(state)
        _require(_equal(read.dequantize(), values), where, "a saved tensor is read as another one")
        _require(read.format == held.format, where, "a saved tensor is read with another format")


def _check_linear(where: str, config: QuantizationConfig) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(12, 40, generator=generator), torch.randn(3, 40, generator=generator)
    bias = torch.randn(12, generator=generator)
    fmt = weight_format(config, weight.shape)
    scheme = get_scheme(fmt.scheme)
    scale, zero_point = scheme.parameters_of(weight, fmt)
    packed = scheme.pack(scheme.quantize(weight, scale, zero_point, fmt), fmt)
    effective = scheme.effective_scale(scale, fmt)
    result = scheme.linear(x, packed, effective, zero_point, weight.shape, fmt, bias).double()
    exact = x.double() @ scheme.fake_quantize(weight, scale, zero_point, fmt).double().t() + bias.double()
    # Float32 sums of 40 products: every step is rounded by 2**-24 of what it holds at most.
    bound = (x.double().abs() @ weight.double().abs().t() * 2 + bias.double().abs()) * 41 * 2.0**-24
    _require(
        bool(((result - exact).abs() <= bound).all()), where, "linear is not the product with the quantized weight"
    )


def _check_model(where: str, config: QuantizationConfig) -> None:
    torch.manual_seed(0)

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))

    model = prepare(build(), _plan(config))
    images, optimizer = torch.randn(8, 2, 4, 4), torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        _require(bool(torch.isfinite(parameter).all()), where, f"training made {name} infinite or NaN")
    model.eval()
    quantized = convert(model, verify=[images])  # which compares the codes, too
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(quantized, Path(folder) / "model")
        loaded = load_quantized(Path(folder) / "model", build())
    with torch.no_grad():
        _require(torch.equal(loaded(images), quantized(images)), where, "a saved model computes something else")
    if not config.dynamic:
        QATConfig(str(config.scheme), activation_bits=None)  # which recipes make of a name


def _plan(config: QuantizationConfig) -> QATConfig | QuantizationConfig:
    if not config.dynamic:
        return replace(config, calibration_samples=None)
    return QATConfig(
        activation_bits=config.bits, activation_symmetric=config.symmetric, activation_dynamic=config.dynamic_range
    )
