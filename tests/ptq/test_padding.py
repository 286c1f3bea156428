"""Codes that are chosen with padded batches are those of the same sentences one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from padded import WORDS, found_padding, one_by_one, padded, sentences, tiny_bert, tiny_llama, tiny_t5
from safetensors.torch import save_model
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.ptq import gram_sensitivity, measure_sensitivity
from lightning_qat.ptq.watch import find_shared_inputs, gather_statistics
from lightning_qat.transforms.prepare import qat_layers

pytest.importorskip("transformers")
W4 = lq.QuantizationConfig("int4", group_size=16)
PARTS = sentences(5, 16, 9, 12, 3, 7)


def batches(*, left: bool = False) -> list[dict[str, Tensor]]:
    return [padded(PARTS[:4], left=left), padded(PARTS[4:], left=left, to=12)]


def statistics(model: nn.Module, given: list[Any], *, leave_out: bool) -> Any:
    padding, _ = found_padding(model, *given)
    layers = dict(qat_layers(model))
    runs = [lambda batch=batch: padding.run(batch) for batch in given]
    shared = find_shared_inputs(layers, runs[0])
    with torch.no_grad():
        return gather_statistics(layers, shared, lambda: runs, padding=padding if leave_out else None)


@pytest.mark.parametrize(("make", "left"), [(tiny_llama, False), (tiny_llama, True), (tiny_bert, False)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_statistics_are_those_of_the_sentences_alone(make: Any, attention: str, left: bool) -> None:
    """But for the order of float32 sums, where attention is of float32; in float64 rounding is beyond float32."""
    found = statistics(make(attention), batches(left=left), leave_out=True)
    expected = statistics(make(attention), one_by_one(PARTS), leave_out=True)
    everything = statistics(make(attention), batches(left=left), leave_out=False)
    close = 2e-5 if attention == "eager" else 2e-7
    assert found.keys() == expected.keys()
    for name, seen in expected.items():
        assert found[name].count == seen.count == sum(map(len, PARTS)) < everything[name].count
        for part in ("gram", "mean_magnitude", "max_magnitude", "low", "high"):
            ours, theirs = (torch.as_tensor(getattr(each, part)) for each in (found[name], seen))
            torch.testing.assert_close(ours, theirs, rtol=close, atol=close * float(theirs.abs().max()), msg=name)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_a_mask_of_ones_changes_no_bit(make: Any) -> None:
    """Nothing is tried, and what is collected is the layer's input itself."""
    ones = [padded(sentences(9, 9, 9)), padded(sentences(4, 4, seed=2))]
    padding, known = found_padding(make(), *ones)
    assert (padding.notes, known) == ((), {})
    x = torch.ones(3, 9, 64)
    assert padding.counted("encoder.layer.0.attention.self.query", x) is x
    found, expected = (statistics(make(), ones, leave_out=leave_out) for leave_out in (True, False))
    assert all(torch.equal(found[name].gram, seen.gram) for name, seen in expected.items())


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.codes for name, m in model.named_modules() if isinstance(m, lq.QuantizedLinear)}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = codes_of(found), codes_of(expected)
    assert ours.keys() == theirs.keys() != set()
    for name, codes in theirs.items():
        assert torch.equal(ours[name], codes), name
    rows = [lq.ptq_report(each).layers for each in (found, expected)]  # type: ignore[union-attr]
    for one, other in zip(*rows, strict=True):
        for ours_, theirs_ in ((one.loss, other.loss), (one.nearest_loss, other.nearest_loss)):
            assert ours_ == (None if theirs_ is None else pytest.approx(theirs_, rel=1e-5)), one.name
    for name, value in expected.named_buffers():
        if name.endswith(("input_scale", "weight_scale", "input_factor")):
            torch.testing.assert_close(found.get_buffer(name), value, rtol=1e-6, atol=0.0, msg=name)


INT8 = lq.QATConfig("int8", per_channel=True, activation_observer="min_max")


@pytest.mark.parametrize(("config", "method"), [
    (W4, "gptq"), (W4, "awq"), (W4, "awq+gptq"), (W4, "clip"),
    ("int8_dynamic", "smoothquant+gptq"), (INT8, "smoothquant"), (INT8, "gptq"),
])  # fmt: skip
@pytest.mark.parametrize(("make", "left"), [(tiny_llama, False), (tiny_llama, True), (tiny_bert, False)])
def test_codes_are_those_of_the_sentences_alone(make: Any, left: bool, config: Any, method: str) -> None:
    found = lq.quantize_model(make(), config, batches(left=left), method)
    assert_same(found, lq.quantize_model(make(), config, one_by_one(PARTS), method))
    report: Any = lq.ptq_report(found)
    (note,) = report.notes
    assert note.startswith("padding is left out of the inputs of ")


