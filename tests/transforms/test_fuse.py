"""BatchNorm is folded where it is the only reader of a layer's output, and nowhere else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.nn import FoldedBatchNorm


class Block(nn.Module):
    """Registers its BatchNorms in an order that misleads."""

    def __init__(self):
        super().__init__()
        self.bn2, self.bn1 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ReluBetween(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.conv, self.relu, self.bn = nn.Conv2d(4, 4, 3), nn.ReLU(inplace=inplace), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.relu(self.conv(x)))


class SecondReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class AlsoReturned(SecondReader):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y), y


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv1(x)) + self.bn(self.conv2(x))


class NormAlsoOnInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(self.bn(x)))


class TwiceTogether(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(self.bn(self.conv(x))))


class ReadsShape(SecondReader):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * y.shape[1] * (y.dim() - 3)


CASES = [
    (Block, {"conv1": "bn1", "conv2": "bn2"}),
    (lambda: ReluBetween(True), {"conv": ""}),
    (lambda: ReluBetween(False), {"conv": ""}),
    (SecondReader, {"conv": ""}),
    (AlsoReturned, {"conv": ""}),
    (SharedNorm, {"conv1": "", "conv2": ""}),
    (NormAlsoOnInput, {"conv": ""}),
    (TwiceTogether, {"conv": "bn"}),
    (ReadsShape, {"conv": "bn"}),
    (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)), {"0.0": "1"}),
    (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), {"0": ""}),
    (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)), {"0": "1"}),
    (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), {"0": ""}),
]


def decided(model):
    return {n: m.weight_quantizer.folded_norm for n, m in model.named_modules() if hasattr(m, "weight_quantizer")}


@pytest.mark.parametrize(("build", "expected"), CASES)
def test_one_batch_decides(build, expected):
    model = lq.prepare(build(), "int8")
    assert set(decided(model).values()) == {None}
    lq.calibrate(model, [torch.randn(2, 4, 8, 8)])
    assert decided(model) == expected
    assert not model._forward_hooks
    twin = lq.prepare(build(), "int8")
    twin.load_state_dict(model.state_dict())
    assert decided(twin) == expected


@pytest.mark.parametrize(("build", "expected"), CASES)
def test_a_folded_model_computes_what_the_trained_one_does(build, expected):
    torch.manual_seed(0)
    model = lq.prepare(build(), "int8")
    for _ in range(3):
        model(torch.randn(4, 4, 8, 8))
    lq.calibrate(model, [torch.randn(2, 4, 8, 8)])
    x = torch.randn(3, 4, 8, 8)
    trained, shipped = model.eval()(x), lq.convert(model)(x)
    for a, b in zip(*([trained], [shipped]) if isinstance(trained, torch.Tensor) else (trained, shipped), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_model_that_never_ran_is_traced():
    model = lq.prepare(Block(), "int8_weight_only").eval()
    model.bn1.running_mean.add_(0.5)
    converted = lq.convert(model)
    assert isinstance(converted.bn1, lq.nn.FoldedBatchNorm)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)
    assert decided(model) == {"conv1": None, "conv2": None}


def test_linear_folds_a_batchnorm_over_its_features_only():
    model = lq.prepare(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), "int8")
    lq.calibrate(model, [torch.randn(5, 4)])
    assert decided(model) == {"0": "1"}
    other = lq.prepare(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)), "int8")
    lq.calibrate(other, [torch.randn(3, 5, 4)])
    assert decided(other) == {"0": ""}


def test_parts_and_wholes_convert():
    """A LightningModule may be prepared and its model converted, or the other way round."""
    whole = nn.ModuleDict({"net": Block()})
    lq.prepare(whole, "int8")
    lq.calibrate(whole, [torch.randn(2, 4, 8, 8)], lambda m, b: m["net"](b))
    assert isinstance(lq.convert(whole["net"]).bn1, lq.nn.FoldedBatchNorm)
    part = lq.prepare(Block(), "int8")
    lq.calibrate(part, [torch.randn(2, 4, 8, 8)])
    assert isinstance(lq.convert(nn.ModuleDict({"net": part}))["net"].bn1, lq.nn.FoldedBatchNorm)
    with pytest.raises(ValueError, match="convert the whole model"):
        lq.convert(nn.ModuleDict({"conv1": part.conv1}))


class CannotBeTraced(nn.Module):
    """One of its convolutions is for other configurations, as those of models of transformers are."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.never = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.norm(self.conv(x)) if float(x.sum()) < 1e9 else self.never(x)


def test_what_is_said_of_a_model_that_cannot_be_traced_holds_of_the_layers_that_no_batch_reached(caplog):
    torch.manual_seed(0)
    model = lq.prepare(CannotBeTraced(), "int8_weight_only")
    assert isinstance(lq.convert(model).norm, nn.BatchNorm2d)
    assert "BatchNorm is not folded: CannotBeTraced cannot be traced" in caplog.text
    caplog.clear()
    lq.calibrate(model, [torch.randn(2, 3, 8, 8)])
    assert isinstance(lq.convert(model).norm, FoldedBatchNorm)
    assert "not folded into layers that no batch reached, such as 'never': CannotBeTraced" in caplog.text
