"""What quantize_dynamic is asked for: which layers, how, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from linear_models import linears, network, quantized
from torch import nn
from torch.ao import quantization as tq

import lightning_qat as lq
from lightning_qat.transforms.dynamic import quantize_dynamic

# --- what is chosen -------------------------------------------------------------------------------

PER_TENSOR = tq.default_dynamic_qconfig
PER_CHANNEL = tq.per_channel_dynamic_qconfig


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (None, ["body.0", "body.2", "rnn.ih_l0", "rnn.hh_l0", "head"]),
        ({nn.Linear}, ["body.0", "body.2", "head"]),
        (frozenset({nn.Linear, nn.GRU}), ["body.0", "body.2", "head"]),  # torch overlooks an absent type, too
        ({"body"}, ["body.0", "body.2"]),
        ({"body.2", "head"}, ["body.2", "head"]),
        ({nn.Sequential}, ["body.0", "body.2"]),
        ({""}, ["body.0", "body.2", "rnn.ih_l0", "rnn.hh_l0", "head"]),
        ({nn.LSTM, nn.Linear}, ["body.0", "body.2", "rnn.ih_l0", "rnn.hh_l0", "head"]),
        ({"rnn"}, ["rnn.ih_l0", "rnn.hh_l0"]),
        ({"": "int8_dynamic", "body": None}, ["rnn.ih_l0", "rnn.hh_l0", "head"]),
        ({"", nn.Linear}, ["body.0", "body.2", "rnn.ih_l0", "rnn.hh_l0", "head"]),
        ({nn.Conv1d}, ["conv"]),
        ({nn.Conv1d, nn.Linear}, ["conv", "body.0", "body.2", "head"]),
        ({nn.Linear: "int8_dynamic", "head": None}, ["body.0", "body.2"]),
        ({nn.Linear: "int8_dynamic", nn.LSTM: None}, ["body.0", "body.2", "head"]),
        ({"body": PER_CHANNEL, "body.0": None}, ["body.2"]),
        ({nn.Sequential: None, nn.Linear: PER_CHANNEL}, ["body.0", "body.2", "head"]),  # the inner one's own type wins
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_which_layers(spec: object, names: list[str], inplace: bool) -> None:
    result = quantize_dynamic(network(), spec, inplace=inplace)
    assert quantized(result) == names
    assert torch.isfinite(result(torch.randn(2, 4, 8))).all()


@pytest.mark.parametrize(
    "spec",
    [
        {nn.Linear},
        {"body"},
        {"body.2", "head"},
        {nn.Sequential},
        {"body": PER_CHANNEL, "body.0": None},
        {nn.Sequential: None, nn.Linear: PER_CHANNEL},
        {nn.Linear: PER_CHANNEL, "head": None},
        {nn.Linear: None, "head": PER_TENSOR},
    ],
)
def test_torch_chooses_the_same_linears(spec: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = tq.quantize_dynamic(network(), spec)
    wanted = [name for name, module in theirs.named_modules() if isinstance(module, torch.ao.nn.quantized.Linear)]
    assert wanted
    assert quantized(quantize_dynamic(network(), spec)) == wanted


def test_a_qconfig_attribute_goes_before_all() -> None:
    model = network()
    model.head.qconfig, model.body.qconfig = None, PER_TENSOR
    result = quantize_dynamic(model, {nn.Linear})
    assert quantized(result) == ["body.0", "body.2"]
    assert quantized(quantize_dynamic(model)) == ["body.0", "body.2", "rnn.ih_l0", "rnn.hh_l0"]
    # Of the Linears themselves nothing is said but by their type, which goes before what is around them.
    assert quantized(quantize_dynamic(model, {})) == ["body.0", "body.2"]
    assert quantize_dynamic(model, {}).body[0].weight_format.axis is None
    model.body[0].qconfig = object()  # an attribute of that name that is none of torch's
    assert quantized(quantize_dynamic(model, {})) == ["body.0", "body.2"]


def test_subclasses_belong_to_their_type() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(Doubled(8, 4), nn.Linear(4, 4))
    x = torch.randn(3, 8)
    result = quantize_dynamic(model)
    assert isinstance(result[0], Doubled)
    assert quantized(result) == ["0", "1"]
    assert lq.sqnr(model(x), result(x)) > 25
    assert quantized(quantize_dynamic(model, {nn.Linear: None, Doubled: "int8_dynamic"})) == ["0"]


# --- how ------------------------------------------------------------------------------------------


def weight_like_torch(weight: torch.Tensor, qconfig: object) -> torch.Tensor:
    observer = qconfig.weight()
    observer(weight)
    scale, zero = observer.calculate_qparams()
    if scale.numel() > 1:
        return torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8).int_repr()
    return torch.quantize_per_tensor(weight, float(scale), int(zero), torch.qint8).int_repr()


@pytest.mark.parametrize(("qconfig", "axis"), [(PER_TENSOR, None), (PER_CHANNEL, 0), (tq.default_qat_qconfig, None)])
def test_a_torch_qconfig_is_taken_at_its_word(qconfig: tq.QConfig, axis: int | None) -> None:
    model, x = linears(64, 32), torch.randn(6, 64)
    layer = quantize_dynamic(model, {nn.Linear: qconfig})[0]
    assert layer.weight_format.axis == axis
    assert (layer.weight_format.bits, layer.weight_format.symmetric) == (8, True)
    assert (layer.input_format.dynamic_range, layer.input_format.symmetric) == ("tensor", False)
    assert layer.execution.endswith(" int8 per tensor, dynamic")
    # torch's scale is absmax / 127.5 and ours absmax / 127: codes differ by one at most.
    if qconfig is not tq.default_qat_qconfig:
        theirs = weight_like_torch(model[0].weight.detach(), qconfig)
        assert (layer.codes.int() - theirs.int()).abs().max() <= 1
    assert lq.sqnr(model(x), layer(x)) > 35


def test_weight_observers_of_other_grids() -> None:
    observe = tq.MinMaxObserver.with_args
    cases = {
        (8, False): observe(dtype=torch.qint8, qscheme=torch.per_tensor_affine),
        (7, True): observe(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, reduce_range=True),
        (4, True): observe(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-8, quant_max=7),
        (8, True): observe(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127),
    }
    for (bits, symmetric), weight in cases.items():
        qconfig = tq.QConfig(activation=tq.default_dynamic_quant_observer, weight=weight)
        fmt = quantize_dynamic(linears(16, 8), {nn.Linear: qconfig})[0].weight_format
        assert (fmt.bits, fmt.symmetric, fmt.axis) == (bits, symmetric, None)


@pytest.mark.parametrize(
    ("value", "inputs", "bits"),
    [
        ("int8_dynamic", "token", 8),
        ("int8_dynamic_per_tensor", "tensor", 8),
        ("int8_weight_only", None, 8),
        (lq.QATConfig("int4", group_size=32, activation_bits=None), None, 4),
        (lq.QATConfig("int8", bits=5, activation_dynamic=True), "token", 5),
        (lq.QuantizationConfig("int8", bits=6, per_channel=True), None, 6),
    ],
)
def test_our_own_configs_as_values(value: object, inputs: str | None, bits: int) -> None:
    model, x = linears(64, 64), torch.randn(2, 64)
    layer = quantize_dynamic(model, {nn.Linear: value})[0]
    assert layer.weight_format.bits == bits
    assert layer.input_format is None if inputs is None else layer.input_format.dynamic_range == inputs
    assert lq.sqnr(model(x), layer(x)) > 15


def test_embeddings_by_type() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    result = quantize_dynamic(model, {nn.Embedding, nn.Linear})
    assert quantized(result) == ["0", "1"]
    assert result[0].input_format is None


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(qconfig_spec={nn.ReLU}), "asks for ReLU, but ReLU .layer 'body.1'."),
        (dict(qconfig_spec={"haed"}), "names 'haed', which Network does not have; nearest: 'head'"),
        (dict(qconfig_spec={nn.GRU}), "no layer to quantize: looked for GRU; Network has: Conv1d, LSTM, Linear"),
        (dict(qconfig_spec=set()), "looked for nothing"),
        (dict(qconfig_spec={nn.Linear: None}), "no layer to quantize: looked for Linear"),
        (dict(qconfig_spec=nn.Linear), "use None, a set of layer types and names, or a dict"),
        (dict(qconfig_spec={3}), "qconfig_spec has 3"),
        (dict(qconfig_spec={nn.Linear: 8}), "qconfig_spec.Linear.=8 is not allowed"),
        (dict(qconfig_spec={nn.Linear: "int9"}), "preset='int9' is not known"),
        (dict(qconfig_spec={"head": "int8"}), "qconfig_spec.'head'.='int8' has activation ranges that need calib"),
        (dict(qconfig_spec={nn.Linear: tq.float16_dynamic_qconfig}), "use torch.qint8, or for weights in float16"),
        (dict(qconfig_spec={nn.Linear: tq.float_qparams_weight_only_qconfig}), "dtype=torch.quint8 is not allowed"),
        (dict(dtype=torch.float16), "dtype=torch.float16 is not allowed; use torch.qint8, or .* model.half"),
        (dict(dtype=torch.quint8), "for embeddings use prepare"),
        (dict(qconfig_spec={nn.Linear}, dtype=torch.quint4x2), "w4a16"),
        (dict(dtype=torch.int8), "dtype=torch.int8 is not allowed; use torch.qint8$"),
        (dict(mapping={nn.Linear: nn.Linear}), "mapping=.* is not allowed"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    model = network().train()
    with pytest.raises(ValueError, match=message):
        quantize_dynamic(model, inplace=True, **arguments)
    assert model.training
    assert not quantized(model)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            tq.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, ch_axis=1),
            "ch_axis=1; output channels are ch_axis=0",
        ),
        (tq.MinMaxObserver.with_args(dtype=torch.qint8, quant_min=-100, quant_max=100), "quant_min=-100"),
        (tq.NoopObserver.with_args(dtype=torch.qint8), "a NoopObserver, with qscheme=None is not known"),
        (nn.Identity, "a Identity, has dtype=None is not allowed"),
    ],
)
def test_weight_observers_that_mean_nothing_here(weight: object, message: str) -> None:
    qconfig = tq.QConfig(activation=tq.default_dynamic_quant_observer, weight=weight)
    with pytest.raises(ValueError, match=message):
        quantize_dynamic(linears(4, 4), {nn.Linear: qconfig})


def test_models_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="EmbeddingBag .layer '0'. cannot be quantized"):
        quantize_dynamic(nn.Sequential(nn.EmbeddingBag(4, 4), nn.Linear(4, 4)), {nn.EmbeddingBag})
    with pytest.raises(ValueError, match="looked for Linear, LSTM, GRU, .*; Conv1d has: Conv1d"):
        quantize_dynamic(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="layer '0' of Sequential is already prepared"):
        quantize_dynamic(lq.prepare(linears(4, 4)))
    with pytest.raises(ValueError, match="layer '0' of Sequential is already converted"):
        quantize_dynamic(quantize_dynamic(linears(4, 4)))
    with pytest.raises(ValueError, match="lazy"):
        quantize_dynamic(nn.Sequential(nn.LazyLinear(4)))