@pytest.mark.parametrize("order", ["blocks", "sublayers", "one_pass"])
def test_every_order(order: Any) -> None:
    options = lq.PTQOptions(order=order)
    found = lq.quantize_model(tiny_llama(), W4, batches(), "gptq", options=options)
    assert_same(found, lq.quantize_model(tiny_llama(), W4, one_by_one(PARTS), "gptq", options=options))


def test_what_padding_does_otherwise() -> None:
    """Without the mask's being seen, codes are others and losses are of more rows."""
    found = lq.quantize_model(tiny_llama(), W4, batches(), "gptq")
    hidden = [(batch,) for batch in batches()]
    other = lq.quantize_model(tiny_llama(), W4, hidden, "gptq", forward=lambda model, batch: model(**batch[0]))
    assert any(not torch.equal(codes_of(other)[name], codes) for name, codes in codes_of(found).items())
    first, second = (lq.ptq_report(each).layers[0] for each in (found, other))  # type: ignore[union-attr]
    assert first.nearest_loss < 0.95 * second.nearest_loss  # type: ignore[operator]


def test_a_forward_of_ones_own() -> None:
    given = {"forward": lambda model, batch: model.model(**batch).last_hidden_state}
    found = lq.quantize_model(tiny_llama(), W4, batches(), "gptq", **given)
    assert_same(found, lq.quantize_model(tiny_llama(), W4, one_by_one(PARTS), "gptq", **given))


def test_sentences_of_padding_alone_are_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    more = [padded([*PARTS[:4], nothing]), padded([nothing, *PARTS[4:]])]
    found = lq.quantize_model(tiny_llama(), W4, more, "gptq")
    assert_same(found, lq.quantize_model(tiny_llama(), W4, one_by_one(PARTS), "gptq"))


def test_an_encoder_and_its_decoder() -> None:
    sources, targets = sentences(5, 8, 6), sentences(8, 3, 7, seed=2)
    source, target = padded(sources), padded(targets)
    decoder = {"decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}
    alone = [
        {**one, "decoder_input_ids": part[None], "decoder_attention_mask": torch.ones_like(part)[None]}
        for one, part in zip(one_by_one(sources), targets, strict=True)
    ]
    found = lq.quantize_model(tiny_t5().double(), W4, [{**source, **decoder}], "gptq")
    assert_same(found, lq.quantize_model(tiny_t5().double(), W4, alone, "gptq"))


class Stopped(lq.PTQObserver):
    def __init__(self, layers: int) -> None:
        self.left = layers

    def layer_done(self, outcome: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_and_weights_that_are_read_block_by_block(tmp_path: Path) -> None:
    expected = lq.quantize_model(tiny_llama(), W4, batches(), "awq+gptq")
    with pytest.raises(KeyboardInterrupt):
        lq.quantize_model(tiny_llama(), W4, batches(), "awq+gptq", journal=tmp_path / "journal", observer=Stopped(9))
    resumed = lq.quantize_model(tiny_llama(), W4, batches(), "awq+gptq", journal=tmp_path / "journal")
    save_model(tiny_llama(), str(tmp_path / "model.safetensors"))
    with lq.without_weights():
        empty = tiny_llama()
    streamed = lq.quantize_model(empty, W4, batches(), "awq+gptq", weights=tmp_path / "model.safetensors")
    for found in (resumed, streamed):
        for name, codes in codes_of(expected).items():
            assert torch.equal(codes_of(found)[name], codes), name
    for method in ("gptq", "rtn"):
        ranged = lq.quantize_model(tiny_llama(), INT8, batches(), method)
        with lq.without_weights():
            empty = tiny_llama()
        assert_same(lq.quantize_model(empty, INT8, batches(), method, weights=tmp_path / "model.safetensors"), ranged)


class Experts(nn.Module):
    """Two experts, of which each token gets the one its router says; all see a flat view of the sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 2), nn.Linear(16, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        flat = x.view(-1, 16)
        chosen = self.router(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(flat[chosen == i])
        return self.head(out.view_as(x))


def test_experts_count_what_is_routed_to_them() -> None:
    torch.manual_seed(0)
    model, given = Experts(), [padded(sentences(5, 9, 7))]
    known = found_padding(model, *given)[1]
    assert known == {"router": "attention_mask", "head": "attention_mask"}
    seen = statistics(model, given, leave_out=True)
    assert seen["router"].count == seen["head"].count == 21
    assert sum(seen[f"experts.{i}"].count for i in range(2) if f"experts.{i}" in seen) == 27


@pytest.mark.parametrize("measure", [measure_sensitivity, gram_sensitivity])
def test_sensitivity_is_that_of_the_sentences_alone(measure: Any) -> None:
    plan = lq.QuantizationPlan([lq.LayerRule(nn.Linear, "int8_weight_only")])
    found = measure(tiny_llama(), batches(), plan, (3, 4))
    expected = measure(tiny_llama(), one_by_one(PARTS), plan, (3, 4))
    for one, other in zip(found, expected, strict=True):
        assert dict(one.loss) == pytest.approx(dict(other.loss), rel=1e-6), one.name
