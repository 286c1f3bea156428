"""Tables and thresholds, with bitsandbytes' own tables and its quantizer beside every threshold as witness."""

from __future__ import annotations

import pytest
import torch
from ops import bitsandbytes_witness as witness

from lightning_qat.ops.codebook import choose_codes
from lightning_qat.ops.codebook_tables import (
    CODEBOOK_BITS,
    RULES,
    bin_codes,
    codebook,
    dynamic_tree_step_codes,
    nan_code,
    thresholds,
    zero_code,
)

FORMATS = [(name, rule) for name in CODEBOOK_BITS for rule in RULES]


@pytest.mark.parametrize("name", list(CODEBOOK_BITS))
def test_values_are_those_of_bitsandbytes(name: str) -> None:
    assert torch.equal(codebook(name, "cpu"), witness.table(name))


@pytest.mark.parametrize(("name", "rule"), FORMATS)
def test_bins_ascend_and_hold_their_own_value(name: str, rule: str) -> None:
    values = codebook(name, "cpu")[bin_codes(name, rule, "cpu").long()]
    limits = thresholds(name, rule, "cpu")
    assert bool((values.diff() >= 0).all())
    assert bool((limits.diff() >= 0).all())
    assert sorted(bin_codes(name, rule, "cpu").tolist()) == list(range(2 ** CODEBOOK_BITS[name]))
    chosen = codebook(name, "cpu")[choose_codes(values, name, rule).long()]
    # The 8-bit CPU rule takes what is nearest to the middle of a step, which is up to 1/65535 away from the value.
    slack = 2 / 65535 if (name, rule) == ("dynamic_tree", "cpu") else 0.0
    assert float((chosen - values).abs().max()) <= slack
    # Nor does the 8-bit CPU rule know 0.0: its nearest step is half a step above, and four values are nearer to that.
    assert int(choose_codes(torch.zeros(1), name, rule)) == (131 if slack else zero_code(name))
    assert int(choose_codes(torch.full((1,), torch.nan), name, rule)) == nan_code(name, rule)


@pytest.mark.parametrize("name", list(CODEBOOK_BITS))
def test_a_threshold_is_where_bitsandbytes_changes_its_mind(name: str) -> None:
    """Every float32 within 8 units in the last place of a threshold, in blocks whose absmax is 1.0."""
    bits = thresholds(name, "cpu", "cpu").view(torch.int32)
    near = torch.cat([(bits + step).view(torch.float32) for step in range(-8, 9)])
    near = torch.cat((near, thresholds(name, "cpu", "cpu"), torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-149)])))
    near = near[near.abs() <= 1]
    x = torch.ones(-(-len(near) // 63), 64)  # a block is 63 of them and a 1.0
    x[:, :63] = torch.nn.functional.pad(near, (0, -len(near) % 63)).view(-1, 63)
    stored, absmax = witness.quantize(x, name, 64)
    assert bool((absmax == 1).all())
    codes = stored if name == "dynamic_tree" else witness.split(stored, x.numel())
    assert torch.equal(choose_codes(x.view(-1), name, "cpu"), codes)


def test_the_8_bit_cpu_rule_is_the_table_of_steps() -> None:
    x = torch.linspace(-1, 1, 400_001)
    steps = ((x + 1) * 0.5 * 65535 + 0.5).int()
    assert torch.equal(choose_codes(x, "dynamic_tree", "cpu"), dynamic_tree_step_codes()[steps])


def cuda_fp4(x: float) -> int:
    """bitsandbytes' CUDA decision tree, in Python."""
    sign, x = (8 if x < 0 else 0), abs(x)

    def above(constant: float) -> bool:
        return x > torch.tensor(constant).item()  # float32 constants

    if above(0.29166667):
        if above(0.583333):
            return sign + (3 if above(0.8333333) else 2)
        return sign + (5 if above(0.4166667) else 4)
    if above(0.0859375):
        return sign + (7 if above(0.20833333) else 6)
    return sign + (1 if above(0.00260417) else 0)


def cuda_dynamic_tree(x: float, code: list[float]) -> int:
    """bitsandbytes' CUDA search, in Python."""
    pivot, upper_pivot, lower_pivot = 127, 255, 0
    value, step = code[pivot], 64
    while step:
        if x > value:
            lower_pivot, pivot = pivot, pivot + step
        else:
            upper_pivot, pivot = pivot, pivot - step
        value, step = code[pivot], step // 2
    if x > value:
        middle = ((torch.tensor(code[upper_pivot]) + torch.tensor(value)) * 0.5).item()
        return upper_pivot if x > middle else pivot
    middle = ((torch.tensor(code[lower_pivot]) + torch.tensor(value)) * 0.5).item()
    return lower_pivot if x < middle else pivot


@pytest.mark.parametrize("name", ["fp4", "dynamic_tree"])
def test_the_cuda_rule_is_the_decision_tree_of_the_kernel(name: str) -> None:
    bits = thresholds(name, "cuda", "cpu").view(torch.int32)
    near = torch.cat([(bits + step).view(torch.float32) for step in (-1, 0, 1, 2)])
    x = torch.cat(
        (near[near.abs() <= 1], torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-149), 1.0, -1.0]), torch.randn(500))
    )
    x = x.clamp(-1, 1)
    if name == "fp4":
        expected = [cuda_fp4(v) for v in x.tolist()]
    else:
        expected = [cuda_dynamic_tree(v, codebook(name, "cpu").tolist()) for v in x.tolist()]
    assert choose_codes(x, name, "cuda").tolist() == expected


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'nf4', 'fp4', 'dynamic_tree'"):
        codebook("nf3", "cpu")
    with pytest.raises(ValueError, match="'cpu', 'cuda'"):
        thresholds("nf4", "gpu", "cpu")
