"""A converted layer's weight as others have it: read as any tensor, made when it is needed, and never written to."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.nn.packed_weight import ComputedWeight


def converted(config: str = "nf4") -> lq.QuantizedLinear:
    torch.manual_seed(0)
    model = lq.prepare(nn.Sequential(nn.Linear(128, 96)), config)
    if model[0].input_quantizer is not None:
        lq.calibrate(model, [randn(3, 5, 128, seed=9)])
    return lq.convert(model)[0]


def _in_place(layer):
    with torch.no_grad():
        layer.weight.add_(1.0)


def _item(layer):
    layer.weight[0] = 0.0


def _data(layer):
    layer.weight.data = torch.zeros(96, 128)


def _data_plus(layer):
    layer.weight.data += 1.0


def _copied_into(layer):
    layer.weight.data.copy_(torch.zeros(96, 128))


def _detached(layer):
    layer.weight.detach().zero_()


def _initialised(layer):
    nn.init.kaiming_uniform_(layer.weight)


def _out(layer):
    torch.add(layer.weight, 1.0, out=layer.weight)


def _row(layer):
    layer.weight[0].zero_()


def _view_of_view(layer):
    layer.weight.data.view(-1)[:8].mul_(0.0)


def _each(layer):
    for row in layer.weight:
        row.div_(row.norm())


def _listed(layer):
    torch._foreach_mul_([torch.ones(1), layer.weight], 2.0)


@pytest.mark.parametrize(
    "write",
    [
        *(_in_place, _item, _data, _data_plus, _copied_into, _detached, _initialised, _out),
        *(_row, _view_of_view, _each, _listed),
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_written_to_a_computed_weight_is_not_lost_silently(write):
    layer = converted()
    with pytest.raises(RuntimeError, match=r"QuantizedLinear \(96, 128\), nf4\) is computed from its codes .* lost"):
        write(layer)


def test_a_computed_weight_is_read_as_any_tensor(tmp_path):
    layer = converted()
    weight = layer.weight
    plain = layer.weight_in(torch.float32)
    assert isinstance(weight, ComputedWeight)
    assert type(plain) is torch.Tensor
    for made in (weight + 1, weight.clone(), weight.float(), weight.to_sparse(), copy.deepcopy(weight), -weight):
        assert type(made) is torch.Tensor
    assert torch.equal(weight.T[0] + weight[0, 0], plain.T[0] + plain[0, 0])
    assert torch.equal(torch.vmap(lambda x: weight @ x)(plain), torch.vmap(lambda x: plain @ x)(plain))
    assert torch.equal(weight, plain)
    assert torch.equal(weight.data, plain)
    assert weight.tolist() == plain.tolist()
    assert (weight.numpy() == plain.numpy()).all()
    assert repr(weight) == repr(plain)
    assert not weight.requires_grad_(False).requires_grad
    weight.requires_grad = False
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), plain)
    copied = weight.clone()
    copied.add_(1.0)
    assert torch.equal(copied, plain + 1)


@pytest.mark.parametrize("part", [lambda w: w, lambda w: w.data, lambda w: w.T.T], ids=["it", "data", "view"])
def test_a_compiled_function_takes_a_computed_weight(part):
    layer = converted()
    torch._dynamo.reset()
    product = torch.compile(lambda x, weight: x @ weight, backend="eager")
    assert torch.equal(product(randn(3, 96), part(layer.weight)), randn(3, 96) @ layer.weight_in(torch.float32))


class LooksAtIt(nn.Module):
    """As the feed-forward layers of T5 and the patch embeddings of vision towers do."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        weight = self.out.weight
        if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype and weight.dtype != torch.int8:
            x = x.to(weight.dtype)
        assert weight.shape == weight.size() == (96, 128)
        assert (weight.device, len(weight)) == (x.device, 96)
        return self.out(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("config", ["int8", "int8_dynamic", "w4a16"])
def test_a_weight_is_not_made_for_those_who_ask_for_its_dtype(config, mode, monkeypatch):
    layer = converted(config)
    made, make = [], type(layer).weight_in
    monkeypatch.setattr(type(layer), "weight_in", lambda self, dtype: made.append(dtype) or make(self, dtype))
    with mode():
        expected = layer(randn(1, 128))
        count = len(made)  # of what the layer computes with
        assert torch.equal(LooksAtIt(layer)(randn(1, 128)), expected)
        assert len(made) == 2 * count
        assert layer.bfloat16().weight.dtype is torch.bfloat16
    assert len(made) == 2 * count


def test_a_weight_is_what_it_was_when_it_was_asked_for():
    layer = converted("int8_weight_only")
    plain, weight, read_late = layer.weight_in(torch.float32), layer.weight, layer.weight
    layer.half()
    assert weight.dtype is torch.float32
    assert torch.equal(weight, plain)
    layer.weight_packed.zero_()
    assert torch.equal(weight, plain)  # made by now
    late, layer = layer.weight, layer.float()
    assert not bool(late.any())
    layer.weight_packed.add_(1)
    with pytest.raises(RuntimeError, match=r"codes of a converted layer \(.* were changed after .*weight.clone"):
        read_late.sum()
    assert bool(layer.weight.all())


def test_a_parameter_takes_a_copy_and_says_so():
    layer = converted()
    for weight in (layer.weight, layer.weight[0], layer.weight.data):
        with pytest.raises(RuntimeError, match=r"QuantizedLinear.* nn.Parameter\(layer.weight.clone\(\)\)"):
            nn.Parameter(weight)
    copied = nn.Parameter(layer.weight.clone())
    assert type(copied) is nn.Parameter
    assert torch.equal(copied, layer.weight)
