"""Scales that nothing before a Linear can take in: the Linear divides its input itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ptq_models import Bert, Llama, ViT, built, images, inputs_of, tokens
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.nn import QuantizedLinear
from lightning_qat.ptq import AWQOptions, SmoothingOptions
from lightning_qat.ptq.chosen import output_error

INT4 = lq.QuantizationPlan([lq.LayerRule("layers.*", lq.QuantizationConfig("int4", symmetric=False, group_size=8))])
OFF = lq.PTQOptions(awq=AWQOptions(keep_scales=False), smoothing=SmoothingOptions(keep_scales=False))


def quantized(method: str, plan: object = INT4, model: nn.Module | None = None, **arguments: object) -> nn.Module:
    return lq.quantize_model(model or built(Bert), plan, tokens(), method, **arguments)


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_layers_behind_gelu_and_norms_that_are_read_twice_lose_less(method: str) -> None:
    kept, unscaled = quantized(method), quantized(method, options=OFF)
    factors = [layer.input_factor for layer in kept.modules() if isinstance(layer, QuantizedLinear)]
    assert sum(factor is not None for factor in factors) >= 3
    assert all(m.input_factor is None for m in unscaled.modules() if isinstance(m, QuantizedLinear))
    model = built(Bert)
    first = model.layers[0].up  # both see the same input, that of the float model
    x = inputs_of(model, "layers.0.up")
    losses = []
    for made in (kept, unscaled):
        layer = made.layers[0].up
        weight = layer.weight if layer.input_factor is None else layer.weight * layer.input_factor
        losses.append(output_error(first.weight.detach(), weight, x.t() @ x))
        # What the report says is what the layer loses.
        outcome = next(o for o in lq.ptq_report(made).layers if o.name == "layers.0.up")
        assert outcome.loss == pytest.approx(losses[-1], rel=1e-3)
    assert losses[0] < 0.95 * losses[1]
    notes = {o.name: o.notes[0] for o in lq.ptq_report(kept).layers if o.notes}
    assert notes["layers.0.up"].startswith("scale kept at the input, ")
    assert ": 0." in notes["layers.0.up"]


@pytest.mark.parametrize("plan", ["int8", "int8_dynamic"])
def test_inputs_are_divided_before_they_are_quantized(plan: str) -> None:
    """Against the layer in float, on what the float model gives it."""
    model = built(Bert)
    x, expected = inputs_of(model, "layers.1.up"), model.layers[1].up(inputs_of(model, "layers.1.up"))
    errors = {}
    for options in (lq.PTQOptions(), OFF):
        # With fewer tokens calibrated ranges would cut more than dividing gains.
        made = lq.quantize_model(built(Bert), plan, tokens(16), "smoothquant", options=options)
        layer = made.layers[1].up
        errors[options is OFF] = float((layer(x) - expected).square().sum())
        if options is not OFF:
            assert layer.input_factor is not None
            step = layer.quantized_input(x) - x * layer.input_factor
            limit = (x * layer.input_factor).abs().amax() / 100
            assert float(step.abs().quantile(0.99)) < limit
    if plan == "int8_dynamic":  # the range of all tokens, with one beyond all others, is calibrated as ever
        assert errors[False] < 0.7 * errors[True]


def test_the_certificate_holds_and_quantization_aware_training_goes_on() -> None:
    made = quantized("awq+gptq", verify=True)
    report = lq.parity_report(made)
    assert report is not None
    assert report.passed
    prepared: nn.Module = quantized("awq", convert=False).train()
    same = lq.convert(copy.deepcopy(prepared))
    assert torch.equal(same(tokens()[0]), lq.convert(prepared)(tokens()[0]))
    before = {n: b.clone() for n, b in prepared.named_buffers() if n.endswith("input_factor")}
    assert before
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-2)
    for batch in tokens():
        optimizer.zero_grad()
        prepared(batch).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(b, before[n]) for n, b in prepared.named_buffers() if n in before)
    lq.convert(prepared.eval(), verify=tokens())
    again = lq.quantize_model(prepared, None, tokens(), "gptq")  # its scales are the grid, its factors stay
    for name, factor in before.items():
        assert torch.equal(
            again.get_submodule(name.removesuffix(".weight_quantizer.input_factor")).input_factor, factor
        )
    layer, x = prepared.layers[0].up, inputs_of(prepared, "layers.0.up")
    weights = [
        w.detach() * before["layers.0.up.weight_quantizer.input_factor"]
        for w in (layer.weight, again.layers[0].up.weight)
    ]
    outcome = next(o for o in lq.ptq_report(again).layers if o.name == "layers.0.up")
    assert outcome.loss == pytest.approx(output_error(*weights, x.t() @ x), rel=1e-3)


def test_where_all_scales_fold_none_is_kept() -> None:
    made = quantized("awq", model=built(Llama))
    assert all(layer.input_factor is None for layer in made.modules() if isinstance(layer, QuantizedLinear))


def test_the_attention_of_pytorch() -> None:
    model, batches = built(ViT), images()
    made = lq.quantize_model(model, "int8_dynamic", batches, "smoothquant", verify=True)
    report = lq.parity_report(made)
    assert report is not None
    assert report.passed
    kept = {n.removesuffix(".input_factor") for n, _ in made.named_buffers() if n.endswith(".input_factor")}
    # Its input projections are parts of one weight that other code may read.
    assert not any(name.endswith(("q_proj", "k_proj", "v_proj")) for name in kept)


def test_shared_weights_convolutions_and_own_forwards_are_left_out() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean(-1, keepdim=True)

    model = built(Bert, blocks=3)
    model.layers[2].up.weight = model.layers[0].up.weight
    own = Own(32, 16)
    own.load_state_dict(model.layers[2].down.state_dict())
    model.layers[2].down = own
    made = quantized("awq", model=model)
    for name in ("layers.0.up", "layers.2.up", "layers.2.down"):
        assert made.get_submodule(name).input_factor is None, name
    assert made.layers[1].up.input_factor is not None


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed_tensors", "bitsandbytes"])
def test_files_without_a_place_for_it_refuse(kind: str, tmp_path: Path) -> None:
    made = quantized("awq")
    with pytest.raises(ValueError, match=r"layer 'layers\.0\.\w+' multiplies .*keep_scales=False"):
        lq.export(made, tmp_path / "out", format=kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("plan", [INT4, "int8", "int8_dynamic"], ids=["int4", "int8", "int8_dynamic"])
def test_onnx_multiplies(plan: object, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    made = quantized("awq" if plan is INT4 else "smoothquant", plan)
    path = lq.export(made, tmp_path / "model.onnx", format="onnx", example=tokens()[0])
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    (found,) = session.run(None, {name: tokens()[1].numpy()})
    expected = made(tokens()[1])
    assert float((torch.from_numpy(found) - expected).abs().max()) < 0.05 * float(expected.abs().max())
    kept = [layer.input_factor for layer in made.modules() if isinstance(layer, QuantizedLinear)]
    held = {onnx.numpy_helper.to_array(i).tobytes() for i in onnx.load(path).graph.initializer}
    assert all(factor.numpy().tobytes() in held for factor in kept if factor is not None)
