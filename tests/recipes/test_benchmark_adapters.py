"""The benchmark of products through packed weights that do not train."""

from __future__ import annotations

import pytest
import torch

from lightning_qat import QuantizedLinear
from lightning_qat.recipes import _benchmark_adapters as adapters
from lightning_qat.recipes._timing import Conditions


def test_every_form_is_timed_and_ours_keep_no_more_than_float():
    found = adapters.adapters_group(Conditions(rounds=1, size=256), tokens=(4, 8))
    groups = {timing.group for timing in found.timings}
    assert groups == {"adapters 256x256, 4 tokens", "adapters 256x256, 8 tokens"}
    names = [t.name for t in found.timings if t.group.endswith(" 4 tokens")]
    assert names[:4] == ["float", "lightning_qat, nf4", "lightning_qat, int4", "lightning_qat, int8"]
    assert "bitsandbytes, nf4" in names
    for timing in found.timings:
        if timing.name.startswith("lightning_qat"):
            assert timing.kept == 1.0, timing


def test_a_gradient_of_another_weight_is_not_timed(monkeypatch):
    plain = adapters._converted

    def wrong(layer, preset):
        made = plain(layer, preset)
        made.weight_in = lambda dtype: QuantizedLinear.weight_in(made, dtype) * 1.001
        return made

    monkeypatch.setattr(adapters, "_converted", wrong)
    monkeypatch.setattr(adapters, "_verify", lambda name, form, x, grad, check=adapters._verify: check(
        name, _Both(form), x, grad
    ))  # fmt: skip
    with pytest.raises(RuntimeError, match=r"lightning_qat, nf4: the gradient is 1\.0e-03 of its length"):
        adapters.adapters_group(Conditions(rounds=1, size=128), tokens=(4,))


class _Both(torch.nn.Module):
    """Computes with one weight and shows another."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)

    @property
    def weight(self):
        return QuantizedLinear.weight_in(self.form, torch.float32)


def test_a_peer_that_fails_is_left_out_with_its_reason(monkeypatch):
    def broken(layer):
        raise TypeError("no such thing\nand more")

    monkeypatch.setitem(adapters._BUILDERS, "a peer", ("torch", broken))
    monkeypatch.setitem(adapters._BUILDERS, "one that is not there", ("no_such_package", broken))
    found = adapters.adapters_group(Conditions(rounds=1, size=128), tokens=(4,))
    assert "a peer is not timed: TypeError: no such thing" in found.notes
    assert not any("not there" in text for text in (*found.notes, *(t.name for t in found.timings)))
