"""The README's table for those who come from torch.quantization: every row is tried, both sides of it."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import lightning as L
import pytest
import torch
from classifier import Classifier, loader
from linear_models import quantized
from tensors import randn
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.ns.fx.utils import compute_sqnr
from torch.ao.quantization import observer as ao
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import lightning_qat as lq
from lightning_qat.config import resolve_plan
from lightning_qat.nn import FoldedBatchNorm
from lightning_qat.transforms.dynamic import quantize_dynamic

README = Path(__file__).parent.parent / "README.md"

#: What the first column of the table says, row by row, each with the test that tries it.
TRIED: dict[str, Callable[..., None]] = {}


def row(*calls: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def remember(test: Callable[..., None]) -> Callable[..., None]:
        TRIED.update(dict.fromkeys(calls, test))
        return test

    return remember


def first_column(text: str) -> list[str]:
    """Return the calls in the first column of the table whose head is ``torch.quantization``."""
    table = re.search(r"^\| `torch\.quantization` \|.*\n\|[-| :]+\n((?:\|.*\n?)+)", text, re.MULTILINE)
    lines = table.group(1).splitlines() if table else []
    return [call for line in lines for call in re.findall(r"`([^`]+)`", line.split("|")[1])]


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    """Let torch's side run although torch says that it will be gone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """As a user of eager torch.quantization has to write it; the stubs do nothing in float."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.flatten, self.head = nn.Flatten(), nn.Linear(16 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.head(self.flatten(self.relu(self.bn(self.conv(self.quant(x)))))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.bn.weight.uniform_(0.5, 1.5)
        model.bn.bias.normal_()
        for seed in range(20):
            model(randn(16, 3, 8, 8, seed=seed))  # BatchNorm's statistics
    return model.eval()


@pytest.fixture
def batches() -> list[Tensor]:
    return [randn(16, 3, 8, 8, seed=seed) for seed in range(100, 104)]


# --- whole models ---------------------------------------------------------------------------------


@row("quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)")
def test_quantize_dynamic(net: Net, batches: list[Tensor]) -> None:
    theirs = tq.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    ours = quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    expected = net(batches[0])
    assert isinstance(theirs.head, torch.ao.nn.quantized.dynamic.Linear)
    assert quantized(ours) == ["head"]
    assert lq.sqnr(expected, ours(batches[0])) > lq.sqnr(expected, theirs(batches[0])) > 30


@row("quantize_dynamic(model, {nn.Linear: default_dynamic_qconfig})")
def test_quantize_dynamic_with_a_qconfig(net: Net, batches: list[Tensor]) -> None:
    spec = {nn.Linear: tq.default_dynamic_qconfig, "head": tq.per_channel_dynamic_qconfig}
    theirs, ours = tq.quantize_dynamic(net, spec), quantize_dynamic(net, spec)
    scales = theirs.head.weight().q_per_channel_scales()  # theirs is absmax / 127.5, ours absmax / 127
    torch.testing.assert_close(ours.head.weight_scale.double(), scales * 127.5 / 127, rtol=1e-5, atol=0)
    assert (ours.head.codes.int() - theirs.head.weight().int_repr().int()).abs().max() <= 1
    expected = net(batches[0])
    assert lq.sqnr(expected, ours(batches[0])) > lq.sqnr(expected, theirs(batches[0])) - 0.5


def torch_static(model: Net, batches: list[Tensor]) -> nn.Module:
    model = tq.fuse_modules(copy.deepcopy(model), [["conv", "bn", "relu"]])
    model.qconfig = tq.get_default_qconfig("x86")
    tq.prepare(model, inplace=True)
    for batch in batches:
        model(batch)
    return tq.convert(model)


