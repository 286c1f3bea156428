"""Activation order without static groups: groups of columns that do not lie together, in a model and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ptq_models import Bert, Llama, built, inputs_of, tokens
from torch import nn

import lightning_qat as lq
from lightning_qat.nn import QuantizedLinear
from lightning_qat.ptq.chosen import output_error
from lightning_qat.ptq.gptq import GPTQOptions, choose_ordered
from lightning_qat.schemes import weight_format

CONFIG = lq.QuantizationConfig("int4", symmetric=False, group_size=8)
PLAN = lq.QuantizationPlan([lq.LayerRule("layers.*", CONFIG)])
OPTIONS = lq.PTQOptions(gptq=GPTQOptions.published(static_groups=False))


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_a_model_holds_what_the_algorithm_chose(method: str) -> None:
    model = built(Bert)
    made = lq.quantize_model(model, PLAN, tokens(), method, options=OPTIONS, verify=True)
    report = lq.parity_report(made)
    assert report is not None
    assert report.passed
    layer, x = made.layers[0].up, inputs_of(model, "layers.0.up")
    assert torch.equal(layer.input_order.sort().values, torch.arange(16))
    factor = torch.ones(16) if layer.input_factor is None else layer.input_factor
    if method == "awq+gptq":
        assert layer.input_factor is not None
    # The algorithm by itself, on the weight and inputs with features divided as the layer does it.
    scale = torch.empty(16).index_copy_(0, layer.input_order, factor.reciprocal())
    weight, seen = model.layers[0].up.weight.detach() * scale, x.double() / scale
    chosen = choose_ordered(weight, (seen.t() @ seen).float(), weight_format(CONFIG, weight.shape), OPTIONS.gptq)
    assert torch.equal(layer.input_order, chosen.order)
    assert float((layer.codes == chosen.codes).float().mean()) > 0.99
    # What it computes is what the report says it loses.
    lost = (layer(x) - model.layers[0].up(x)).double().square().sum()
    assert lq.ptq_report(made).layer("layers.0.up").loss == pytest.approx(float(lost), rel=1e-2)


def test_the_single_tensor_is_the_same() -> None:
    model = built(Bert)
    x, weight = inputs_of(model, "layers.0.up"), model.layers[0].up.weight.detach()
    made = lq.quantize_model(model, PLAN, tokens(), "gptq", options=OPTIONS)
    quantizer = lq.GPTQQuantizer(CONFIG, OPTIONS.gptq)
    tensor = quantizer.quantize(weight, x.t() @ x)
    layer = made.layers[0].up
    whole = torch.empty_like(layer.weight).index_copy_(1, layer.input_order, layer.weight)
    losses = [output_error(weight, w, x.t() @ x) for w in (whole, tensor.dequantize())]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_it_is_saved_trained_on_and_quantized_again(tmp_path: Path) -> None:
    made = lq.quantize_model(built(Bert), PLAN, tokens(), "gptq", options=OPTIONS)
    lq.save_quantized(made, tmp_path / "saved")
    loaded = lq.load_quantized(tmp_path / "saved", built(Bert))
    assert torch.equal(loaded(tokens()[0]), made(tokens()[0]))
    journal = lq.quantize_model(built(Bert), PLAN, tokens(), "gptq", options=OPTIONS, journal=tmp_path / "journal")
    restored = lq.quantize_model(built(Bert), PLAN, tokens(), "gptq", options=OPTIONS, journal=tmp_path / "journal")
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, journal.state_dict()[name])
        assert torch.equal(tensor, restored.state_dict()[name])
    prepared = lq.quantize_model(built(Bert), PLAN, tokens(), "gptq", options=OPTIONS, convert=False)
    assert torch.equal(lq.convert(prepared)(tokens()[0]), made(tokens()[0]))
    again = lq.quantize_model(prepared, None, tokens(), "gptq", options=OPTIONS)  # a given grid: groups stay
    assert torch.equal(again.layers[0].up.input_order, made.layers[0].up.input_order)
    assert float((again.layers[0].up.codes == made.layers[0].up.codes).float().mean()) > 0.99


def test_layers_that_cannot_are_named() -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(4, 8))

    plan = lq.QuantizationPlan([lq.LayerRule(nn.Conv2d, CONFIG)])
    with pytest.raises(ValueError, match=r"which only a plain Linear can hold; use static_groups=True"):
        lq.quantize_model(Net(), plan, [torch.randn(3, 8, 2, 2)], "gptq", options=OPTIONS)


def test_only_files_with_a_place_for_it_hold_it(tmp_path: Path) -> None:
    made = lq.quantize_model(built(Llama), PLAN, tokens(), "gptq", options=OPTIONS)
    assert all(layer.input_order is not None for layer in made.modules() if isinstance(layer, QuantizedLinear))
    for kind in ("awq", "compressed_tensors"):
        with pytest.raises(ValueError, match=r"layer 'layers\.0\.\w+' takes its input features in an input_order"):
            lq.export(made, tmp_path / kind, format=kind)
    runtime = pytest.importorskip("onnxruntime")
    path = lq.export(made, tmp_path / "model.onnx", format="onnx", example=tokens()[0])
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens()[1].numpy()})
    assert torch.allclose(torch.from_numpy(found), made(tokens()[1]), rtol=1e-3, atol=1e-4)
