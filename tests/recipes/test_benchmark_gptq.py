"""Group ``gptq`` compares values and losses with the peer's before it times."""

import importlib.util

import pytest
import torch

from lightning_qat.recipes import _benchmark_gptq
from lightning_qat.recipes._benchmark_gptq import PEER, gptq_group, layer_of, verify
from lightning_qat.recipes._timing import Conditions

CPU = torch.device("cpu")


@pytest.fixture
def no_peer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_both_sets_of_options_are_timed_with_the_sqnr_of_their_outputs(no_peer):
    results = gptq_group(Conditions(1), sides=(128, 256))
    assert [(t.group.split(",")[0], t.name) for t in results.timings] == [
        ("gptq 128 x 128", "lightning_qat"),
        ("gptq 128 x 128", "lightning_qat, compared with nearest"),
        ("gptq 128 x 128", "lightning_qat, defaults"),
        ("gptq 256 x 256", "lightning_qat"),
        ("gptq 256 x 256", "lightning_qat, compared with nearest"),
        ("gptq 256 x 256", "lightning_qat, defaults"),
    ]
    assert results.notes == []
    for published, compared, refined in zip(*(results.timings[i::3] for i in range(3)), strict=True):
        assert compared.sqnr_db == published.sqnr_db
        assert refined.sqnr_db > published.sqnr_db + 0.3 > 20
        assert published.ratio == 1.0


def test_the_size_of_the_settings_is_the_only_side(no_peer):
    assert {t.group.split(",")[0] for t in gptq_group(Conditions(1, size=128)).timings} == {"gptq 128 x 128"}


def test_another_result_than_the_peers_is_not_timed():
    layer = layer_of(128, CPU)
    verify(layer, layer.weight, layer.weight + 1e-9)
    few = layer.weight.clone()
    few[:1] += 0.01
    with pytest.raises(RuntimeError, match=r"lightning_qat has 99\.22 % of gptqmodel's values and .* not timed"):
        verify(layer, few, layer.weight + 1e-9)


@pytest.fixture
def broken_peer(monkeypatch):
    def broken(layer):
        raise RuntimeError("no such layer\nand a page more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_benchmark_gptq, "peer_of", broken)


def test_a_peer_that_fails_is_a_note(broken_peer):
    results = gptq_group(Conditions(1), sides=(128,))
    assert [t.name for t in results.timings] == [
        "lightning_qat", "lightning_qat, compared with nearest", "lightning_qat, defaults",
    ]  # fmt: skip
    assert results.notes == [f"{PEER} is not timed for GPTQ of 128 x 128: RuntimeError: no such layer"]


@pytest.fixture
def same_peer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_benchmark_gptq, "peer_of", lambda layer: lambda: published(layer))


def published(layer):
    fmt = _benchmark_gptq.TensorFormat("gptq", 4, True, group_size=128)
    options = _benchmark_gptq.GPTQOptions.published()
    return _benchmark_gptq.choose_gptq(layer.weight, layer.gram, fmt, options).values()


def test_the_peer_is_the_baseline(same_peer):
    results = gptq_group(Conditions(1), sides=(128,))
    assert [t.name for t in results.timings] == [
        PEER, "lightning_qat", "lightning_qat, compared with nearest", "lightning_qat, defaults",
    ]  # fmt: skip
    assert results.timings[0].ratio == 1.0
    assert results.timings[0].sqnr_db == results.timings[1].sqnr_db
