"""The gap is what two validations of the same weights differ by, and measuring it leaves no trace."""

import lightning as L
import pytest
import torch
from classifier import Classifier, data, loader, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_qat as lq
from lightning_qat.transforms.phase import float_forward


class Measured(Classifier):
    """A metric object, a metric computed at the epoch's end, a queue, and random numbers everywhere."""

    def __init__(self):
        super().__init__()
        self.accuracy, self.late = MulticlassAccuracy(2), MulticlassAccuracy(2)
        self.outputs, self.starts = [], 0
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]), batch_idx)

    def on_validation_epoch_start(self):
        self.starts += 1

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        out = self(batch[0])
        self.seen += 1
        self.outputs.append(out)
        self.accuracy(out, batch[1])
        self.late.update(out, batch[1])
        self.log("val/acc", self.accuracy)
        self.logger.log_metrics({"direct": 1.0})

    def on_validation_epoch_end(self):
        self.log("val/late", self.late.compute())
        self.late.reset()
        self.outputs.clear()


def fit(tmp_path, *callbacks, bits=3, loaders=None, **options):
    L.seed_everything(3, verbose=False)
    module, logger = Measured(), CSVLogger(tmp_path, name="", version=str(len(callbacks)))
    rules = [lq.QuantizationAwareTraining(lq.QATConfig("int8", bits=bits, start_step=8), certify=False)]
    run = trainer(tmp_path, [*rules, *callbacks], logger=logger, **{"max_epochs": 3, **options})
    generator = torch.Generator().manual_seed(5)
    val = DataLoader(data(24, 1), batch_size=5, shuffle=True, generator=generator)
    run.fit(module, loader(shuffle=True), loaders or val)
    return run, module, generator


def test_it_is_the_difference_of_two_validations(tmp_path):
    run, module, _ = fit(tmp_path, lq.QuantizationGap())
    found = dict(run.callback_metrics)
    alone = trainer(tmp_path, logger=run.logger)
    val = DataLoader(data(24, 1), batch_size=24)
    quantized = alone.validate(module, val, verbose=False)[0]
    with float_forward(module):
        in_float = alone.validate(module, val, verbose=False)[0]
    assert quantized != in_float
    for name in ("val/loss", "val/acc", "val/late"):
        gap = quantized[name] - in_float[name]
        assert found[f"quantization_gap/{name}"].item() == pytest.approx(gap, rel=1e-5, abs=1e-6), name
        assert found[f"quantization_gap/{name}/float"].item() == pytest.approx(in_float[name], rel=1e-5)
    header = (tmp_path / "1" / "metrics.csv").read_text().splitlines()[0]
    assert "quantization_gap/val/late" in header.split(",")


@pytest.mark.parametrize("limit", [None, 2])
def test_it_leaves_no_trace(tmp_path, limit):
    """Witness: the run without it."""
    found = []
    for callbacks in ([], [lq.QuantizationGap(limit_batches=limit)]):
        run, module, generator = fit(tmp_path, *callbacks)
        state = {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
        metrics = {k: v.item() for k, v in run.callback_metrics.items() if "gap" not in k}
        rest = module.starts, len(module.outputs), module.seen.item(), len(module.record), module.accuracy._update_count
        lines = (tmp_path / str(len(callbacks)) / "metrics.csv").read_text().count("1.0")
        assert lines
        found.append((state, metrics, rest, torch.cat([torch.get_rng_state(), generator.get_state()])))
    (one, *plain, random), (other, *ours, our_random) = found
    assert plain == ours
    assert torch.equal(random, our_random)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_limit_compares_the_same_batches(tmp_path):
    calls = []

    class Watched(lq.QuantizationGap):
        def _validate(self, trainer, module):
            calls.append(super()._validate(trainer, module))
            return calls[-1]

    run, *_ = fit(tmp_path, Watched("val/loss", limit_batches=1), max_epochs=2)
    assert len(calls) == 4  # two validations, each with and without
    assert run.callback_metrics["quantization_gap/val/loss"] == calls[-2]["val/loss"] - calls[-1]["val/loss"]
    assert not any("gap" in name and "loss" not in name for name in run.callback_metrics)


def test_several_loaders_have_their_own(tmp_path):
    run, *_ = fit(tmp_path, lq.QuantizationGap(), loaders=[loader(8), loader(8, seed=4)], max_epochs=2)
    names = {name for name in run.callback_metrics if name.startswith("quantization_gap/val/loss")}
    ends = ("", "/float")
    assert names == {f"quantization_gap/val/loss/dataloader_idx_{i}{end}" for i in (0, 1) for end in ends}


def test_others_can_monitor_it_and_the_float_phase_has_none(tmp_path):
    gap = lq.QuantizationGap(every_n_epochs=2)
    saver = ModelCheckpoint(tmp_path / "c", monitor="quantization_gap/val/loss", save_top_k=-1, every_n_epochs=2)
    stopper = EarlyStopping("quantization_gap/val/loss", strict=False, patience=9)
    fit(tmp_path, gap, stopper, saver, enable_checkpointing=True, max_epochs=4, check_val_every_n_epoch=2)
    assert len(saver.best_k_models) == 2
    module = Classifier()
    run = trainer(tmp_path, [lq.DelayedQATStart(1000), lq.QuantizationGap()])
    run.fit(module, loader(), loader(8))
    assert not any("gap" in name for name in run.callback_metrics)


def test_an_unknown_metric_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"monitor='val_acc'\): validation does not log it; it logs 'val/loss'"):
        fit(tmp_path, lq.QuantizationGap("val_acc"))
    with pytest.raises(ValueError, match="limit_batches=0"):
        lq.QuantizationGap(limit_batches=0)
