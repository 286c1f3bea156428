"""Where scales fold, on models whose structure is known; each fold keeps the output with scales of any size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tensors import randn
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.ptq.channels import shared_parameters
from lightning_qat.ptq.folding import Fold, apply_fold, find_folds
from lightning_qat.ptq.watch import find_shared_inputs
from lightning_qat.transforms.phase import float_forward


class Feedforward(nn.Module):
    """Linear, something, Linear behind a norm and with a residual."""

    def __init__(self, activation: Callable[[Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.activation(self.first(self.norm(x))))


class Attention(nn.Module):
    """Grouped-query attention and a gated feed-forward part."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(16), nn.LayerNorm(16)
        self.fused = fused
        if fused:
            self.qkv, self.gate_up = nn.Linear(16, 32), nn.Linear(16, 48, bias=False)
        else:
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.out, self.down = nn.Linear(16, 16), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.qkv(h).split((16, 8, 8), -1) if self.fused else (self.q(h), self.k(h), self.v(h))
        heads = [t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*heads, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        gate, up = self.gate_up(h).chunk(2, -1) if self.fused else (self.gate(h), self.up(h))
        return x + self.down(F.silu(gate) * up)


class ShiftedNorm(nn.Module):
    """An RMSNorm that stores its weight less 1, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (16,)) * (1 + self.weight)


def folds_of(model: nn.Module, x: Tensor, **options: Any) -> dict[tuple[str, ...], Fold]:
    model.eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    groups = [shared.layers for shared in find_shared_inputs(layers, lambda: model(x))]
    return {fold.layers: fold for fold in find_folds(model, layers, groups, lambda: model(x), **options)}


def sources(found: dict[tuple[str, ...], Fold]) -> dict[str, str | None]:
    return {" ".join(names): fold.source.name if fold.source else None for names, fold in found.items()}


def check_output_stays(model: nn.Module, found: Sequence[Fold], x: Tensor) -> None:
    """Apply all folds with scales that are no powers of two."""
    expected, layers = model(x), dict(model.named_modules())
    for i, fold in enumerate(found):
        if fold.source is None:
            continue
        scales = (randn(len(fold.channels), seed=i)).exp()
        scales = scales if fold.tied is None else scales[fold.tied]
        before = [layers[name].weight.detach().clone() for name in fold.layers]
        apply_fold(fold, layers, scales)
        for name, weight in zip(fold.layers, before, strict=True):
            source = layers[name] is fold.source.module
            assert source or torch.equal(layers[name].weight, weight * scales)
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "homogeneous"),
    [
        (F.relu, True),
        (F.leaky_relu, True),
        (lambda x: x * 3, True),
        (F.gelu, False),
        (F.silu, False),
        (F.relu6, False),
        (lambda x: x + 1, False),
        (lambda x: x - x.mean(-1, keepdim=True), False),
    ],
)
def test_what_lies_between_two_linears_decides(activation: Callable[[Tensor], Tensor], homogeneous: bool) -> None:
    torch.manual_seed(0)
    model, x = Feedforward(activation), randn(2, 9, 16)
    found = folds_of(model, x)
    assert sources(found) == {"first": "norm", "second": "first" if homogeneous else None}
    check_output_stays(model, list(found.values()), x)


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.RMSNorm(16), nn.LayerNorm(16, bias=False), ShiftedNorm()])
def test_norms_take_scales_in(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = Feedforward(F.gelu, norm), randn(2, 9, 16)
    with torch.no_grad():
        norm.weight += randn(16) * 0.2
    found = folds_of(model, x)
    assert sources(found)["first"] == "norm"
    assert found[("first",)].source.offset == (1.0 if isinstance(norm, ShiftedNorm) else 0.0)
    check_output_stays(model, list(found.values()), x)


def test_heads_that_read_one_value_head_are_tied() -> None:
    torch.manual_seed(0)
    model, x = Attention(), randn(2, 9, 16)
    found = folds_of(model, x)
    assert sources(found) == {"q k v": "norm", "out": "v", "gate up": "norm2", "down": "up"}
    assert found[("out",)].channels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert found[("down",)].tied is None
    check_output_stays(model, list(found.values()), x)
    with pytest.raises(ValueError, match="come from one channel have different scales"):
        apply_fold(found[("out",)], dict(model.named_modules()), randn(16).exp())


def test_parts_of_fused_projections_are_found() -> None:
    torch.manual_seed(0)
    model, x = Attention(fused=True), randn(2, 9, 16)
    found = folds_of(model, x)
    assert sources(found) == {"qkv": "norm", "out": "qkv", "gate_up": "norm2", "down": "gate_up"}
    assert found[("out",)].channels.tolist() == [24 + c for c in (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7)]
    assert found[("down",)].channels.tolist() == list(range(24, 48))
    check_output_stays(model, list(found.values()), x)


class ReadTwice(Feedforward):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.second(self.activation(self.first(h)))


def test_a_second_reader_is_noticed() -> None:
    torch.manual_seed(0)
    found = folds_of(ReadTwice(F.gelu), randn(2, 9, 16))
    assert found[("first",)].source is None
    assert found[("first",)].reason == "'norm', which makes its inputs, is read by others too"


def test_shared_weights_stay() -> None:
    torch.manual_seed(0)
    model = Feedforward(F.relu)
    model.other = nn.Linear(16, 24)
    model.other.weight = model.first.weight
    found = folds_of(model, randn(2, 9, 16), untouchable=shared_parameters(model))
    assert found[("first",)].reason == "the weight of 'first' is used in several places"
    assert found[("second",)].source is None
    twice = nn.Sequential(norm := nn.LayerNorm(4), norm)
    assert shared_parameters(twice) == {id(norm.weight), id(norm.bias)}
    assert shared_parameters(Feedforward(F.relu)) == frozenset()


def test_nothing_changes_and_parameters_come_back() -> None:
    torch.manual_seed(0)
    model, x = Attention(), randn(2, 9, 16)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    folds_of(model, x)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, (p, _) in before.items()}
    assert all(torch.equal(parameter, value) for parameter, value in before.values())
    runs = iter(range(3))

    def fails() -> Tensor:
        if next(runs) == 2:
            raise RuntimeError("in the middle of a try")
        return model(x)

    layers = {"out": model.out}
    with pytest.raises(RuntimeError, match="in the middle"):
        find_folds(model, layers, [("out",)], fails)
    assert all(torch.equal(parameter, value) for parameter, value in before.values())
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, (p, _) in before.items()}


def test_scaling_replaces_parameters_and_never_writes_to_them() -> None:
    torch.manual_seed(0)
    model, x = Attention(), randn(2, 9, 16)
    sharing = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    check_output_stays(sharing, list(folds_of(sharing, x).values()), x)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_block_built_alike_takes_two_runs() -> None:
    torch.manual_seed(0)
    x, runs = randn(2, 9, 16), []
    found = list(folds_of(Attention(), x).values())
    other = Attention().eval()
    layers = {name: module for name, module in other.named_modules() if isinstance(module, nn.Linear)}

    def run() -> Tensor:
        runs.append(1)
        return other(x)

    for fold in found:
        fold.source.module._parameters.pop("weight", None)  # as where the other block is packed by now
    again = find_folds(other, layers, [fold.layers for fold in found], run, like=found)
    assert len(runs) == 2
    assert [fold.source.name for fold in again] == [fold.source.name for fold in found]
    assert all(fold.source.module is getattr(other, fold.source.name) for fold in again)
    different = ReadTwice(F.gelu).eval()
    likes = list(folds_of(Feedforward(F.relu), x).values())
    layers = {"first": different.first, "second": different.second}
    again = find_folds(different, layers, [("first",), ("second",)], lambda: different(x), like=likes)
    assert [fold.source for fold in again] == [None, None]


def test_a_prepared_model_is_tried_in_float() -> None:
    torch.manual_seed(0)
    model, x = Attention(), randn(2, 9, 16)
    expected = sources(folds_of(copy.deepcopy(model), x))
    lq.prepare(model, "int8")
    lq.calibrate(model, [x])
    assert sources(folds_of(model, x)) == expected
    assert model.q.weight_quantizer.quantizing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Attention().to(dtype), randn(2, 9, 16).to(dtype)
    assert sources(folds_of(model, x)) == {"q k v": "norm", "out": "v", "gate up": "norm2", "down": "up"}
    shifted = Feedforward(F.gelu, ShiftedNorm()).to(dtype)
    assert folds_of(shifted, x)[("first",)].source.offset == 1.0


class ReadBeside(Feedforward):
    def __init__(self) -> None:
        super().__init__(F.gelu)
        self.beside = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.second(self.activation(self.first(h))) + self.beside(h.mT).mT


@pytest.mark.parametrize("massive", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_second_reader_is_noticed_beside_massive_activations(dtype: torch.dtype, massive: float) -> None:
    torch.manual_seed(0)
    x = randn(2, 9, 16)
    x[..., 5] += massive  # so large that what the second reader makes is a small share of it
    (fold, _) = folds_of(ReadBeside().to(dtype), x.to(dtype)).values()
    assert fold.reason == "'norm', which makes its inputs, is read by others too"


class WithAttention(nn.Module):
    """``nn.MultiheadAttention`` behind a norm."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, bias, batch_first=True)
        if bias:
            self.attention.in_proj_bias.data += randn(48)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


@pytest.mark.parametrize("bias", [True, False])
def test_projections_that_are_parts_of_an_attention(bias: bool) -> None:
    torch.manual_seed(0)
    own, x = WithAttention(bias=bias), randn(2, 9, 16)
    model = copy.deepcopy(own, {id(p): p for p in own.parameters()})
    before = {name: p.detach().clone() for name, p in own.named_parameters()}
    lq.prepare(model, lq.QATConfig("int4", group_size=8, activation_bits=None))
    model.attention.calls_projections = True
    with float_forward(model):
        found = folds_of(model, x)
        assert sources(found) == {
            "attention.q_proj attention.k_proj attention.v_proj": "norm",
            "attention.out_proj": "attention.v_proj",
        }
        check_output_stays(model, list(found.values()), x)
    assert all(torch.equal(parameter, before[name]) for name, parameter in own.named_parameters())


def test_allowed_and_convolutions() -> None:
    torch.manual_seed(0)
    model, x = Feedforward(F.relu), randn(2, 9, 16)
    found = folds_of(model, x, allowed=lambda module: not isinstance(module, nn.Linear))
    assert sources(found) == {"first": "norm", "second": None}
    conv = nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)).eval()
    (fold,) = find_folds(conv, {"1": conv[1]}, [("1",)], lambda: conv(randn(2, 4, 5)))
    assert fold.reason == "'1' is a Conv1d; input channels of Linears are scaled"
    with pytest.raises(ValueError, match="the scale of '1' has nowhere to go: '1' is a Conv1d"):
        apply_fold(fold, {"1": conv[1]}, torch.ones(4))
