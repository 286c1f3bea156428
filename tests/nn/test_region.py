"""Codes between converted convolutions: the user's code sees float tensors, whatever it does with them."""

import copy
import io
import pickle

import pytest
import torch
from regions import converted, module_by_module
from tensors import randn
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.nn.conv_kernel import ConvKernel
from lightning_qat.nn.region import RegionTensor
from lightning_qat.nn.region_steps import _code_of
from lightning_qat.ops.integer_conv import CodeGrid, CodeRange, conv_is_exact

pytestmark = pytest.mark.skipif(not conv_is_exact(), reason="this CPU has no exact integer kernel")


@pytest.fixture
def straight(monkeypatch):
    """The number of times that a convolution computed straight to codes."""
    calls = []
    run = ConvKernel.run

    def counted(self, codes, bias, output, *, relu):
        calls.append(output is not None)
        return run(self, codes, bias, output, relu=relu)

    monkeypatch.setattr(ConvKernel, "run", counted)
    return calls


def feeds(model):
    return {name: module.feeds_one_layer for name, module in model.named_modules() if hasattr(module, "kernel_cache")}


def test_bounds_do_not_follow_the_default_dtype():
    """Lightning's "bf16-true" makes it bfloat16 while a step runs, in which 6 / 0.0236 is 255 and not 254.2."""
    grid = CodeGrid(0.0236, CodeRange(0, 0, 255))
    codes = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        _code_of.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            codes.append([_code_of(bound, grid) for bound in (6.0, 5.0, 1.0, 0.37)])
        finally:
            torch.set_default_dtype(torch.float32)
    assert codes == [[254, 212, 42, 16]] * 3


# ------------------------------------------------------------------------------------------------- straight to codes
CHAINS = {
    "nothing": [],
    "relu": [nn.ReLU()],
    "relu6": [nn.ReLU6()],
    "relu in place": [nn.ReLU(inplace=True)],
    "pool": [nn.MaxPool2d(3, 2, 1), nn.ReLU()],
    "clamps": [nn.Hardtanh(-0.3, 0.4), nn.MaxPool2d(2), nn.ReLU6(), nn.Dropout(0.5)],
    "batch norm": [nn.BatchNorm2d(8), nn.ReLU()],
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("plan", ["int8", "w4a4", lq.QATConfig("int8", activation_symmetric=True, per_channel=True)])
def test_straight_codes_are_those_of_the_floats_but_for_ties(chain, plan, straight, monkeypatch):
    """The witness is the float path; where the codes differ, the float lies in the middle between two."""
    x = randn(4, 3, 12, 12)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *copy.deepcopy(CHAINS[chain]), nn.Conv2d(8, 5, 3)).eval()
    model = converted(model, x, plan)
    assert feeds(model)["0"] is True
    last = model[-1]
    codes = {}
    codes_of = ConvKernel.codes_of

    def recorded(self, tensor):
        found = codes_of(self, tensor)
        if self.out_channels == 5:
            codes["straight" if type(tensor) is RegionTensor else "floats"] = found.clone()
            if type(tensor) is RegionTensor:
                codes["values"] = tensor.floats().double() / self.grid.scale
        return found

    monkeypatch.setattr(ConvKernel, "codes_of", recorded)
    with torch.no_grad():
        model(x)
        assert straight[:1] == [True]
        last.feeds_one_layer = model[0].feeds_one_layer = False
        model(x)
        kernel = last._kernel(x.new_zeros(1, 8, 9, 9))
        floats = torch.round(codes["values"].float()) + kernel.grid.codes.zero_point
        floats = floats.clamp(kernel.grid.codes.low, kernel.grid.codes.high)
    off = codes["straight"] != floats
    assert off.sum() <= 2
    ties = (codes["values"][off] - codes["values"][off].floor() - 0.5).abs()
    assert (ties < 1e-4).all()


@pytest.mark.parametrize(
    ("flatten", "taken"),
    [
        (nn.Flatten(), True),
        (lambda x: torch.flatten(x, 1), True),
        (lambda x: x.view(x.size(0), -1), True),
        (lambda x: x.reshape(len(x), 8 * 6 * 6), True),
        (lambda x: x.mean((2, 3)).repeat(1, 36), False),
    ],
)
def test_codes_go_on_into_a_linear(flatten, taken, straight):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8 * 6 * 6, 5)

        def forward(self, x):
            return self.linear(flatten(F.max_pool2d(torch.relu(self.conv(x)), 2)))

    x = randn(3, 3, 14, 14)
    model = converted(Net(), x)
    assert feeds(model) == {"conv": taken, "linear": False}
    expected = module_by_module(model, x)
    straight.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-2 * expected.abs().max().item())
    assert straight == [taken]