@row("prepare(model); model(batch) ...; convert(model)", "QuantStub()", "DeQuantStub()")
def test_static_quantization_after_training(net: Net, batches: list[Tensor]) -> None:
    theirs = torch_static(net, batches)
    ours = lq.convert(lq.calibrate(lq.prepare(copy.deepcopy(net), "int8"), batches))
    x = randn(64, 3, 8, 8, seed=7)
    expected = net(x)
    assert isinstance(theirs.head, torch.ao.nn.quantized.Linear)
    assert quantized(ours) == ["conv", "head"]
    assert lq.sqnr(expected, ours(x)) > max(25, lq.sqnr(expected, theirs(x)))
    assert (ours(x).argmax(1) == expected.argmax(1)).float().mean() > 0.9


@row("fuse_modules(model, [['conv', 'bn', 'relu']])")
def test_batchnorm_is_folded_without_being_told(net: Net, batches: list[Tensor]) -> None:
    theirs = tq.fuse_modules(net, [["conv", "bn", "relu"]])
    prepared = lq.calibrate(lq.prepare(copy.deepcopy(net), "int8"), batches)
    ours = lq.convert(prepared)
    assert type(theirs.bn) is nn.Identity
    assert type(ours.bn) is FoldedBatchNorm
    torch.testing.assert_close(theirs(batches[0]), net(batches[0]), rtol=1e-4, atol=1e-4)
    assert lq.sqnr(prepared(batches[0]), ours(batches[0])) > 60


