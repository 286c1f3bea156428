"""Layers: equal to plain PyTorch arithmetic on a fake-quantized weight, sharing everything with the float layer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.nn import QATLayer
from lightning_qat.nn.layer import make_qat, unmake_qat

CONV_CASES = [
    (nn.Conv1d, dict(in_channels=6, out_channels=10, kernel_size=3, padding=1), (2, 6, 11)),
    (nn.Conv2d, dict(in_channels=6, out_channels=10, kernel_size=(3, 5), stride=2, groups=2), (2, 6, 11, 13)),
    (nn.Conv2d, dict(in_channels=3, out_channels=7, kernel_size=3, padding=1, padding_mode="reflect"), (2, 3, 9, 9)),
    (nn.Conv2d, dict(in_channels=8, out_channels=8, kernel_size=3, groups=8, bias=False), (2, 8, 9, 9)),
    (nn.Conv3d, dict(in_channels=2, out_channels=5, kernel_size=3), (1, 2, 5, 6, 7)),
    (nn.ConvTranspose2d, dict(in_channels=6, out_channels=10, kernel_size=3, stride=2), (2, 6, 5, 5)),
    (nn.ConvTranspose2d, dict(in_channels=6, out_channels=8, kernel_size=2, groups=2), (2, 6, 5, 5)),
    (nn.Linear, dict(in_features=12, out_features=7), (3, 4, 12)),
]
QAT = {
    nn.Conv1d: lq.QATConv1d,
    nn.Conv2d: lq.QATConv2d,
    nn.Conv3d: lq.QATConv3d,
    nn.ConvTranspose2d: lq.QATConvTranspose2d,
    nn.Linear: lq.QATLinear,
    nn.Embedding: lq.QATEmbedding,
}


def numpy_like_codes(weight, scale, bits):
    low, high = (-(2 ** (bits - 1)) + (bits >= 8), 2 ** (bits - 1) - 1)
    return torch.clamp(torch.round(weight / scale), low, high)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("float_class", "kwargs", "shape"), CONV_CASES)
def test_weight_only_layer_is_the_float_layer_with_a_rounded_weight(float_class, kwargs, shape, per_channel, bits):
    torch.manual_seed(0)
    layer = float_class(**kwargs)
    config = lq.QuantizationConfig("int8", bits=bits, per_channel=per_channel)
    qat = QAT[float_class](layer, config)
    axis = 1 if float_class is nn.ConvTranspose2d else 0
    dims = [d for d in range(layer.weight.dim()) if d != axis] if per_channel else list(range(layer.weight.dim()))
    absmax = layer.weight.detach().abs().amax(dims, keepdim=True)
    scale = absmax / ((2 ** (bits - 1) - 1) if bits >= 8 else (2 ** (bits - 1) - 0.5))
    codes = numpy_like_codes(layer.weight.detach(), scale, bits)
    witness = copy.deepcopy(layer)
    witness.weight.data = codes * scale
    x = torch.randn(shape)
    assert torch.equal(qat(x), witness(x))
    assert torch.equal(qat.weight_codes().float(), codes)


def test_the_float_layer_is_shared_and_untouched():
    linear = nn.Linear(4, 3)
    qat = lq.QATLinear(linear, "int8")
    assert type(linear) is nn.Linear
    assert not hasattr(linear, "weight_quantizer")
    assert qat.weight is linear.weight
    assert qat.bias is linear.bias
    assert isinstance(qat, nn.Linear)
    assert set(linear.state_dict()) == {"weight", "bias"}


def test_quantize_activations_false_leaves_the_input():
    conv = nn.Conv2d(3, 4, 3)
    assert lq.QATConv2d(conv, "int8", quantize_activations=False).input_quantizer is None
    assert lq.QATConv2d(conv, lq.QATConfig("int8")).input_quantizer is not None


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("layout", [dict(per_channel=True), dict(), dict(group_size=4)])
def test_embedding_rows_equal_the_whole_table(bits, layout):
    torch.manual_seed(0)
    table = nn.Embedding(11, 12, padding_idx=2)
    qat = lq.QATEmbedding(table, lq.QuantizationConfig("int8", bits=bits, **layout))
    index = torch.tensor([[1, 2, 1], [10, 0, 5]])
    whole = qat.weight_quantizer(qat.weight)
    assert torch.equal(qat(index), F.embedding(index, whole))
    qat.weight_quantizer.set_frozen(True, qat.weight)
    assert torch.equal(qat(index), F.embedding(index, whole))
    qat(index).sum().backward()
    assert table.weight.grad[2].abs().sum() == 0
    assert table.weight.grad[3].abs().sum() == 0
    assert table.weight.grad[1].abs().sum() > 0


def test_embedding_keeps_sparse_gradients_and_max_norm():
    table = nn.Embedding(9, 4, sparse=True, max_norm=1.0)
    qat = lq.QATEmbedding(table, lq.QuantizationConfig("int8", per_channel=True))
    out = qat(torch.tensor([1, 3]))
    out.sum().backward()
    assert table.weight.grad.is_sparse
    assert out.norm(dim=1).max() <= 1.02


class Scaled(nn.Linear):
    """A subclass with a forward of its own and an extra argument."""

    def forward(self, x, factor=1.0):
        return F.linear(x, self.weight * factor, self.bias)


class Named(nn.Conv2d):
    """A subclass without a forward of its own."""


def test_a_subclass_keeps_its_own_forward():
    torch.manual_seed(0)
    layer = Scaled(6, 5)
    config = lq.QuantizationConfig("int8", per_channel=True)
    witness = Scaled(6, 5)
    witness.load_state_dict(layer.state_dict())
    witness.weight.data = lq.QATLinear(witness, config).weight_quantizer(witness.weight).detach()
    make_qat(layer, config, None, "scaled")
    x = torch.randn(3, 6)
    assert torch.equal(layer(x, factor=3.0), witness(x, factor=3.0))
    assert isinstance(layer, Scaled)
    assert isinstance(layer, QATLayer)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert "weight" not in layer.__dict__


@pytest.mark.parametrize("build", [lambda: Scaled(6, 5), lambda: Named(3, 4, 3), lambda: nn.Linear(3, 2)])
def test_prepared_layers_copy_and_pickle(build):
    layer = build()
    make_qat(layer, lq.QuantizationConfig("int8", per_channel=True), None, "layer")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin.weight_codes(), layer.weight_codes())
    float_class = type(build())
    unmake_qat(layer)
    assert type(layer) is float_class
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_scales_keep_float32_when_the_model_is_cast():
    layer = lq.QATLinear(nn.Linear(8, 4), "int8")
    with torch.no_grad():
        layer.weight.mul_(1.2345678)
    layer(torch.randn(2, 8))
    scale = layer.input_quantizer.scale.clone()
    layer.bfloat16()
    assert layer.weight.dtype is torch.bfloat16
    assert layer.input_quantizer.scale.dtype is torch.float32
    assert torch.equal(layer.input_quantizer.scale, scale)
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_group_that_does_not_divide_names_the_layer_and_the_way_out():
    with pytest.raises(ValueError, match=r"576 % 128 != 0 \(layer 'q_proj'\); use group_size=96 or 72"):
        make_qat(nn.Linear(576, 4), lq.QuantizationConfig("int4", group_size=128), None, "q_proj")


def test_a_lazy_layer_is_named():
    with pytest.raises(ValueError, match="layer 'lazy' is lazy"):
        make_qat(nn.LazyLinear(4), lq.QuantizationConfig("int8"), None, "lazy")


def test_evaluating_without_a_range_is_an_error():
    layer = lq.QATLinear(nn.Linear(3, 2), "int8").eval()
    with pytest.raises(RuntimeError, match="never observed"):
        layer(torch.randn(1, 3))


def test_nan_input_names_the_layer():
    layer = lq.QATLinear(nn.Linear(3, 2), "int8")
    with pytest.raises(ValueError, match="QATLinear"):
        layer(torch.tensor([[1.0, float("nan"), 0.0]]))


def test_a_layer_used_twice_before_backward_trains():
    layer = lq.QATLinear(nn.Linear(4, 4), "int8")
    x = torch.randn(3, 4, requires_grad=True)
    layer(layer(x)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_activation_checkpointing_observes_once():
    from torch.utils.checkpoint import checkpoint

    layer = lq.QATLinear(nn.Linear(4, 4), "int8")
    layer.input_quantizer.observer.momentum = 0.5
    layer(torch.randn(3, 4))
    witness = copy.deepcopy(layer)
    x = torch.randn(3, 4, requires_grad=True)
    witness(x)
    for reentrant in (False, True):
        twin = copy.deepcopy(layer)
        checkpoint(twin, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(twin.input_quantizer.scale, witness.input_quantizer.scale)


@pytest.mark.parametrize("preset", ["int8", "int8_dynamic", "int8_weight_only", "w4a8"])
def test_training_step_compiles_without_graph_breaks(preset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    lq.prepare(model, preset)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    for _ in range(3):
        compiled(x).square().sum().backward()
        twin(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)])
def test_dynamic_ranges_are_per_token(shape):
    torch.manual_seed(0)
    layer = lq.QATLinear(nn.Linear(6, 3), "int8_dynamic").eval()
    x = torch.randn(shape)
    rows = x.reshape(-1, 6)
    scale = rows.abs().amax(1, keepdim=True) / 127
    witness = (torch.clamp(torch.round(rows / scale), -127, 127) * scale).reshape(shape)
    assert torch.equal(layer.input_quantizer(x), witness)


def test_dynamic_ranges_of_a_convolution_are_per_sample():
    torch.manual_seed(0)
    layer = lq.QATConv2d(nn.Conv2d(3, 4, 3), "int8_dynamic").eval()
    x = torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    both = layer(x)
    torch.testing.assert_close(both[:1], layer(x[:1]))
    torch.testing.assert_close(both[1], layer(x[1]), rtol=1e-4, atol=1e-4)
