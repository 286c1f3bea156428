"""The gradients of learned scales on a CPU: sums of products in pieces, against the definition in float64."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_qat as lq
from lightning_qat.native.library import without_native
from lightning_qat.ops.chunks import CHUNK
from lightning_qat.ops.fake_quantize import reference_fake_quantize_backward
from lightning_qat.ops.fake_quantize_cpu import fake_quantize_cpu
from lightning_qat.ops.straight_through import _by_products, fake_quantize_through, grid_for, learned_gradients


def problem(shape, zero_point, scales=1):
    torch.manual_seed(0)
    grad, x = torch.randn(shape), torch.randn(shape) * 3
    scale = torch.rand(scales) * 0.02 + 0.01
    zero = None if zero_point is None else torch.full((scales,), zero_point, dtype=torch.int32)
    return grad, x, scale if scales > 1 else scale[0], zero if scales > 1 or zero is None else zero[0]


@pytest.mark.parametrize("shape", [(7,), (CHUNK,), (3 * CHUNK + 5,), (5, 3, 97, 101), (2, 40, 33, 31)])
@pytest.mark.parametrize("zero_point", [None, 100])
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("around", [nullcontext, without_native], ids=["native", "pytorch"])
def test_one_scale(shape, zero_point, needs_x, given, around):
    grad, x, scale, zero = problem(shape, zero_point)
    grid = (-127, 127, -1, 0) if zero is None else (0, 255, -1, 0)
    if len(shape) == 4 and shape[0] == 2:
        grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    values = fake_quantize_cpu(x, scale, zero, *grid) if given else None
    with around():
        found = learned_gradients(grad, x, scale, zero, grid, needs_x, values)
    assert _by_products(grad, x, scale, zero, grid, values, needs_x) is not None  # it was no kernel
    wide = None if zero is None else zero.double()
    needs = [True, True, zero is not None]
    expected = reference_fake_quantize_backward(grad, x, scale, wide, *grid, needs)
    if needs_x:
        assert torch.equal(found[0], expected[0])
        assert found[0].stride() == x.stride()
    else:
        assert not found[0].numel()
    size = float(x.numel()) ** 0.5  # what the sum of so many random numbers is like
    torch.testing.assert_close(found[1].double(), expected[1].double(), rtol=1e-4, atol=1e-3 * size)
    if zero is not None:
        torch.testing.assert_close(found[2].double(), expected[2].double(), rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("rows", [3, 700])
@pytest.mark.parametrize("around", [nullcontext, without_native], ids=["native", "pytorch"])
def test_rows_of_their_own(rows, around):
    grad, x, scale, _ = problem((rows, 300), None, scales=rows)
    grid = (-127, 127, 0, 0)
    with around():
        found = learned_gradients(grad, x, scale, None, grid, True)
    expected = reference_fake_quantize_backward(grad, x, scale, None, *grid, [True, True, False])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("around", [nullcontext, without_native], ids=["native", "pytorch"])
@pytest.mark.parametrize(
    ("grad", "expected"),
    [(lambda: torch._neg_view(torch.ones(4)), -1.0), (lambda: torch._efficientzerotensor((4,)), 0.0)],
    ids=["of the other sign", "without memory"],
)
def test_gradients_whose_memory_is_not_what_they_are(around, grad, expected):
    x = torch.linspace(-1, 1, 4).requires_grad_()
    with around():
        fake_quantize_through(x, torch.tensor(0.01), None, -127, 127, -1, 0).backward(grad())
    assert torch.equal(x.grad, torch.full((4,), expected))


class _Watch(TorchDispatchMode):
    """Notes which gradients convolutions are asked for, and the largest tensor that a product makes."""

    def __init__(self):
        super().__init__()
        self.masks, self.product = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.linalg_vecdot.default):
            self.product = max(self.product, result.numel())
        return result


def test_no_product_of_whole_tensors_is_made():
    grad, x, scale, zero = problem((8, 3, 64, 64), 100)
    with _Watch() as watch:
        _by_products(grad, x, scale, zero, (0, 255, -1, 0), fake_quantize_cpu(x, scale, zero, 0, 255, -1, 0))
    assert watch.product <= 1


@pytest.mark.parametrize("how", ["learned", "rule", "flag", "compiled"])
def test_a_fixed_range_of_the_data_saves_the_gradient_of_the_first_layers_input(how):
    """That gradient is what a learned scale costs there, and not the sums."""
    learns = how == "learned"
    config = lq.QATConfig("int4", per_channel=True, activation_bits=4, learnable_step_size=True)
    fixed = lq.QuantizationConfig("int8", bits=4, symmetric=False)
    rules = [lq.LayerRule("0", config.weight_config(), fixed)] if how == "rule" else []
    model = lq.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)),
                       lq.QuantizationPlan(rules, base=config))  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    lq.calibrate(model, [x])
    lq.apply_phase(model, lq.Phase(observing=False))
    model[0].input_quantizer.learns_of_data = how not in ("flag", "compiled")
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    with _Watch() as watch:
        run(x).sum().backward()
    model[0].weight_quantizer.begin_learning(model[0].weight)
    if how != "compiled":
        expected = lq.fake_quantize(x, model[0].input_quantizer.scale, model[0].input_quantizer.zero_point, bits=4,
                                    symmetric=False)  # fmt: skip
        assert torch.equal(model[0].quantized_input(x), expected)
    if how in ("flag", "compiled"):
        assert model[0].input_quantizer.learned.exponent.grad is None
    assert model[2].input_quantizer.learned.exponent.grad.any()
    assert [mask[0] for mask in watch.masks] == [True, learns]
    assert len(list(model[0].weight_quantizer.parameters())) == 1


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_model_on_the_cpu_trains_whatever_the_default_device_is(learnable, per_channel, symmetric):
    torch.manual_seed(0)
    config = {"learnable": learnable, "symmetric": symmetric}
    weight = lq.QuantizationConfig("int8", per_channel=per_channel, **config)
    plan = lq.QuantizationPlan([lq.LayerRule("*", weight, lq.QuantizationConfig("int8", **config))])
    model, x = lq.prepare(nn.Linear(8, 4), plan), torch.randn(4, 8)
    model(x)
    model.zero_grad()
    with torch.device("meta"):
        values = model(x)
        values.sum().backward()
    assert values.device.type == "cpu"
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in model.parameters())


def test_a_second_derivative_is_that_of_what_follows():
    x = torch.randn(8, requires_grad=True)
    y = fake_quantize_through(x, torch.tensor(0.1), None, -127, 127, -1, 0)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * y.detach())


def test_a_scale_elsewhere_than_its_tensor_is_told():
    with pytest.raises(ValueError, match="scale is on meta and x on cpu"):
        grid_for(torch.ones(4), torch.ones((), device="meta"), 8, True, None, None)


@pytest.mark.parametrize("width", [4, 64])
def test_a_penalty_of_gradients_has_every_part_where_the_incoming_gradient_is_a_constant(width):
    """That of the last layer, of whose input the gradient is its weight, among them."""
    model, x = nn.Sequential(nn.Linear(width, 3)), torch.randn(70, width)
    lq.calibrate(lq.prepare(model, "int8"), [x])
    x.requires_grad_()
    for phase in (lq.Phase(), lq.Phase(quantizing=False)):
        lq.apply_phase(model, phase)
        model.zero_grad()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        gradient.pow(2).sum().backward()
        rows = (model[0].quantized_weight() if phase.quantizing else model[0].weight).detach()
        torch.testing.assert_close(model[0].weight.grad, 2 * 70 * rows.sum(0).expand(3, -1), rtol=1e-4, atol=1e-3)