@row("fuse_conv_bn_eval(conv, bn)")
def test_fold_one_batchnorm(net: Net, batches: list[Tensor]) -> None:
    theirs = torch.nn.utils.fusion.fuse_conv_bn_eval(net.conv, net.bn)
    ours = lq.fold_bn_into_conv(net.conv, net.bn)
    exact = copy.deepcopy(net).double()
    wanted = exact.bn(exact.conv(batches[0].double()))
    torch.testing.assert_close(theirs(batches[0]).double(), wanted, rtol=1e-5, atol=1e-5)  # the witness
    torch.testing.assert_close(ours(batches[0]), theirs(batches[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-8)
    assert type(net.bn) is nn.BatchNorm2d


def train(model: nn.Module, batches: list[Tensor]) -> float:
    """Learn to tell whether an image is bright; return the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for batch in batches * 8:
        loss = nn.functional.cross_entropy(model(batch), bright(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


def bright(x: Tensor) -> Tensor:
    return (x.mean((1, 2, 3)) > 0).long()


@row("prepare_qat(model); train; convert(model)")
def test_quantization_aware_training(net: Net, batches: list[Tensor]) -> None:
    theirs = tq.fuse_modules_qat(copy.deepcopy(net).train(), [["conv", "bn", "relu"]])
    theirs.qconfig = tq.get_default_qat_qconfig("x86")
    tq.prepare_qat(theirs, inplace=True)
    ours = lq.prepare(copy.deepcopy(net).train(), "int8")
    train(theirs, batches)
    assert train(ours, batches) == pytest.approx(train(net.train(), batches), abs=0.02)  # it learns as float does
    converted, theirs_converted = lq.convert(ours.eval()), tq.convert(theirs.eval())
    x = torch.cat(batches)
    assert type(theirs_converted.head) is torch.ao.nn.quantized.Linear
    assert theirs_converted(x).shape == converted(x).shape
    assert quantized(converted) == ["conv", "head"]
    assert lq.sqnr(ours(x), converted(x)) > 60  # what trained is what ships
    assert (converted(x).argmax(1) == bright(x)).float().mean() > 0.95


def test_quantization_aware_training_in_a_trainer() -> None:
    module, data = Classifier(), loader(samples=128, batch_size=8)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    callback = lq.QuantizationAwareTraining("int8")
    L.Trainer(max_epochs=8, accelerator="cpu", callbacks=[callback], **quiet).fit(module, data)
    converted = lq.convert(module.eval())
    assert quantized(converted) == ["conv", "head"]
    assert torch.cat([converted(x).argmax(1) == y for x, y in data]).float().mean() > 0.9


@row("QConfigMapping().set_global(qconfig).set_module_name('head', None)", "prepare_fx", "convert_fx")
def test_which_layers(net: Net) -> None:
    mapping = tq.QConfigMapping().set_global(tq.get_default_qconfig("x86")).set_module_name("head", None)
    prepared = prepare_fx(copy.deepcopy(net), mapping, (randn(1, 3, 8, 8),))
    converted = convert_fx(prepared)
    plan = lq.QuantizationPlan([lq.LayerRule("head")], base="int8")
    ours = lq.prepare(copy.deepcopy(net), plan)
    assert type(converted.head) is nn.Linear
    assert type(ours.head) is nn.Linear
    assert type(converted.conv).__module__.startswith("torch.ao.nn")
    assert isinstance(ours.conv, lq.QATConv2d)


@row("default_qconfig", "get_default_qconfig('x86')", "get_default_qat_qconfig('x86')")
@pytest.mark.parametrize(
    ("qconfig", "config"),
    [
        (tq.default_qconfig, lq.QATConfig("int8")),
        (tq.get_default_qconfig("x86"), lq.PRESETS["int8"]),
        (tq.get_default_qat_qconfig("x86"), lq.PRESETS["int8"]),
        (tq.per_channel_dynamic_qconfig, lq.PRESETS["int8_dynamic_per_tensor"]),
    ],
)
def test_what_a_qconfig_is_called_here(qconfig: tq.QConfig, config: lq.QATConfig) -> None:
    weight, activation = (getattr(make(), "activation_post_process", make()) for make in reversed(qconfig))
    ours: lq.QATConfig = resolve_plan(config).base
    assert weight.qscheme == (torch.per_channel_symmetric if ours.per_channel else torch.per_tensor_symmetric)
    assert (weight.dtype, ours.bits, ours.symmetric) == (torch.qint8, 8, True)
    assert activation.dtype is torch.quint8
    assert (ours.activation_bits, ours.activation_symmetric) == (8, False)
    assert activation.is_dynamic if ours.activation_dynamic else activation.qscheme == torch.per_tensor_affine


@row("model.apply(disable_fake_quant)", "model.apply(disable_observer)", "model.apply(freeze_bn_stats)")
def test_phases(net: Net, batches: list[Tensor]) -> None:
    model = lq.calibrate(lq.prepare(copy.deepcopy(net), "int8"), batches).train()
    x, scale = batches[0] * 3, model.head.input_quantizer.scale.clone()
    lq.apply_phase(model, lq.Phase(quantizing=False, observing=False, frozen_norm=True))
    mean = model.bn.running_mean.clone()
    torch.testing.assert_close(model(x), net(x))  # disable_fake_quant
    assert torch.equal(model.bn.running_mean, mean)  # freeze_bn_stats
    assert torch.equal(model.head.input_quantizer.scale, scale)  # disable_observer
    lq.apply_phase(model, lq.Phase())
    assert not torch.equal(model(x), net(x))
    assert not torch.equal(model.head.input_quantizer.scale, scale)


@row("torch.save(quantized.state_dict(), path)")
def test_saving(net: Net, batches: list[Tensor], tmp_path: Path) -> None:
    ours = lq.convert(lq.calibrate(lq.prepare(copy.deepcopy(net), "int8"), batches))
    lq.save_quantized(ours, tmp_path / "model")
    assert torch.equal(lq.load_quantized(tmp_path / "model", Net())(batches[0]), ours(batches[0]))
    theirs = torch_static(net, batches)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(RuntimeError):  # a freshly built float model does not take it; ours does
        Net().load_state_dict(torch.load(tmp_path / "theirs.pt"))


# --- tensors --------------------------------------------------------------------------------------

TIES = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.5, 126.4, 200.0, -200.0])


@pytest.mark.parametrize("zero", [10, 11])
def test_the_witness_rounds_half_to_even_before_it_adds_the_zero_point(zero: int) -> None:
    wanted = torch.tensor([0.0, 2.0, 2.0, 0.0, -2.0, 4.0, 126.0, 200.0, -float(zero)])
    per_channel = torch.fake_quantize_per_channel_affine(
        TIES[None], torch.ones(1), torch.tensor([zero], dtype=torch.int32), 0, 0, 255
    )
    assert torch.equal(torch.fake_quantize_per_tensor_affine(TIES, 1.0, zero, 0, 255), wanted)
    assert torch.equal(per_channel[0], wanted)
    assert torch.equal(lq.fake_quantize(TIES, torch.tensor(1.0), torch.tensor(zero), symmetric=False), wanted)


@row("torch.fake_quantize_per_tensor_affine(x, s, z, 0, 255)")
@row("torch.fake_quantize_per_tensor_affine(x, s, 0, -127, 127)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("zero", "low", "high", "bits"), [(0, -127, 127, 8), (97, 0, 255, 8), (0, -8, 7, 4)])
def test_fake_quantize_per_tensor(dtype: torch.dtype, zero: int, low: int, high: int, bits: int) -> None:
    # Where the reciprocal of the scale is exact both are the same numbers, ties included.
    x = torch.cat([randn(4096) * 5, torch.arange(-600, 600) / 32]).to(dtype)
    grid = (None, True) if not zero else (torch.tensor(zero), False)
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.0625, zero, low, high)
    ours = lq.fake_quantize(x, torch.tensor(0.0625), grid[0], bits=bits, symmetric=grid[1])
    assert ours.dtype is dtype
    assert torch.equal(ours, theirs)
    assert ours.unique().numel() > 10


@row("torch.fake_quantize_per_channel_affine(x, s, z, axis, 0, 255)")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_fake_quantize_per_channel(axis: int) -> None:
    x = randn(6, 6, 50) * 5
    scale, zero = 2.0 ** torch.arange(-6, 0), torch.tensor([0, 1, 128, 200, 255, 64], dtype=torch.int32)
    if axis == 2:
        x = x.transpose(0, 2)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, axis, 0, 255)
    assert torch.equal(lq.fake_quantize(x, scale, zero, symmetric=False, axis=axis), theirs)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros_like(zero), axis, -127, 127)
    assert torch.equal(lq.fake_quantize(x, scale, axis=axis), theirs)


def test_fake_quantize_where_the_reciprocal_rounds_and_nan() -> None:
    # torch multiplies by 1 / scale, which is rounded; here x is divided by it, which is not. So they part at ties,
    # by one step, and there the quotient says who is right.
    scale = torch.tensor(0.0371)
    x = torch.cat([randn(20_000), (torch.arange(-120, 120) + 0.5) * scale])
    theirs, ours = torch.fake_quantize_per_tensor_affine(x, float(scale), 0, -127, 127), lq.fake_quantize(x, scale)
    parted = (theirs != ours).nonzero().flatten().tolist()
    assert 0 < len(parted) < 240
    for i in parted:
        step = Fraction(float(scale))
        quotient = Fraction(float(x[i])) / step
        assert abs(abs(quotient - math.floor(quotient)) - Fraction(1, 2)) < abs(quotient) * Fraction(1, 2**22)
        assert abs(round(float(ours[i]) / float(step)) - round(float(theirs[i]) / float(step))) == 1
        nearest = round(Fraction(float(x[i] / scale)))  # of the float32 quotient, half to even
        assert round(float(ours[i]) / float(step)) == nearest
    nan = torch.tensor([math.nan])  # has a value there and none here
    assert float(torch.fake_quantize_per_tensor_affine(nan, 1.0, 0, -127, 127)) == -127
    assert lq.fake_quantize(nan, torch.tensor(1.0)).isnan().all()


@row("compute_sqnr(x, y)")
def test_sqnr() -> None:
    x = randn(64, 64)
    y = lq.fake_quantize(x, x.abs().max() / 127)
    assert float(lq.sqnr(x, y)) == pytest.approx(float(compute_sqnr(x, y)), rel=1e-5)


# --- observers ------------------------------------------------------------------------------------

AFFINE = dict(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
NARROW = dict(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127)


def observed(observer: nn.Module, batches: list[Tensor]) -> nn.Module:
    for batch in batches:
        observer(batch)
    return observer


def assert_same_grid(theirs: nn.Module, ours: lq.Observer, symmetric: bool) -> None:
    wanted, zero = theirs.calculate_qparams()
    scale, zero_point = ours.get_quantization_params(symmetric, 8)
    torch.testing.assert_close(scale.reshape(-1), wanted.reshape(-1), rtol=3e-7, atol=0)
    assert torch.equal(zero_point.reshape(-1).int(), zero.reshape(-1).int())


@row("MinMaxObserver(...).calculate_qparams()", "PerChannelMinMaxObserver(ch_axis=0)")
def test_min_max_observer(batches: list[Tensor]) -> None:
    for symmetric, options in ((False, AFFINE), (True, NARROW)):
        assert_same_grid(
            observed(ao.MinMaxObserver(**options), batches), observed(lq.MinMaxObserver(), batches), symmetric
        )
    rows = [batch.transpose(0, 1) for batch in batches]
    theirs = ao.PerChannelMinMaxObserver(ch_axis=0, **{**NARROW, "qscheme": torch.per_channel_symmetric})
    assert_same_grid(observed(theirs, rows), observed(lq.MinMaxObserver(num_channels=3), rows), symmetric=True)
    # By default torch divides by 127.5 and uses code -128 too: its grid is not ours.
    wide = ao.MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    scale = observed(lq.MinMaxObserver(), batches).get_quantization_params(True, 8)[0]
    torch.testing.assert_close(observed(wide, batches).calculate_qparams()[0][0] * 127.5 / 127, scale)


@row("MovingAverageMinMaxObserver(averaging_constant=0.01)")
def test_moving_average_observer(batches: list[Tensor]) -> None:
    growing = [batch * (i + 1) for i, batch in enumerate(batches)]
    for symmetric, options in ((False, AFFINE), (True, NARROW)):
        theirs = ao.MovingAverageMinMaxObserver(averaging_constant=0.01, **options)
        ours = lq.MovingAverageObserver(momentum=0.99)
        assert_same_grid(observed(theirs, growing), observed(ours, growing), symmetric)
    assert float(ours.max_val) < 0.5 * float(growing[-1].max())  # an average, not the maximum


@row("HistogramObserver()")
def test_histogram_observer() -> None:
    # Not the same search: here, with outliers in one batch, its error is no more.
    batches = [randn(20_000, seed=seed) for seed in range(4)]
    batches[2][:3] = 60.0
    x = torch.cat(batches)
    scale, zero = observed(ao.HistogramObserver(**AFFINE), batches).calculate_qparams()
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), 0, 255)
    ours = lq.fake_quantize(
        x, *observed(lq.HistogramObserver(), batches).get_quantization_params(False, 8), symmetric=False
    )
    assert lq.quantization_error(x, ours) <= lq.quantization_error(x, theirs)
    assert lq.sqnr(x, theirs) > 20


# --- the table ------------------------------------------------------------------------------------


def test_a_table_is_read() -> None:
    text = "x\n\n| `torch.quantization` | here |\n|---|---|\n| `f(x)`, `g()` | `h(x)` |\n| `k` | no |\n\n| a | `b` |\n"
    assert first_column(text) == ["f(x)", "g()", "k"]
    assert first_column("| a | b |\n|---|---|\n| `c` | `d` |\n") == []


def test_every_row_of_the_readme_is_tried() -> None:
    calls = first_column(README.read_text(encoding="utf-8"))
    if not calls:
        pytest.skip("README has no table for torch.quantization")
    assert set(calls) == TRIED.keys()
