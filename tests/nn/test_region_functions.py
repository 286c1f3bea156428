"""Between two convolutions the user's code sees float tensors, whatever it does with them."""

import copy
import pickle

import pytest
import torch
from regions import converted, module_by_module
from tensors import randn
from torch import nn
from torch.nn import functional as F

from lightning_qat.nn.region import RegionTensor
from lightning_qat.ops.integer_conv import conv_is_exact

pytestmark = pytest.mark.skipif(not conv_is_exact(), reason="this CPU has no exact integer kernel")


class Between(nn.Module):
    """Two convolutions and any function between them."""

    def __init__(self, function=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.second(torch.relu(self.first(x)))))


def view_changed(x):
    y = x.view(x.shape[0], -1) if x.is_contiguous() else x.permute(0, 2, 3, 1)
    y.mul_(2)
    return x


def changed_under_a_view(x):
    y = x.flatten(1)
    x.relu_()
    return y.view_as(x) + x


def changed_under_a_view_and_read(x):
    y, before = x.flatten(1), x.sum()
    x.add_(x)
    return y.view_as(x) + before + x


def written(x):
    x[:, 0] = 1
    x[0] += 1
    return x


def added_to_itself(x):
    x += x
    return x


def read_then_changed(x):
    seen = x.sum()
    x.add_(1)
    return x - seen + x.sum() - x.numel()


def relu_after_reading(x):
    first = x.mean()
    F.relu(x, inplace=True)
    return x + first


def relu_of_a_copy_then_in_place(x):
    y = F.relu(x)
    x.relu_()
    return x + y


def pool_then_in_place(x):
    y = F.interpolate(F.max_pool2d(x, 2), scale_factor=2)
    x.relu_()
    return x + y


def old_value(x):
    y = x * 1
    x.mul_(0)
    return x + y


def written_through_numpy(x):
    x.numpy()[:, 0] = 1
    return torch.relu(x)


def written_through_data(x):
    x.data.clamp_(-0.1, 0.1)
    return x


def another_shape_in_place(x):
    x.unsqueeze_(0)
    return x[0] if x.dim() == 5 and len(x) == 1 else 1 / 0


def into_a_tensor_given(x):
    y = torch.empty(x.shape)
    z = torch.sigmoid(x, out=y).mul_(2)
    return y + z if z is y else 1 / 0


def gradients_inside(x):
    if torch.is_inference_mode_enabled():
        return x * 2
    with torch.enable_grad():
        x.requires_grad_()
        return torch.autograd.grad((x * x).sum(), x)[0] if x.requires_grad else 1 / 0


FUNCTIONS = [
    lambda x: x,
    written_through_numpy,
    written_through_data,
    another_shape_in_place,
    into_a_tensor_given,
    gradients_inside,
    lambda x: x if x.add_(1) is x and x.float() is x else 1 / 0,
    lambda x: x.reshape(shape=(len(x), -1)).view(size=x.shape),
    lambda x: torch.add(input=x, other=x).add_(other=x),
    lambda x: torch.vmap(lambda s: x * s)(torch.linspace(0, 1, 3 * 8).view(3, 1, 8, 1, 1)).sum(0),
    lambda x: x + torch.arange(12.0).view(1, 1, 1, 12),
    torch.relu,
    lambda x: x.relu(),
    lambda x: F.relu(x, inplace=True),
    nn.ReLU6(),
    nn.ReLU6(inplace=True),
    nn.Hardtanh(-0.2, 0.3),
    nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.ReLU6()),
    nn.Sequential(nn.MaxPool2d((2, 1), stride=(1, 2), padding=(1, 0)), nn.Hardtanh(-0.1, 0.1), nn.ReLU()),
    nn.MaxPool2d(2, ceil_mode=True),
    nn.MaxPool2d(2, dilation=2),
    lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    lambda x: x + x,
    lambda x: x + torch.relu(x),
    lambda x: torch.relu(x) + x,
    lambda x: x + x.mean((2, 3), keepdim=True),
    lambda x: x.mean((2, 3), keepdim=True) + x,
    lambda x: x * torch.sigmoid(x),
    lambda x: x * 0.5 + 1,
    lambda x: torch.add(x, x, alpha=2),
    lambda x: 1 - x,
    lambda x: torch.cat([x[:, :4], x[:, 4:]], 1),
    lambda x: x.flip(1),
    lambda x: x.reshape(x.size(0), 4, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    lambda x: torch.from_numpy(x.numpy().copy()),
    lambda x: torch.tensor(x.tolist()),
    lambda x: x.clone(),
    lambda x: x.detach().contiguous(memory_format=torch.channels_last),
    lambda x: x.double().float(),
    lambda x: copy.deepcopy(x),
    lambda x: pickle.loads(pickle.dumps(x)),
    lambda x: torch.stack(list(x)),
    lambda x: torch.where(x > 0, x, -x),
    lambda x: torch.ops.aten.abs(x),
    lambda x: F.dropout(x, 0.5, training=False),
    lambda x: F.batch_norm(x, torch.zeros(8), torch.full((8,), 2.0)),
    lambda x: torch.einsum("nchw->nchw", x),
    lambda x: x if x.shape[0] == 2 and x.dtype == torch.float32 and not x.requires_grad and x.dim() == 4 else 1 / 0,
    view_changed,
    changed_under_a_view,
    changed_under_a_view_and_read,
    written,
    added_to_itself,
    read_then_changed,
    relu_after_reading,
    relu_of_a_copy_then_in_place,
    pool_then_in_place,
    old_value,
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_function_of_the_floats_gives_what_it_gives_without_regions(function, layout, mode, monkeypatch):
    x = randn(2, 3, 10, 12).to(memory_format=layout)
    model = converted(Between(function), x)
    for layer in (model.first, model.second):  # floats are quantized where codes do not go straight on: equal bits
        layer.feeds_one_layer = False
    expected = module_by_module(model, x)
    pending = []
    of_convolution = RegionTensor.of_convolution

    def counted(*args, **kwargs):
        pending.append(1)
        return of_convolution(*args, **kwargs)

    monkeypatch.setattr(RegionTensor, "of_convolution", counted)
    with mode():
        actual = model(x)
    assert len(pending) >= 2
    assert type(actual) is torch.Tensor
    assert actual.stride() == expected.stride()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_straight_codes_do_not_depend_on_who_looks(function):
    x = randn(2, 3, 10, 12)
    model = converted(Between(function), x)
    with torch.no_grad():
        expected = model(x)
        seen = []
        model.first.register_forward_hook(lambda _m, _a, output: seen.append(output.sum()))
        model.second.register_forward_hook(lambda _m, _a, output: seen.append(output.detach().contiguous()))
        assert torch.equal(model(x), expected)
    assert all(type(value) is torch.Tensor for value in seen)


@pytest.mark.parametrize("function", [F.silu, torch.sigmoid, F.gelu, lambda x: F.adaptive_avg_pool2d(x, 1), F.elu])
def test_not_a_bit_depends_on_who_looks(function):
    x = randn(3, 3, 37, 41)
    model = converted(Between(function), x)
    with torch.no_grad():
        expected = model(x)
        model.second.register_forward_hook(lambda _m, _a, output: [output.sum(), None][1])
        assert torch.equal(model(x), expected)
