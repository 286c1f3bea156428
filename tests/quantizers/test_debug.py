"""Debug callbacks see what quantizers do and change nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import lightning_qat as lq


def prepared() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(32, 16)
    lq.calibrate(lq.prepare(model, "w4a8"), [x])
    return model, x


def test_every_quantizer_is_seen_once_a_forward() -> None:
    model, x = prepared()
    expected, events = model.eval()(x), []
    with lq.debug_quantizers(model, events.append):
        seen = model(x)
    assert torch.equal(seen, expected)
    assert [(e.layer, e.tensor, e.call) for e in events] == [
        ("0", "input", 1), ("0", "weight", 1), ("2", "input", 1), ("2", "weight", 1),
    ]  # fmt: skip
    assert events[1].format.bits == 4
    assert torch.equal(events[1].before, model[0].weight)
    assert torch.equal(events[1].after, model[0].quantized_weight())
    noise = (model[0].weight - model[0].quantized_weight()).double().square().sum()
    assert events[1].sqnr_db == pytest.approx(float(10 * torch.log10(model[0].weight.double().square().sum() / noise)))
    assert "tensor(" not in repr(events[1])  # a line to print, not the weights
    assert "layer='0'" in repr(events[1])
    model(x)
    assert len(events) == 4


def test_training_with_a_callback_is_training_without() -> None:
    plain, x = prepared()
    debugged, _ = prepared()
    handle = lq.debug_quantizers(debugged, lambda event: event.sqnr_db)
    for model in (plain, debugged):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    handle.remove()
    for a, b in zip(plain.state_dict().values(), debugged.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert debugged[0].weight_quantizer.debug_callback is None


def test_an_embedding_is_seen() -> None:
    plan = lq.QuantizationPlan([lq.LayerRule("*", "int8_weight_only")])
    model, events = lq.prepare(nn.Sequential(nn.Embedding(10, 4)), plan), []
    with lq.debug_quantizers(model, events.append):
        model(torch.tensor([1, 2]))
    assert [(e.tensor, tuple(e.before.shape)) for e in events] == [("weight", (2, 4))]


def test_the_log_grows_with_the_logarithm_of_calls(caplog: pytest.LogCaptureFixture) -> None:
    model, x = prepared()
    with caplog.at_level(logging.INFO, "lightning_qat.debug"), lq.debug_quantizers(model):
        for _ in range(9):
            model(x)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("2 weight")]
    assert [line.split("call ")[1].split(":")[0] for line in lines] == ["1", "2", "4", "8"]
    assert "int4 4 bits" in lines[0]
    assert "SQNR" in lines[0]


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has no quantizer"):
        lq.debug_quantizers(nn.Linear(2, 2))


SCRIPT = """
import torch, lightning_qat as lq
from torch import nn
model = lq.prepare(nn.Sequential(nn.Linear(4, 4)), "int8_weight_only")
model(torch.randn(2, 4))
"""


@pytest.mark.parametrize(("value", "lines"), [("1", 1), ("0", 0)])
def test_the_environment_variable(value: str, lines: int) -> None:
    environment = {**os.environ, "LIGHTNING_QAT_DEBUG": value}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("lightning_qat.debug: 0 weight (4, 4), call 1: int8 8 bits") == lines
