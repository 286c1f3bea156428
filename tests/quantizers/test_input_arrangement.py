"""Inputs in another order and multiplied, and the weight that does the same to inputs as they come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.quantizers.input_arrangement import arranged, by_feature

CONFIGS = {
    "weight-only": lq.QATConfig("int4", symmetric=False, group_size=8, activation_bits=None),
    "per token": "int8_dynamic",
    "static": "int8",
}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 3), st.booleans(), st.booleans(), st.sampled_from(["float32", "bfloat16"]))
def test_arranging_the_input_is_arranging_the_weight(
    size: int, rows: int, orders: bool, multiplies: bool, dtype: str
) -> None:
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(size, generator=generator) if orders else None
    factor = 2.0 ** torch.randint(-3, 4, (size,), generator=generator) if multiplies else None  # exact in any dtype
    x, columns = randn(2, rows, size, seed=1).to(getattr(torch, dtype)), randn(4, size, seed=2)
    found = arranged(x.mT.contiguous().mT, order, factor)
    assert found.dtype == x.dtype
    weight = by_feature(columns, order, factor)
    assert torch.allclose(found.double() @ columns.double().t(), x.double() @ weight.double().t(), rtol=1e-12)
    for column in range(size):  # feature by feature
        feature = column if order is None else int(order[column])
        assert torch.equal(found[..., column], x[..., feature] * (1.0 if factor is None else factor[column]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def with_arrangement(config: object, dtype: torch.dtype = torch.float32) -> tuple[Net, list[Tensor]]:
    """Return a prepared model that computes in float what ``Net`` does."""
    model, batches = lq.prepare(Net().to(dtype), config).eval(), [randn(5, 16, seed=i).to(dtype) for i in range(2)]
    order, factor = torch.randperm(24, generator=torch.Generator().manual_seed(1)), randn(24, seed=7).exp()
    layer = model.second
    layer.weight = nn.Parameter((layer.weight.detach()[:, order].float() / factor).to(dtype))
    layer.weight_quantizer.arrange_input(order, factor)
    return lq.calibrate(model, batches) if config == "int8" else model, batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_converted_layer_multiplies_and_rounds_what_the_prepared_one_does(kind: str, dtype: torch.dtype) -> None:
    model, batches = with_arrangement(CONFIGS[kind], dtype)
    converted = lq.convert(model, verify=batches)
    layer, quantizer = converted.second, model.second.weight_quantizer
    assert torch.equal(layer.codes, model.second.weight_codes())
    assert torch.equal(layer.input_order, quantizer.input_order)
    assert torch.equal(layer.input_factor, quantizer.input_factor)
    x = F.gelu(randn(3, 24, seed=5).to(dtype))
    assert torch.equal(layer.quantized_input(x), model.second.quantized_input(x))
    by_hand = F.linear(layer.quantized_input(x), layer.weight, layer.bias)
    with torch.no_grad():
        near = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(layer(x).float(), by_hand.float(), rtol=near, atol=near)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x).float(), by_hand.float(), rtol=near, atol=near)
    assert "input_order, input_factor" in repr(layer)
    assert "input_order, input_factor" in repr(model.second)


def test_wrong_sizes_are_refused_as_ever() -> None:
    model, _ = with_arrangement("int8_dynamic")
    for layer in (model.second, lq.convert(model).second):
        for size in (1, 23):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                layer(torch.ones(2, size))


def test_it_is_saved_loaded_copied_and_told(tmp_path: Path) -> None:
    model, batches = with_arrangement("int8")
    converted = lq.convert(model)
    lq.save_quantized(converted, tmp_path / "saved")
    loaded = lq.load_quantized(tmp_path / "saved", Net())
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert torch.equal(loaded(batches[0]), converted(batches[0]))
    for told in (lq.quantization_statistics(model), lq.quantization_statistics(loaded, reference=Net())):
        assert torch.equal(told["second"].input_factor, model.second.weight_quantizer.input_factor)
        assert torch.equal(told["second"].input_order, model.second.weight_quantizer.input_order)
        assert told["first"].input_factor is None
        assert told["second"].sqnr_db > 30  # against the float model's own weight
    exported = torch.export.export(loaded.train(), (batches[0],)).module()
    assert torch.equal(exported(batches[0]), loaded(batches[0]))
    half = loaded.eval().half()
    assert half.second.input_factor.dtype == torch.float32
    assert half(batches[0].half()).dtype == torch.float16


def test_checkpoints_bring_it_and_float_ones_take_it_away() -> None:
    model, batches = with_arrangement("int8_dynamic")
    fresh = lq.prepare(Net(), "int8_dynamic").eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(batches[0]), model(batches[0]))
    plain = Net()
    plain.load_state_dict(lq.float_state_dict(model.state_dict()))
    assert torch.allclose(plain(batches[0]), Net()(batches[0]), rtol=1e-5, atol=1e-6)
    fresh.load_state_dict(Net().state_dict())
    assert fresh.second.weight_quantizer.input_factor is None
    assert torch.equal(fresh(batches[0]), lq.prepare(Net(), "int8_dynamic").eval()(batches[0]))
    fresh.load_state_dict(model.state_dict())
    fresh.load_state_dict({"first.weight": Net().first.weight}, strict=False)
    assert fresh.second.weight_quantizer.input_factor is not None


def test_gradients_go_straight_through_and_the_scale_stays() -> None:
    model, _ = with_arrangement(lq.QATConfig("int4", group_size=8, activation_bits=None))
    layer = model.second
    before = layer.weight_quantizer.input_factor.clone()
    x = randn(5, 24, seed=9).requires_grad_()
    layer(x).square().sum().backward()
    weight = layer.quantized_weight().detach()
    expected = 2 * layer(x).detach()
    reads = arranged(x.detach(), layer.weight_quantizer.input_order, before)
    assert torch.allclose(layer.weight.grad, expected.t() @ reads, rtol=1e-4, atol=1e-5)
    through = by_feature(weight, layer.weight_quantizer.input_order, before)
    assert torch.allclose(x.grad, expected @ through, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.step()
    assert torch.equal(layer.weight_quantizer.input_factor, before)


def test_some_tensors_of_a_checkpoint_alone_leave_it_and_a_weight_without_it_takes_it_away() -> None:
    model, batches = with_arrangement("int8_dynamic")
    expected, scale = model(batches[0]), "second.weight_quantizer.scale"
    model.load_state_dict({scale: model.state_dict()[scale]}, strict=False)
    assert torch.equal(model(batches[0]), expected)
    plain = lq.prepare(Net(), "int8_dynamic").eval()
    tensors = {name: value for name, value in plain.state_dict().items() if isinstance(value, Tensor)}
    model.load_state_dict(tensors, strict=False)
    assert torch.equal(model(batches[0]), plain(batches[0]))