def test_saved_and_loaded_it_computes_the_same_bits(tmp_path, straight):
    x = randn(4, 3, 12, 12)
    build = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))  # noqa: E731
    model = converted(build(), x)
    loaded = lq.load_quantized(lq.save_quantized(model, tmp_path / "model"), build())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert straight == [True, True, False] * 2


def test_a_bias_changed_later_changes_nothing_computed_before():
    x = randn(2, 3, 9, 9)
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), x)
    kept = []
    model[0].register_forward_hook(lambda _m, _a, output: kept.append(output))
    with torch.no_grad():
        expected = module_by_module(model[0], x)
        model(x)
        model[0].bias.add_(1)
    assert torch.equal(kept[1] + 0, expected)


# ------------------------------------------------------------------------------------------------- where it ends
class Returning(nn.Module):
    def __init__(self, function=torch.relu):
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), function

    def forward(self, x, fail=None):
        y = self.function(self.a(x))
        if fail is not None:
            raise fail
        return {"list": [y, self.b(y)], "tuple": (y.shape, None)}


def test_nothing_leaves_the_outermost_module_lazily():
    x = randn(2, 3, 5, 5)
    model = converted(Returning(), x)
    with torch.no_grad():
        output = model(x)
        assert [type(t) for t in output["list"]] == [torch.Tensor, torch.Tensor]
        assert type(model.a(x)) is torch.Tensor
        for fail in (KeyError("mine"), KeyboardInterrupt("mine")):  # no hook is called for the second
            with pytest.raises(type(fail), match="mine"):
                model(x, fail=fail)
            assert type(model.a(x)) is torch.Tensor  # the failed call is over
            after = model(x)["list"]
            assert type(after[0]) is torch.Tensor
            assert torch.equal(after[1], output["list"][1])


def test_what_holds_nothing_lazy_is_returned_as_it_is():
    class Caching(Returning):
        def forward(self, x):
            self.cache.append(float(super().forward(x)["list"][1].sum()))
            return self.cache

    x = randn(2, 3, 5, 5)
    model = Caching()
    model.cache = []
    model = converted(model, x)
    with torch.no_grad():
        assert model(x) is model.cache


def test_a_hook_that_fails_first_leaves_no_trace():
    x = randn(2, 3, 5, 5)
    model = converted(Returning(), x)

    def fail(*_):
        raise KeyError("early")

    handle = model.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(KeyError, match="early"), torch.no_grad():
        model(x)
    handle.remove()
    with torch.no_grad():
        assert type(model.a(x)) is torch.Tensor


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_keeps_its_regions(copied, straight):
    x = randn(2, 3, 9, 9)
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), x)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copied(model)(x), expected)
    assert straight == [True, False] * 2


def test_gradients_autocast_and_other_dtypes_stay_out(straight):
    x = randn(2, 3, 9, 9)
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), x)
    expected = module_by_module(model, x)
    straight.clear()
    assert torch.equal(model(x), expected)  # gradients enabled
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    with torch.no_grad():
        copy.deepcopy(model).bfloat16()(x.bfloat16())
        model[0](x)
        torch.compile(model, backend="eager", fullgraph=True)(x)
    assert straight == []


def test_saving_a_tensor_from_a_hook():
    x = randn(2, 3, 9, 9)
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), x)
    kept = []
    model[1].register_forward_hook(lambda _m, _a, output: kept.append(output))
    with torch.no_grad():
        model(x)
        expected = torch.relu(module_by_module(model[0], x))
    file = io.BytesIO()
    torch.save(kept[0], file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), expected)
    assert torch.equal(kept[0] + 0, expected)


@pytest.mark.parametrize("clamp", [nn.Hardtanh(-0.1, 0.12), nn.ReLU6()])
def test_a_clamp_inside_the_grid_of_the_reader_clamps_codes(clamp, straight):
    """A range that was calibrated on clamped values does it by itself; one that reaches further must not."""
    x = randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), clamp, nn.Conv2d(8, 5, 1)).eval()
    with torch.no_grad():
        model[0].weight.mul_(20)
    model = converted(model, x)
    model[-1].input_scale.mul_(3)
    expected = module_by_module(model, x)
    straight.clear()
    with torch.no_grad():
        actual = model(x)
    assert straight == [True, False]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
