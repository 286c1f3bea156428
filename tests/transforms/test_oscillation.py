"""How often weights flip, against the paper's algorithm written for one weight at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_qat as lq
from lightning_qat.ops.fake_quantize import quant_range
from lightning_qat.transforms.oscillation import (
    LayerOscillation,
    add_dampening_gradient,
    codes_now,
    has_ordered_codes,
    hold_frozen,
    untouchable_ends,
)
from lightning_qat.transforms.penalty import matched_layers


class OneWeight:
    """Algorithm 1 of Nagel et al. 2022, without tensors."""

    def __init__(self, code):
        self.code, self.average = code, float(code)
        self.last = self.frequency = 0
        self.frozen = False

    def step(self, code, momentum, threshold, ends):
        code = self.code if self.frozen else code
        oscillates = 0
        if code != self.code:
            sign = 1 if code > self.code else -1
            oscillates = int(self.last != 0 and sign != self.last)
            self.last = sign
        self.frequency = momentum * oscillates + (1 - momentum) * self.frequency
        self.average = momentum * code + (1 - momentum) * self.average
        self.code = code
        if threshold is not None and not self.frozen and self.frequency > threshold:
            target = round(self.average)
            if ends is None or ends[0] < target < ends[1]:
                self.frozen, self.code = True, target


@given(
    seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8, 9, 16]), symmetric=st.booleans(),
    momentum=st.sampled_from([0.01, 0.2, 1.0]), threshold=st.sampled_from([None, 0.02, 0.3]), free_ends=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_it_is_the_algorithm_of_the_paper(seed, bits, symmetric, momentum, threshold, free_ends):
    low, high = quant_range(bits, symmetric)
    ends = None if free_ends else (low, high)
    dtype = torch.int8 if bits <= 8 and symmetric else torch.uint8 if bits <= 8 else torch.int32
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randint(low, min(low + 4, high) + 1, (3, 4), generator=generator).to(dtype) for _ in range(20)]
    if seed % 2:
        steps[5] = torch.full((3, 4), high).to(dtype)  # as far as it goes: no overflow
    state = LayerOscillation(steps[0], bits, freezing=threshold is not None)
    witness = [OneWeight(code) for code in steps[0].flatten().tolist()]
    for codes in steps[1:]:
        state.observe(codes, momentum)
        if threshold is not None:
            state.freeze(threshold, ends)
        for weight, code in zip(witness, codes.flatten().tolist(), strict=True):
            weight.step(code, momentum, threshold, ends)
        assert state.codes.flatten().tolist() == [weight.code for weight in witness]
        assert state.direction.flatten().tolist() == [weight.last for weight in witness]
        expected = torch.tensor([weight.frequency for weight in witness]).reshape(3, 4)
        torch.testing.assert_close(state.frequency, expected.float(), rtol=1e-5, atol=1e-7)
        if threshold is not None:
            assert state.frozen.flatten().tolist() == [weight.frozen for weight in witness]
    again = LayerOscillation.from_state_dict(state.state_dict(), freezing=threshold is not None)
    assert again.state_dict().keys() == state.state_dict().keys()
    held = sum(t.numel() * t.element_size() for t in state.state_dict().values() if isinstance(t, torch.Tensor))
    code_bytes = steps[0].element_size()
    assert held == 12 * (code_bytes + 5 + (5 if threshold is not None else 0))  # 6 or 11 bytes up to 8 bits


def layer(bits=3, symmetric=True, dtype=torch.float64, config=None):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 6)).to(dtype)
    default = lq.QATConfig("int8", bits=bits, symmetric=symmetric, activation_bits=None)
    return lq.prepare(made, config or default)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_dampening_gradient_is_autograds(symmetric, frozen):
    made = layer(symmetric=symmetric)
    quantizer = made[0].weight_quantizer
    lq.apply_phase(made, lq.Phase(frozen=frozen))
    if frozen:
        with torch.no_grad():
            made[0].weight *= 1.5  # beyond the grid that stands still
    weight = made[0].weight
    scale, zero = (t.double() for t in quantizer.parameters_for(weight.detach()))
    low, high = quant_range(3, symmetric)
    quantized = made[0].quantized_weight().detach()
    clipped = torch.minimum(torch.maximum(weight, (low - zero) * scale), (high - zero) * scale)
    loss = 0.7 * (quantized - clipped).square().sum()
    (wanted,) = torch.autograd.grad(loss, weight)
    add_dampening_gradient(matched_layers(made), 0.7)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-6, atol=1e-8)
    assert (wanted == 0).any()
    assert (wanted != 0).any()
    assert (weight.detach()[wanted == 0] != quantized[wanted == 0]).any()  # beyond the grid, and left alone


def test_frozen_weights_stay_at_their_code_while_the_scale_moves():
    made = layer(dtype=torch.float32)
    state = LayerOscillation(codes_now(made[0]), 3, freezing=True)
    ends = untouchable_ends(made[0].weight_quantizer)
    assert ends == (-4, 3)
    assert not (state.codes == -4).all()
    state.frequency.fill_(1.0)
    state.freeze(0.5, ends)
    inside = (state.codes > -4) & (state.codes < 3)
    assert torch.equal(state.frozen, inside)
    assert inside.any()
    assert not inside.all()
    codes, largest = state.codes.clone(), made[0].weight.detach().abs().max()
    for step in range(50):
        with torch.no_grad():
            made[0].weight += 0.01 * torch.randn(6, 16) * inside
            made[0].weight[~inside] *= 1.0 + 0.002 * (step % 3)
        hold_frozen(made[0], state)
        assert torch.equal(codes_now(made[0])[inside], codes[inside])
    # Frozen at their grid point, extremes would take the scale with them, by 3/3.5 in each step.
    assert made[0].weight.detach().abs().max() >= largest
    lq.apply_phase(made, lq.Phase(frozen=True))
    assert untouchable_ends(made[0].weight_quantizer) is None


def test_codes_without_an_order_and_states_without_averages():
    assert not has_ordered_codes(layer(config=lq.QuantizationConfig("nf4"), dtype=torch.float32)[0])
    assert has_ordered_codes(layer()[0])
    state = LayerOscillation(torch.zeros(3, dtype=torch.int8), 3, freezing=False)
    with pytest.raises(ValueError, match="freezing=True"):
        state.freeze(0.1, None)
    kept = LayerOscillation.from_state_dict(state.state_dict(), freezing=True)
    assert torch.equal(kept.average, torch.zeros(3))
