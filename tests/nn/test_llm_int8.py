"""LLM.int8() layers: bitsandbytes' own arithmetic is the witness."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from tensors import randn
from torch import Tensor, nn

import lightning_qat as lq


def with_outliers(*shape: int, seed: int = 0) -> Tensor:
    x = randn(*shape, seed=seed)
    x[..., 3] *= 20
    x[0, ..., 17] = 31.0
    return x


def converted(weight: Tensor, bias: Tensor | None, threshold: float = 6.0) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    config = lq.QATConfig("llm_int8", bnb=lq.BitsAndBytesConfig(outlier_threshold=threshold))
    return lq.convert(lq.prepare(nn.Sequential(layer), config).eval())[0]


def exact(x: Tensor, weight: Tensor, bias: Tensor, threshold: float) -> Tensor:
    """Return the product of what bitsandbytes quantizes, in float64."""
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    w = codes.double() * scale.double()[:, None] / 127
    rows = x.reshape(-1, x.shape[-1])
    a_codes, a_scale, columns = bnb.functional.int8_vectorwise_quant(rows.half().clone(), threshold)
    a = a_codes.double() * a_scale.double()[:, None] / 127
    if columns is not None:
        a[:, columns] = rows.double()[:, columns]
    return (a @ w.T + bias.double()).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (1, 40)])
def test_products_are_those_of_bitsandbytes(threshold: float, shape: tuple[int, ...]) -> None:
    weight, bias, x = randn(24, 40), randn(24, seed=1), with_outliers(*shape, seed=2)
    layer = converted(weight, bias, threshold)
    assert layer.execution.endswith(" int8 per token, outliers in float")
    with torch.no_grad():
        result = layer(x)
    expected = exact(x, weight, bias, threshold)
    assert (result.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bitsandbytes_layer_gives_the_same_to_its_precision() -> None:
    weight, x = randn(24, 40), with_outliers(6, 40, seed=2)
    state = bnb.MatmulLtState()
    state.threshold, state.has_fp16_weights = 6.0, False
    state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    theirs = bnb.matmul(x.half(), state.CB, threshold=6.0, state=state)
    with torch.no_grad():
        ours = converted(weight, None)(x)
    assert lq.sqnr(theirs.float(), ours) > 55  # theirs is rounded to float16


def test_outliers_pay() -> None:
    weight, x = randn(64, 128), with_outliers(16, 128, seed=2)
    with torch.no_grad():
        whole, parts = converted(weight, None, 0.0)(x), converted(weight, None, 6.0)(x)
    assert lq.sqnr(x @ weight.T, parts) > lq.sqnr(x @ weight.T, whole) + 6


def test_training_and_shipping_agree() -> None:
    torch.manual_seed(0)
    model = lq.prepare(nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8)), "llm_int8")
    x = with_outliers(16, 40)
    model(x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    shipped = lq.convert(model, verify=[x])
    with torch.no_grad():
        assert lq.sqnr(model(x), shipped(x)) > 40
        first = model[0]  # behind it, a rounding of the last bit may tip a code
        assert torch.allclose(torch.compile(first, fullgraph=True)(x), first(x), atol=1e-5)


def test_convolutions_have_int8_weights_and_float_inputs() -> None:
    model = lq.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), "llm_int8")
    assert model[0].input_quantizer is None
    image = randn(1, 3, 8, 8)
    assert torch.equal(lq.convert(model.eval())(image), model(image))


def test_nan_and_empty_inputs() -> None:
    layer, x = converted(randn(24, 40), randn(24)), with_outliers(4, 40)
    x[2, 5] = torch.nan
    with torch.no_grad():
        result = layer(x)
        assert result[2].isnan().all()
        assert result[[0, 1, 3]].isfinite().all()
        assert layer(x[:0]).shape == (0, 24)
