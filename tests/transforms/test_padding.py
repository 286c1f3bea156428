"""Which rows of which inputs are padding is told by trying, and calibration leaves just these out."""

from __future__ import annotations

import logging
from collections import UserDict
from typing import Any

import pytest
import torch
from padded import WORDS, found_padding, linears, one_by_one, padded, sentences, tiny_bert, tiny_llama, tiny_t5
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.transforms.padding import Padding
from lightning_qat.transforms.ranges import static_quantizers

pytest.importorskip("transformers")
STATIC = lq.QATConfig("int8", per_channel=True, activation_observer="min_max")


class Text(nn.Module):
    """Rows of one token each, in a layout of their own; real ones know nothing of padding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(WORDS, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.trials = 0

    def layout(self, x: Tensor) -> Tensor:
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        self.trials += 1
        return self.second(self.first(self.layout(self.embed(input_ids))).relu())


class LengthFirst(Text):
    def layout(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Flat(Text):
    def layout(self, x: Tensor) -> Tensor:
        return x.contiguous().view(-1, x.shape[-1])


class Routed(Text):
    """As many rows as tokens, in another order."""

    def layout(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[torch.arange(x.shape[0] * x.shape[1] - 1, -1, -1)]


class Mixed(Text):
    """Features in the place of positions."""

    def layout(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Averaged(Text):
    """Real positions look at padding as well."""

    def layout(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Inverted(Text):
    """Its mask is 1 where a position is padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        return self.second(self.first(x + (x * (attention_mask == 0).unsqueeze(-1)).sum(1, keepdim=True)))


