"""The parity gate at the end of a fit, in a real Trainer: it looks, it tells, and it changes nothing."""

import csv
import importlib
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from classifier import Classifier, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_qat as lq


class Measured(Classifier):
    """Logs a metric object, a number and a dict, draws random numbers, writes to its logger and keeps lists."""

    def __init__(self):
        super().__init__()
        self.accuracy, self.losses = MulticlassAccuracy(2), []

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * torch.rand(())

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.losses.append(loss)
        self.log("val/acc", self.accuracy(logits, batch[1]))
        self.log_dict({"val/loss": loss, "val/noise": torch.rand(())})
        if self.logger is not None:
            self.logger.log_metrics({"direct": 1.0})


def fit(tmp_path, certify=True, module=None, validation=True, build=Measured, preset="int8", **kwargs):
    module = module or build()
    callback = lq.QuantizationAwareTraining(preset, certify=certify, **kwargs.pop("qat", {}))
    torch.manual_seed(1)
    run = trainer(tmp_path, [callback], **kwargs)
    run.fit(module, loader(shuffle=True), loader(12, seed=1) if validation else None)
    return module, callback, run


def logged_rows(run, without=()):
    """Return the rows of the CSV logger, each without empty cells and the columns of ``without``."""
    with (Path(run.logger.log_dir) / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith(without)} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"step"}]


def test_after_fit_the_certificate_is_there_and_logged(tmp_path):
    module, callback, run = fit(tmp_path, logger=CSVLogger(tmp_path))
    report = callback.certificate
    assert report.passed
    assert [layer.name for layer in report.layers] == ["conv", "head"]
    assert report.worst_layer.sqnr_db > 100
    assert report.batches == 2
    assert report.agreement == 1
    assert [metric.name for metric in report.metrics] == ["val/acc", "val/loss", "val/noise"]
    assert all(metric.difference == pytest.approx(0, abs=1e-5) for metric in report.metrics)
    (row,) = [row for row in logged_rows(run) if "parity/worst_layer_sqnr" in row]
    assert float(row["parity/worst_layer_sqnr"]) == pytest.approx(report.worst_layer.sqnr_db)
    assert float(row["parity/output_sqnr"]) == pytest.approx(report.output_sqnr_db)
    assert row["step"] == "8"
    # What was certified is what conversion gives.
    expected = lq.check_parity(module, lq.convert(module), loader(8, seed=1), lambda model, batch: model(batch[0]))
    assert [layer.sqnr_db for layer in expected.layers] == [layer.sqnr_db for layer in report.layers]
    assert expected.output_sqnr_db == report.output_sqnr_db


@pytest.mark.parametrize("validation", [True, False])
def test_the_module_and_the_run_are_bit_identical_to_one_without(tmp_path, validation):
    (one, callback, first), (two, other, second) = (
        fit(tmp_path / str(certify), certify, validation=validation, logger=CSVLogger(tmp_path / str(certify)))
        for certify in (True, False)
    )
    assert other.certificate is None
    assert callback.certificate.passed
    assert callback.certificate.batches == 2
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
    assert [m.training for m in one.modules()] == [m.training for m in two.modules()]
    assert one.accuracy.metric_state["tp"].equal(two.accuracy.metric_state["tp"])
    assert one.accuracy._update_count == two.accuracy._update_count
    assert len(one.losses) == len(two.losses)
    assert one.record == two.record
    assert one.__dict__.keys() - {"_fit_parity_report"} == two.__dict__.keys()  # for convert to take over
    assert [len(m._forward_hooks) for m in one.modules()] == [len(m._forward_hooks) for m in two.modules()]
    rows = logged_rows(first, without=("parity/",))
    assert rows == logged_rows(second)
    assert any("direct" in row for row in rows) == validation  # steps that write to the logger wrote no more
    assert dict(first.callback_metrics) == dict(second.callback_metrics)


def test_random_numbers_and_loaders_go_on_as_without(tmp_path):
    after = []
    for certify in (True, False):
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(5)
        data = StatefulDataLoader(loader().dataset, batch_size=4, shuffle=True, generator=generator)
        trainer(tmp_path, [lq.QuantizationAwareTraining("int8", certify=certify)]).fit(Measured(), data)
        after.append((torch.rand(3), generator.get_state(), str(data.state_dict())))
    (draw, state, where), (draw_, state_, where_) = after
    assert torch.equal(draw, draw_)
    assert torch.equal(state, state_)
    assert where == where_


def test_without_a_validation_loader_training_batches_are_taken(tmp_path):
    _, callback, _ = fit(tmp_path, validation=False)
    assert callback.certificate.passed
    assert [metric.name for metric in callback.certificate.metrics] == ["train/loss"]
    _, callback, _ = fit(tmp_path, limit_val_batches=0)
    assert [metric.name for metric in callback.certificate.metrics] == ["train/loss"]


def test_a_fast_dev_run_certifies_too(tmp_path):
    _, callback, _ = fit(tmp_path, fast_dev_run=True)
    assert callback.certificate.passed
    assert callback.certificate.batches == 1


