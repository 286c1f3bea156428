"""Observers: what they keep, load, cast and compile."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import pytest
import torch
from tensors import DTYPES, randn
from torch import Tensor, nn

from lightning_qat.config import OBSERVER_NAMES
from lightning_qat.quantizers.observers import (
    Observer,
    make_observer,
)

if TYPE_CHECKING:
    pass

HISTOGRAMS = ("percentile", "histogram", "mse")


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_state_loads_strictly_between_fresh_and_used(name: str, channels: int | None) -> None:
    used, other = (make_observer(name, num_channels=channels, axis=1) for _ in range(2))
    fresh = make_observer(name, num_channels=channels, axis=1)
    for seed in range(3):
        used.update(randn(9, 3, seed=seed) * 5**seed)
    other.load_state_dict(used.state_dict(), strict=True)
    for symmetric, bits in ((True, 8), (False, 4)):
        for mine, theirs in zip(
            used.get_quantization_params(symmetric, bits), other.get_quantization_params(symmetric, bits), strict=True
        ):
            assert torch.equal(mine, theirs)
    used.update(randn(9, 3, seed=9) * 1000)
    other.update(randn(9, 3, seed=9) * 1000)
    for key, value in used.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    other.load_state_dict(fresh.state_dict(), strict=True)
    assert not other.observed
    with pytest.raises(ValueError, match="saw no data"):
        other.get_quantization_params(True, 8)


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_a_float_checkpoint_leaves_the_state_and_half_of_it_is_reported(name: str) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "observer": make_observer(name)})
    weights = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
    model.load_state_dict(weights, strict=True)
    partial = {key: value for key, value in model.state_dict().items() if key != "observer.max_val"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "observer\.max_val"'):
        model.load_state_dict(partial, strict=True)


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_reset_is_fresh(name: str) -> None:
    observer, fresh = make_observer(name, num_channels=2), make_observer(name, num_channels=2)
    observer.update(randn(2, 30))
    observer.range()
    observer.reset()
    assert not observer.observed
    for key, value in fresh.state_dict().items():
        assert torch.equal(observer.state_dict()[key], value)
    with pytest.raises(ValueError, match="saw no data"):
        observer.range()
    fresh.update(randn(2, 30, seed=1))
    observer.update(randn(2, 30, seed=1))
    assert torch.equal(observer.range()[0], fresh.range()[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_a_cast_of_the_model_leaves_the_statistics(name: str, dtype: torch.dtype) -> None:
    observer = make_observer(name)
    model = nn.Sequential(nn.Linear(2, 2), observer)
    observer.update(torch.tensor([-1.2345678, 0.1, 7.6543211]))
    before = copy.deepcopy(observer.state_dict())
    for cast in (model.to(dtype), model.to(device="cpu", dtype=dtype), model.type(dtype)):
        assert cast[0].weight.dtype == dtype
        for key, value in observer.state_dict().items():
            assert value.dtype == before[key].dtype
            assert torch.equal(value, before[key])
    observer.update(torch.tensor([9.0], dtype=dtype))
    assert observer.max_val.dtype == torch.float32


@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_a_default_dtype_or_device_shows_in_the_device_only(name: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = make_observer(name, num_channels=3)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in make_observer(name, num_channels=3).state_dict().items():
        assert built.state_dict()[key].dtype == value.dtype
    with torch.device("meta"):
        empty = make_observer(name)
    empty.to_empty(device="cpu").reset()
    empty.update(randn(10))
    assert empty.observed


# --- compiled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_updates_trace_as_one_graph(name: str, channels: int | None) -> None:
    torch._dynamo.reset()
    eager, traced = (make_observer(name, num_channels=channels, axis=1) for _ in range(2))
    step = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        x = randn(6, 3, 4, seed=seed) * 3.0**seed
        eager(x)
        assert torch.equal(step(x), x)
    for key, value in eager.state_dict().items():
        assert torch.equal(traced.state_dict()[key], value)


@pytest.mark.parametrize("name", ["min_max", "moving_average"])
def test_a_step_of_training_traces_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    eager, traced = make_observer(name), make_observer(name)

    def step(observer: Observer, x: Tensor) -> tuple[Tensor, Tensor]:
        observer.update(x)
        return observer.get_quantization_params(False, 8)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x = randn(5, 7, seed=seed)
        for ours, theirs in zip(compiled(traced, x), step(eager, x), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("name", OBSERVER_NAMES)
def test_what_a_compiled_update_may_not_look_at_is_found_later(name: str, channels: int | None, bad: float) -> None:
    torch._dynamo.reset()
    observer = make_observer(name, num_channels=channels, layer_name="head")
    step = torch.compile(observer, backend="aot_eager", fullgraph=True)
    for batch in (randn(2, 8), torch.full((2, 8), bad), randn(2, 8), randn(2, 8)):
        step(batch)
    for read in (observer.check_finite, observer.range, lambda: observer.get_quantization_params(True, 8)):
        with pytest.raises(ValueError, match=r"layer 'head' observed (NaN|inf)"):
            read()