class Pictures(Text):
    """The second layer has as many patches as the first has tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, patches: Tensor) -> Tensor:  # type: ignore[override]
        return self.first(self.embed(input_ids)).sum(-1) + self.second(patches).sum(-1)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_layers_of_a_language_model_are_known(attention: str, left: bool) -> None:
    model = tiny_llama(attention)
    padding, known = found_padding(model, padded(sentences(5, 9, 7), left=left))
    assert known.keys() == linears(model)
    assert padding.notes == ("padding is left out of the inputs of 15 of 15 Linears",)
    assert not model.training
    assert not model.config.use_cache


@pytest.mark.parametrize(("kind", "known"), [
    (Text, ["first", "second"]), (LengthFirst, ["first", "second"]), (Flat, ["first", "second"]),
    (Routed, []), (Mixed, []), (Averaged, []),
])  # fmt: skip
@pytest.mark.parametrize("square", [False, True])
def test_layouts(kind: type[Text], known: list[str], square: bool) -> None:
    """With as many sentences as positions and as many positions as features no shape tells anything."""
    torch.manual_seed(0)
    parts = sentences(5, 8, 7, 2, 6, 8, 3, 4) if square else sentences(5, 8, 7)
    batch = padded(parts)
    model = kind()
    padding, found = found_padding(model, batch)
    assert sorted(found) == known
    seen: list[Tensor] = []
    model.first.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    padding.run(batch)
    counted = padding.counted("first", seen[0]).flatten(0, -2)
    if not known:
        assert padding.counted("first", seen[0]) is seen[0]
        return
    expected = model.embed(torch.cat(parts))
    assert torch.equal(counted.sort(0).values, expected.sort(0).values)  # the same rows, whatever their order


def test_patches_that_are_as_many_as_tokens_count() -> None:
    batch = {**padded(sentences(5, 9, 7)), "patches": torch.randn(3, 9, 8)}
    assert found_padding(Pictures(), batch)[1] == {"first": "attention_mask"}


def test_masks_that_say_nothing_certain_are_left_alone() -> None:
    batch = padded(sentences(5, 9, 7))
    mask = batch["attention_mask"]
    additive = (1.0 - mask.double()) * -1e9
    others: list[Any] = [
        {**batch, "attention_mask": mask.float()},
        {**batch, "attention_mask": additive},
        {**batch, "attention_mask": additive[:, None, None]},
        {**batch, "attention_mask": mask[:, None, None].bool()},
        {**batch, "attention_mask": mask * 2},
        {**batch, "attention_mask": mask[:, :-1]},
        {**batch, "attention_mask": torch.ones_like(mask)},
        {"input_ids": batch["input_ids"]},
        {"attention_mask": mask, "input_ids": batch["input_ids"].tolist()},
    ]
    for other in others:
        padding = Padding(lq.prepare(Text(), "int8_weight_only"), lambda model, each: model.first(torch.ones(3, 9, 8)))
        padding.look_at([other])
        padding.run(other)
        assert (padding.notes, padding.masks) == ((), {})
    assert found_padding(Inverted(), {**batch, "attention_mask": 1 - mask})[1] == {}


def test_batches_that_are_no_dict_are_run_once() -> None:
    model = lq.prepare(Text(), STATIC)
    ids, mask = padded(sentences(5, 9)).values()
    lq.calibrate(model, [(ids, mask), (ids,), ids, {"input_ids": ids, "attention_mask": torch.ones_like(mask)}])
    assert model.trials == 4


def test_another_kind_of_mapping_and_vectors_in_the_place_of_tokens() -> None:
    batch = padded(sentences(5, 9, 7))
    assert found_padding(tiny_bert(), UserDict(batch))[1].keys() == linears(tiny_bert())
    model = tiny_llama()
    vectors = model.model.embed_tokens(batch["input_ids"]).detach()
    found = found_padding(model, {"inputs_embeds": vectors, "attention_mask": batch["attention_mask"].bool()})[1]
    assert found.keys() == linears(model)


def test_a_decoder_is_not_masked_as_its_encoder_is() -> None:
    """Both are of the same length here; the keys and values of cross attention are the encoder's rows."""
    model, source, target = tiny_t5(), padded(sentences(5, 8, 6)), padded(sentences(8, 4, 7, seed=2))
    decoder = {"decoder_input_ids": target["input_ids"]}
    labels = {"labels": target["input_ids"]}
    all_of_it = linears(model)
    of_decoder = {name for name in all_of_it if name.startswith(("decoder", "lm_head"))}
    crossing = {name for name in of_decoder if name.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
    assert len(crossing) == 4
    for more in (decoder, labels):
        found = found_padding(tiny_t5(), {**source, **more})[1]
        assert found == dict.fromkeys(all_of_it - of_decoder | crossing, "attention_mask")
    both = {**source, **decoder, "decoder_attention_mask": target["attention_mask"]}
    found = found_padding(tiny_t5(), both)[1]
    rest = dict.fromkeys(of_decoder - crossing, "decoder_attention_mask")
    assert found == dict.fromkeys(all_of_it - of_decoder | crossing, "attention_mask") | rest


def test_a_model_that_does_not_take_other_tokens_is_calibrated_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Strict(Text):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
            if bool((input_ids[attention_mask == 0] != 0).any()):
                raise ValueError("padding is 0")
            return super().forward(input_ids, attention_mask)

    model = lq.prepare(Strict(), STATIC)
    with caplog.at_level(logging.WARNING):
        lq.calibrate(model, [batch := padded(sentences(5, 9))])
    assert "with other tokens there the model raises ValueError: padding is 0" in caplog.text
    everything = model.embed(batch["input_ids"])
    assert float(model.first.input_quantizer.observer.max_val) == float(everything.detach().max())


# --- calibrate ---------------------------------------------------------------------------------------


def ranges(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.named_buffers() if "input_quantizer" in name}


@pytest.mark.parametrize("observer", ["min_max", "histogram", "mse"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_ranges_are_those_of_the_sentences_alone(make: Any, attention: str, left: bool, observer: str) -> None:
    parts = sentences(5, 16, 9, 12)
    batch, close = padded(parts, left=left, to=20), 1e-5 if attention == "eager" else 1e-12
    with torch.no_grad():  # the witness is one: real positions do not see padding
        outputs = [make(attention)(**each)[0] for each in (batch, *one_by_one(parts))]
    for row, mask, alone in zip(outputs[0], batch["attention_mask"], outputs[1:], strict=True):
        torch.testing.assert_close(row[mask.bool()], alone[0], rtol=close, atol=close * float(alone.abs().max()))
    plan = lq.QATConfig("int8", per_channel=True, activation_observer=observer)
    found, expected, everything = (lq.prepare(make(attention), plan) for _ in range(3))
    lq.calibrate(found, [batch])
    lq.calibrate(expected, one_by_one(parts))
    for name, value in ranges(expected).items():
        if attention == "sdpa" or not name.endswith(("counts", "sums")):  # in float32 a number may go to the bin beside
            torch.testing.assert_close(ranges(found)[name], value, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        lq.calibrate(everything, [(batch["input_ids"],)], lambda model, ids: model(**batch))
    same = [torch.allclose(ranges(everything)[name], value) for name, value in ranges(expected).items()]
    assert not all(same) or observer == "min_max"  # padding need not hold the extremes


def test_a_sentence_of_padding_alone_and_a_limit_of_samples() -> None:
    parts = sentences(5, 9, 7)
    batch, alone = padded([*parts, torch.zeros(0, dtype=torch.int64)]), one_by_one(parts)
    found, expected = lq.prepare(tiny_llama(), STATIC), lq.prepare(tiny_llama(), STATIC)
    lq.calibrate(found, [padded(parts[:1]), batch])  # the first has no padding
    lq.calibrate(expected, alone)
    for name, value in ranges(expected).items():
        torch.testing.assert_close(ranges(found)[name], value, rtol=1e-6, atol=1e-6, msg=name)
    two = lq.QuantizationConfig("int8", calibration_samples=2)
    plan = lq.QuantizationPlan([lq.LayerRule(nn.Linear, "int8_weight_only", two)])
    few, expected = lq.prepare(tiny_llama(), plan), lq.prepare(tiny_llama(), plan)
    lq.calibrate(few, [batch])
    lq.calibrate(expected, [padded(parts[:2])])
    for name, value in ranges(expected).items():
        torch.testing.assert_close(ranges(few)[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_projections_of_an_attention_in_which_length_comes_first() -> None:
    class Encoder(Text):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            x = self.embed(input_ids)
            x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0)[0]
            return self.second(self.first(x))

    parts = sentences(5, 9, 7)
    model = lq.prepare(Encoder(), STATIC)
    with torch.no_grad():
        model.embed.weight[0] = 100.0
    lq.calibrate(model, [padded(parts)])
    seen = model.embed(torch.cat(parts)).detach()
    for name in ("q_proj", "k_proj", "v_proj"):
        observer = getattr(model.attention, name).input_quantizer.observer
        assert (float(observer.min_val), float(observer.max_val)) == (float(seen.min()), float(seen.max()))


def test_training_counts_everything_as_before() -> None:
    batch = padded(sentences(5, 9))
    model = lq.prepare(Text(), STATIC)
    with torch.no_grad():
        model.embed.weight[0] = 100.0
    lq.calibrate(model, [batch])
    observer = model.first.input_quantizer.observer
    assert float(observer.max_val) < 100
    model.train()(**batch)
    assert float(observer.max_val) == 100


def test_a_forward_may_take_a_batch_apart() -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        ids, labels = batch.pop("input_ids"), batch.pop("labels")
        return model(ids, **batch).sum() + labels.sum()

    batch = {**padded(sentences(5, 9)), "labels": torch.ones(2, 9)}
    model, other = (lq.prepare(Text(), STATIC) for _ in range(2))
    other.load_state_dict(model.state_dict())
    lq.calibrate(model, [UserDict(batch)], forward=forward)
    lq.calibrate(other, [batch])
    for name, expected in ranges(other).items():
        assert torch.equal(ranges(model)[name], expected), name
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


class Noisy(Text):
    """Drops features in evaluation too, as the prenet of SpeechT5 does."""

    def layout(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("make", [tiny_llama, Noisy])
def test_random_numbers_and_modes_are_as_they_were(make: Any) -> None:
    model, batch, state = make(), padded(sentences(5, 9)), torch.get_rng_state()
    model(**batch)
    once = torch.get_rng_state()
    torch.set_rng_state(state)
    lq.prepare(model, STATIC)
    padding = Padding(model, lambda model, batch: model(**batch))
    padding.look(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert padding._known.keys() >= padding._linears.keys()
    model.train()
    lq.calibrate(model, [batch])
    assert torch.equal(torch.get_rng_state(), once)
    assert all(module.training for module in model.modules())
    quantizers = static_quantizers(model)
    assert all(each.quantizing and not each.calibrating and each.samples.rows is None for each in quantizers)
