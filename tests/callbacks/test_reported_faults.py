"""One test for each fault reported against Lightning's old callback and against other quantization callbacks."""

import re
from pathlib import Path

import pytest
import torch
from classifier import Classifier, StopBeforeEpoch, data, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_qat as lq

#: Faults whose test stands where the like of it is tested.
ELSEWHERE = {
    "a wrapped forward took one positional input only": (
        "test_any_module.py", "test_modules_of_every_shape_ship_what_they_trained", "class SeveralInputs",
    ),
    "Trainer.test(ckpt_path) failed once the module was converted in place": (
        "test_checkpoints.py", "test_testing_the_best_checkpoint_works_after_a_conversion",
    ),
    "pruned weights came back on conversion": ("test_other_callbacks.py", "test_pruned_weights_have_codes_of_zero"),
    "every rank quantized with ranges of its own": (
        "test_strategies.py", "test_ddp_has_the_same_scales_on_both_ranks_and_is_one_rank_with_twice_the_batch",
    ),
    "the best checkpoint was one of the float phase": ("test_quantized_model_checkpoint.py", "test_best_is_quantized"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ELSEWHERE)
def test_the_others_have_their_test(fault):
    file, test, *cases = ELSEWHERE[fault]
    text = (Path(__file__).parent / file).read_text()
    for name in (f"def {test}(", *cases):
        assert re.search(rf"^{re.escape(name)}", text, re.MULTILINE), name


def outliers():
    return DataLoader(TensorDataset(torch.full((8, 1, 8, 8), 1e4), torch.zeros(8).long()), batch_size=4)


def ranges(module):
    found = {}
    for layer in (module.conv, module.head):
        state = layer.input_quantizer.state_dict()
        found |= {f"{layer.input_quantizer.name}.{key}": v for key, v in state.items() if isinstance(v, torch.Tensor)}
    return {key: value.clone() for key, value in found.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("observer", ["moving_average", "min_max", "histogram"])
def test_observers_learn_nothing_from_evaluation(tmp_path, observer):
    """Ranges grew with validation data, so that a model trained with validation was another than one without."""
    seen = []
    config = lq.QATConfig("int8", activation_observer=observer)
    for evaluation in (None, outliers()):
        module, run = Classifier(), trainer(tmp_path, [lq.QuantizationAwareTraining(config)], val_check_interval=2)
        run.fit(module, loader(), evaluation)
        seen.append(ranges(module))
    assert {where for where, *_ in module.record} == {"train", "val", "sanity"}
    assert_same(*seen)
    run.validate(module, outliers(), verbose=False)
    run.test(module, outliers(), verbose=False)
    run.predict(module, outliers())
    assert_same(ranges(module), seen[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_delayed_start_is_kept_on_resume(tmp_path, accumulate):
    """The delay was counted in batches since the process began: each resume trained in float for as long again."""

    def callbacks():
        return [lq.QuantizationAwareTraining("int8"), lq.DelayedQATStart(10 // accumulate)]

    options = dict(max_epochs=3, accumulate_grad_batches=accumulate)
    whole, phases = Classifier(), []
    trainer(tmp_path, callbacks(), **options).fit(whole, loader(), loader(8))
    for stop in (1, 2):
        saver = ModelCheckpoint(tmp_path / f"{stop}", filename="last", save_on_train_epoch_end=True)
        first = trainer(tmp_path, [StopBeforeEpoch(stop), *callbacks(), saver], enable_checkpointing=True, **options)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            first.fit(Classifier(), loader(), loader(8))
        resumed = Classifier(seed=7)
        trainer(tmp_path, callbacks(), **options).fit(resumed, loader(), ckpt_path=tmp_path / f"{stop}" / "last.ckpt")
        phases.append([(step, phase[0]) for where, step, phase in resumed.record if where == "train"])
    expected = [(step, phase[0]) for where, step, phase in whole.record if where == "train"]
    assert expected == [(batch // accumulate, batch >= 10) for batch in range(24)]
    assert phases == [expected[8:], expected[16:]]


class WithAccuracy(Classifier):
    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(2, average="micro")

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.accuracy(self(batch[0]), batch[1])
        self.log("test/accuracy", self.accuracy)


@pytest.mark.parametrize("config", ["int8", "w4a8", "w4a4"])
def test_converted_accuracy_is_the_accuracy_that_trained(tmp_path, config):
    """Conversion quantized the weights anew, with other ranges and roundings: 4-bit models lost tens of points."""
    module, run = WithAccuracy(), trainer(tmp_path, [lq.QuantizationAwareTraining(config)], max_epochs=4)
    run.fit(module, loader(64))
    held_out = DataLoader(data(128, seed=5), batch_size=32)
    trained, shipped = (run.test(m, held_out, verbose=False)[0] for m in (module, lq.convert(module)))
    assert trained["test/accuracy"] > 0.6  # it learned something that could get lost
    assert shipped["test/accuracy"] == trained["test/accuracy"]
    assert shipped["test/loss"] == pytest.approx(trained["test/loss"], rel=1e-4)
    for (name, layer), converted in zip(
        [("conv", module.conv), ("head", module.head)], [lq.convert(module).conv, lq.convert(module).head], strict=True
    ):
        magnitudes = converted.codes.abs().to(torch.int32), layer.weight_quantizer.codes(layer.weight).abs()
        assert torch.equal(magnitudes[0], magnitudes[1].to(torch.int32)), name  # a negative gamma turns signs


@pytest.mark.parametrize("freeze_step", [None, 4])
def test_a_gamma_of_zero_trains_and_converts(tmp_path, freeze_step):
    """Dividing by a folded BatchNorm's factor made NaN where gamma is 0, as in zero-initialized residual branches."""
    module = Classifier()
    with torch.no_grad():
        module.bn.weight[:2] = torch.tensor([0.0, 1e-41])
    module.bn.weight.register_hook(lambda gradient: gradient * torch.tensor([0.0, 0.0, 1.0, 1.0]))
    callback = lq.QuantizationAwareTraining("int8", freeze_step=freeze_step)
    trainer(tmp_path, [callback]).fit(module, loader(), loader(8))
    assert module.bn.weight[0] == 0
    assert all(torch.isfinite(tensor).all() for tensor in [*module.parameters(), *module.buffers()])
    assert callback.certificate.passed
    x = torch.randn(4, 1, 8, 8)
    converted = lq.convert(module)
    assert isinstance(converted.bn, lq.nn.FoldedBatchNorm)
    torch.testing.assert_close(converted(x), module.eval()(x), rtol=1e-4, atol=1e-5)
