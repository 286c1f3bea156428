"""Group ``fake_quantize`` verifies numbers and both gradients before it times. No time is looked at."""

import pytest
import torch

from lightning_qat.recipes import _benchmark_fake_quantize
from lightning_qat.recipes._timing import Conditions


def test_wrong_numbers_are_not_timed(monkeypatch):
    monkeypatch.setattr(_benchmark_fake_quantize, "fake_quantize", lambda x, scale, axis: x)
    with pytest.raises(RuntimeError, match="differs from torch"):
        _benchmark_fake_quantize.fake_quantize_group(Conditions(1, size=8))


@pytest.mark.parametrize(("part", "message"), [(0, "the gradient of fake_quantize"), (1, "the scale's gradient")])
def test_wrong_gradients_are_not_timed(monkeypatch, part, message):
    right = _benchmark_fake_quantize.reference_fake_quantize_backward

    def wrong(*args):
        gradients = list(right(*args))
        gradients[part] = gradients[part] * 1.001
        return tuple(gradients)

    monkeypatch.setattr(_benchmark_fake_quantize, "reference_fake_quantize_backward", wrong)
    with pytest.raises(RuntimeError, match=message):
        _benchmark_fake_quantize.fake_quantize_group(Conditions(1, size=64))


def test_a_peer_of_fake_quantize_that_breaks_is_a_note(monkeypatch):
    def broken(values, scale):
        raise AttributeError("gone")

    monkeypatch.setattr(_benchmark_fake_quantize, "_torch_learned", broken)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    results = _benchmark_fake_quantize.fake_quantize_group(Conditions(1, size=64))
    assert results.notes == [
        "torch is not timed in fake_quantize backward, scale gradient: AttributeError: gone",
    ]
    assert [t.name for t in results.timings if "scale gradient" in t.group] == ["torch.compile", "lightning_qat"]


def test_without_a_compiler_the_rest_is_timed(monkeypatch):
    def compiled(function):
        def call(*args):
            raise RuntimeError("no compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    results = _benchmark_fake_quantize.fake_quantize_group(Conditions(1, size=64))
    assert results.notes == [
        "torch.compile is not timed in fake_quantize forward: RuntimeError: no compiler",
        "torch.compile is not timed in fake_quantize backward, scale gradient: RuntimeError: no compiler",
    ]
    assert {t.name for t in results.timings} == {"torch", "lightning_qat"}
