"""What backward needs is made again instead of kept, and gives the same gradients bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import lightning_qat as lq


def network():
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((3, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 256, 10))


def kept_bytes(model, x):
    model(x)
    with profile(profile_memory=True) as recorded:
        output = model(x)
    assert output.requires_grad
    return sum(event.self_cpu_memory_usage for event in recorded.key_averages())


@pytest.mark.parametrize("plan", ["int8", "w4a8", "int8_dynamic", "int8_weight_only"])
def test_a_training_forward_keeps_what_float_keeps(plan):
    x = torch.randn(32, 3, 16, 16)
    model = network()
    in_float = kept_bytes(model, x)
    assert in_float > 3 * 2 * 32 * 16 * 256 * 4  # the witness: two activations a layer, as plain PyTorch keeps them
    lq.prepare(model, plan)
    assert kept_bytes(model, x) < 1.02 * in_float


class Attending(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(64), nn.MultiheadAttention(64, 2, batch_first=batch_first)

    def forward(self, x):
        normed = self.norm(x)
        return x + self.attention(normed, normed, normed, need_weights=False)[0]


@pytest.mark.parametrize("plan", ["int8", "w4a8", "int8_weight_only"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attention_keeps_what_float_keeps(plan, batch_first):
    """Witness: the inputs are transposed where the batch comes first, and a product of these copies them."""
    model = Attending(batch_first)
    x = torch.randn(8, 32, 64)
    in_float = kept_bytes(model, x)
    lq.prepare(model, plan)
    assert kept_bytes(model, x) < 1.05 * in_float


def gradients(model, x, run=lambda model, x: model(x)):
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    run(model, x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


LAYERS = [nn.Linear(6, 5), nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3, groups=2, stride=2), nn.ConvTranspose2d(6, 4, 3)]
GROUPS = lq.QATConfig("int4", group_size=3, activation_bits=None)
CASES = [
    *((layer, plan) for layer in LAYERS for plan in ("int8", "w4a8", "int8_dynamic")),
    *((layer, GROUPS) for layer in LAYERS[:3]),  # transposed convolutions have no groups
]


@pytest.mark.parametrize(("layer", "plan"), CASES)
def test_gradients_equal_those_of_kept_tensors(layer, plan):
    model = lq.prepare(nn.Sequential(copy.deepcopy(layer)), plan)
    shape = {nn.Linear: (2, 3, 6), nn.Conv1d: (2, 6, 9)}.get(type(layer), (2, 6, 9, 9))
    x = torch.randn(shape)
    model(x)
    model[0].weight_quantizer.observing = False
    if model[0].input_quantizer is not None:
        model[0].input_quantizer.observing = False
    ours = gradients(model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # other hooks come first: all is kept
        kept = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))


def test_channels_last_and_half_precision():
    model = lq.prepare(nn.Sequential(nn.Conv2d(6, 4, 3)), "int8").to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 9, 9).to(memory_format=torch.channels_last)
    model(x)
    model[0].input_quantizer.observing = False
    for dtype in (torch.float32, torch.bfloat16):
        ours = gradients(model.to(dtype), x.to(dtype))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            kept = gradients(model, x.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))


def test_a_change_in_place_is_told_as_pytorch_tells_it():
    model = lq.prepare(nn.Sequential(nn.Linear(4, 4)), "int8")
    x = torch.randn(2, 4)
    loss = model(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="layer '0' quantizes was changed in place"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    model = lq.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "int8")
    x = torch.randn(3, 4)
    model(x)
    lq.apply_phase(model, lq.Phase(observing=False))
    plain = gradients(model, x)
    again = gradients(model, x, lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_backward_twice_and_through_a_shared_layer():
    layer = lq.QATLinear(nn.Linear(4, 4), "int8")
    x = torch.randn(3, 4)
    loss = F.relu(layer(F.relu(layer(x)))).sum()
    first = torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, layer.weight)[0])


def test_inference_and_no_grad_keep_nothing():
    model = lq.prepare(nn.Sequential(nn.Linear(4, 4)), "int8")
    x = torch.randn(2, 4)
    expected = model(x).detach()
    model.eval()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(model(x.clone()), expected)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_range_that_moves_before_backward_does_not_reach_it(needs_grad):
    model = lq.prepare(nn.Sequential(nn.Linear(5, 4)), "int8")
    x = torch.randn(3, 5, requires_grad=needs_grad)
    model(x)
    model.eval()
    expected = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    loss = model(x).square().sum()
    model.train()
    model(x.detach() * 50)
    assert torch.equal(torch.autograd.grad(loss, model[0].weight)[0], expected)


@pytest.mark.parametrize("plan", ["int8", "int8_weight_only"])
def test_vmap_maps_prepared_and_converted_layers(plan):
    model = lq.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), plan)
    x = torch.randn(2, 5, 3, 4, 4)
    lq.calibrate(model, [x[0]])
    model.eval()
    for each in (model, lq.convert(model)):
        with torch.no_grad():
            mapped, looped = torch.func.vmap(each)(x), torch.stack([each(part) for part in x])
        torch.testing.assert_close(mapped, looped, rtol=1e-4, atol=1e-5)