def test_half_precision_and_other_callbacks_first(tmp_path):
    module, callback = Measured(), lq.QuantizationAwareTraining("w4a8", freeze_step=4)
    run = trainer(tmp_path, [lq.ObserverCalibration(1), callback], precision="bf16-mixed")
    run.fit(module, loader(), loader(8))
    assert callback.certificate.passed, callback.certificate.failure()
    assert {layer.threshold_db for layer in callback.certificate.layers} == {25}
    assert module.bn.training


def test_nothing_is_done_before_the_model_quantizes(tmp_path, monkeypatch):
    gate = importlib.import_module("lightning_qat.callbacks.parity_gate")
    monkeypatch.setattr(gate, "convert", lambda *_: pytest.fail("converted"))
    _, callback, _ = fit(tmp_path, qat={"start_step": 100})
    assert callback.certificate is None
    _, callback, _ = fit(tmp_path, certify=False)
    assert callback.certificate is None


def spoil_conversion(monkeypatch):
    """Let the gate convert with another scale in the last layer."""

    def spoiled(module):
        converted = lq.convert(module)
        converted.head.weight_scale *= 1.1
        return converted

    monkeypatch.setattr(importlib.import_module("lightning_qat.callbacks.parity_gate"), "convert", spoiled)


def test_a_failing_gate_warns_and_keeps_the_report(tmp_path, monkeypatch):
    spoil_conversion(monkeypatch)
    with pytest.warns(UserWarning, match="layer 'head' is the first that diverges"):
        module, callback, run = fit(tmp_path)
    assert run.state.finished
    assert not callback.certificate.passed
    assert callback.certificate.first_divergence.name == "head"
    assert lq.parity_report(lq.convert(module, [torch.randn(4, 1, 8, 8)])).passed


def test_a_failing_gate_raises_where_asked_once_all_is_saved(tmp_path, monkeypatch):
    _, callback, run = fit(tmp_path, certify="raise")
    assert callback.certificate.passed
    spoil_conversion(monkeypatch)
    callbacks = [lq.QuantizationAwareTraining(certify="raise"), ModelCheckpoint(tmp_path, save_last=True)]
    run = trainer(tmp_path, callbacks, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="diverges"), pytest.raises(lq.ParityError, match="layer 'head' is the first"):
        run.fit(Measured(), loader())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == run.global_step
    with pytest.raises(ValueError, match="certify='strict' is not allowed; use True, False or 'raise'"):
        lq.QuantizationAwareTraining(certify="strict")


class Grumpy(Classifier):
    """Has steps that only the Trainer's own loop may call."""

    def validation_step(self, batch, batch_idx):
        if isinstance(self.head, lq.QuantizedLinear):
            raise KeyError("I want my float head")


def test_a_step_that_cannot_run_on_the_copy_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"could not be verified \(KeyError.*the trained model is not affected"):
        _, callback, run = fit(tmp_path, build=Grumpy)
    assert callback.certificate is None
    assert run.state.finished


class Bare(L.LightningModule):
    """Steps without an index, several loaders, manual optimization, parts called one by one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head = torch.nn.Linear(64, 8), torch.nn.Linear(8, 2)

    def logits(self, batch):
        return self.head(F.relu(self.body(batch[0].flatten(1))))

    def training_step(self, batch):
        self.optimizers().zero_grad()
        self.manual_backward(F.cross_entropy(self.logits(batch), batch[1]))
        self.optimizers().step()

    def validation_step(self, batch, batch_idx, dataloader_idx):
        return self.logits(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("validation", [True, False])
def test_bare_modules(tmp_path, validation):
    module, callback = Bare(), lq.QuantizationAwareTraining("int8")
    loaders = [loader(8), loader(8, seed=3)] if validation else None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*verified.*")
        trainer(tmp_path, [callback]).fit(module, loader(), loaders)
    assert callback.certificate.passed
    assert (callback.certificate.output_sqnr_db is not None) == validation  # the step's own return value


def test_what_is_converted_after_the_fit_is_saved_with_its_certificate(tmp_path):
    module, callback, _ = fit(tmp_path)
    quantized = lq.convert(module)
    lq.save_quantized(quantized, tmp_path / "model")
    assert lq.read_certificate(tmp_path / "model") == callback.certificate
    assert {metric.name for metric in callback.certificate.metrics} >= {"val/loss"}
    again = lq.convert(module, verify=[torch.randn(2, 1, 8, 8)])
    assert lq.transforms.parity_report(again).batches == 1  # the newer one
    assert again.__dict__.keys() == quantized.__dict__.keys()


def test_what_changed_after_the_fit_has_no_certificate(tmp_path):
    module, _, _ = fit(tmp_path)
    with torch.no_grad():
        module.head.bias[0] += 1.0
    lq.save_quantized(lq.convert(module), tmp_path / "model")
    assert lq.read_certificate(tmp_path / "model") is None
