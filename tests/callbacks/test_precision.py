"""Every precision of the Trainer: scales stay float32, and what trained converts. Activation checkpointing too."""

import math

import pytest
import torch
from classifier import Classifier, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_qat as lq
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import defer_ranges, update_ranges

PRECISIONS = {
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,  # Lightning takes bf16-mixed on a CPU
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


@pytest.mark.filterwarnings("ignore:You passed `Trainer.*AMP with fp16")
@pytest.mark.parametrize("preset", ["int8", "w4a8"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_scales_stay_float32_and_what_trained_converts(tmp_path, precision, preset):
    module = Classifier()
    callback = lq.QuantizationAwareTraining(preset, start_step=2, freeze_step=12)
    run = trainer(tmp_path, [callback], precision=precision, max_epochs=2, limit_val_batches=2)
    run.fit(module, loader(), loader(8))
    assert module.conv.weight.dtype == PRECISIONS[precision]
    for name, layer in qat_layers(module):
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            assert quantizer.scale.dtype == torch.float32, name
            assert quantizer.scale.isfinite().all()
            assert (quantizer.scale > 0).all()
        observer = layer.input_quantizer.observer
        assert observer.min_val.dtype == observer.max_val.dtype == torch.float32
    assert callback.certificate.passed, callback.certificate
    assert math.isfinite(run.callback_metrics["val/loss"])
    converted = lq.convert(module)
    for layer, twin in ((module.conv, converted.conv), (module.head, converted.head)):
        assert torch.equal(layer.weight_codes().abs(), twin.codes.abs())  # a folded factor may turn signs
    run.test(converted, loader(8), verbose=False)
    assert math.isfinite(run.callback_metrics["test/loss"])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("pact", [None, 1e-3])
def test_learned_scales_are_float32_and_move(tmp_path, precision, pact):
    """Lightning builds modules in the precision it trains in; in bfloat16 a step of an exponent is rounded away."""
    config = lq.QATConfig("int4", per_channel=True, learnable_step_size=pact is None, pact_decay=pact)
    module = Classifier()
    callbacks = [lq.QuantizationAwareTraining(config, certify=False), lq.LearnedScales(lr=1e-3)]
    trainer(tmp_path, callbacks, precision=precision, max_epochs=1).fit(module, loader())
    parameters = [p for name, p in module.named_parameters() if ".learned." in name]
    assert {p.dtype for p in parameters} == {torch.float32}
    assert any(bool((p != p.bfloat16()).any()) for p in parameters)
    module.eval()
    converted = lq.convert(module)
    for layer, twin in ((module.conv, converted.conv), (module.head, converted.head)):
        assert torch.equal(layer.weight_codes().abs(), twin.codes.abs())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_cast_run_resumes_with_its_scales(tmp_path, precision):
    callbacks = lambda: [lq.QuantizationAwareTraining("int8", certify=False)]  # noqa: E731
    module, run = Classifier(), trainer(tmp_path, callbacks(), precision=precision)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = Classifier(seed=5)
    second = trainer(tmp_path, callbacks(), precision=precision)
    second.fit(again, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for (name, one), (_, other) in zip(qat_layers(module), qat_layers(again), strict=True):
        assert torch.equal(one.input_quantizer.scale, other.input_quantizer.scale), name


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(x))))


class Blocks(nn.Module):
    """Two blocks, and the first of them once more."""

    def __init__(self, **how):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.how = Block(), Block(), how

    def forward(self, x):
        for block in (self.first, self.second, self.first):
            x = checkpoint(block, x, **self.how) if self.how else block(x)
        return x


CHECKPOINTS = {
    "reentrant": dict(use_reentrant=True),
    "not reentrant": dict(use_reentrant=False),
    "not reentrant, no early stop": dict(use_reentrant=False, early_stop=False),
}


@pytest.mark.parametrize("deferred", [True, False], ids=["in a Trainer", "in a loop of one's own"])
@pytest.mark.parametrize("how", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_activation_checkpointing_observes_once_and_changes_no_bit(how, deferred):
    results = []
    for options in ({}, how):
        model = lq.prepare(Blocks(**options), lq.QATConfig("int8", observer_momentum=0.5))
        defer_ranges(model, deferred)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen, losses = [], []
        generator = torch.Generator().manual_seed(2)
        for step in range(4):
            torch.manual_seed(step)
            x = (torch.randn(3, 8, generator=generator) * (step + 1)).requires_grad_()
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if deferred:
                update_ranges(model)
            losses.append(loss.detach())
            seen.append(model.first.up.input_quantizer.observer.max_val.clone())
        results.append((torch.stack(losses), torch.stack(seen), model.state_dict(), x.grad))
    (loss, seen, state, grad), (other_loss, other_seen, other_state, other_grad) = results
    if not deferred:
        # A layer called twice quantizes the first time with an older range than its repetition in backward knows.
        loss, other_loss = loss[:1], other_loss[:1]
    assert torch.equal(loss, other_loss)
    if deferred:
        assert torch.equal(seen, other_seen)
        assert torch.equal(grad, other_grad)
        for key, value in state.items():
            assert (
                torch.equal(value, other_state[key]) if isinstance(value, torch.Tensor) else value == other_state[key]
            )


def test_checkpointed_blocks_in_a_trainer(tmp_path):
    class Checkpointed(Classifier):
        how = None

        def forward(self, x):
            x = x.clone().requires_grad_()  # or reentrant checkpointing gives no gradients

            def features(x):
                return F.relu(self.conv(x)).mean((2, 3))

            return self.head(features(x) if self.how is None else checkpoint(features, x, **self.how))

    states = []
    for how in (None, *CHECKPOINTS.values()):
        module = Checkpointed()
        module.how = how
        torch.manual_seed(0)
        trainer(tmp_path, [lq.QuantizationAwareTraining("int8", certify=False)]).fit(module, loader())
        states.append({k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)})
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
