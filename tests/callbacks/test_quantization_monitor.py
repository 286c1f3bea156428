"""The monitor measures what is there, within its budget, and training is the same without it."""

import copy
import csv
import math

import pytest
import torch
from classifier import Classifier, StopBeforeEpoch, loader, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import nn

import lightning_qat as lq
from lightning_qat.callbacks.layer_sample import LayerSample, sampling


def fit(tmp_path, *callbacks, config="int8", module=None, **options):
    module = module or Classifier()
    qat = lq.QuantizationAwareTraining(config, certify=False)
    run = trainer(tmp_path, [qat, *callbacks], num_sanity_val_steps=0, **options)
    run.fit(module, loader(), loader(8))
    return run, module


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


PLANS = {
    "int8": "int8",
    "dynamic": "int8_dynamic",
    "per tensor": lq.QATConfig("int8", bits=4),
    "asymmetric": lq.QATConfig("int8", symmetric=False, activation_symmetric=True, per_channel=True),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_numbers_are_those_of_the_definition(plan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    lq.calibrate(lq.prepare(model, plan), [torch.randn(64, 16)])
    layer, x = model[0].eval(), 2 * torch.randn(64, 16)
    with sampling(LayerSample({"0": layer})) as sample:
        model(x)
    row = sample.measure()["0"]
    weight = layer.quantized_weight()
    assert row["weight_sqnr_db"] == pytest.approx(lq.sqnr(layer.weight, weight).item(), rel=1e-4)
    assert row["weight_zero_fraction"] == pytest.approx((weight == 0).float().mean().item())
    assert row["weight_scale"] == pytest.approx(layer.weight_quantizer.parameters_for(layer.weight)[0].mean().item())
    assert row["weight_clip_rate"] == 0
    quantized = layer.quantized_input(x)
    assert row["input_sqnr_db"] == pytest.approx(lq.sqnr(x, quantized).item(), rel=1e-4)
    if plan == "int8_dynamic":
        assert row["input_clip_rate"] == 0
    else:
        beyond = (x - quantized).abs() > 0.5001 * layer.input_quantizer.scale
        assert row["input_clip_rate"] == pytest.approx(beyond.float().mean().item())
        assert row["input_clip_rate"] > 0


@pytest.mark.parametrize("shape", [(4, 200_003), (3, 70_001, 4)])
def test_large_inputs_are_looked_at_in_part(shape):
    torch.manual_seed(0)
    for plan in ("int8", "int8_dynamic"):
        layer = lq.prepare(nn.Sequential(nn.Linear(shape[-1], 2)), plan)
        x = torch.randn(shape)
        lq.calibrate(layer, [x[:, ::7] if len(shape) == 3 else x])
        with sampling(LayerSample({"0": layer[0]})) as sample, torch.no_grad():
            layer.eval()(x)
        assert sample.inputs["0"].values.numel() <= max(2**16, shape[-1])
        sampled = sample.measure()["0"]["input_sqnr_db"]
        assert sampled == pytest.approx(lq.sqnr(x, layer[0].quantized_input(x)).item(), abs=0.5)


def test_training_is_the_same_without(tmp_path):
    """Witness: the run without a monitor, bit for bit."""
    monitor, runs = lq.QuantizationMonitor(3, most_share=None), []
    for callbacks in ([], [monitor]):
        torch.manual_seed(5)
        run, module = fit(tmp_path, *callbacks, max_epochs=2, accumulate_grad_batches=2)
        runs.append((module, torch.get_rng_state(), run.callback_metrics, hooks(module)))
    (plain, state, metrics, plain_hooks), (ours, our_state, our_metrics, our_hooks) = runs
    mine = ours.state_dict()
    assert all(torch.equal(v, mine[k]) for k, v in plain.state_dict().items() if isinstance(v, torch.Tensor))
    assert torch.equal(state, our_state)
    assert metrics == our_metrics
    assert plain_hooks == our_hooks
    assert [row["layer"] for row in monitor.table] == ["conv", "head"]
    assert monitor.table[0]["step"] == 6
    assert "head" in monitor.explain()


def test_scalars_and_a_table_reach_the_loggers(tmp_path):
    class Text(Logger):
        name, version = "text", 0
        texts, scalars = {}, []
        experiment = property(lambda self: self)

        def add_text(self, name, text, step):
            self.texts[name] = text

        def log_metrics(self, metrics, step=None):
            self.scalars.append((step, dict(metrics)))

        def log_hyperparams(self, *_):
            pass

    class Tables(Text):
        def log_table(self, key, columns, data):
            self.texts[key + " of W&B"] = dict(zip(columns, data[1], strict=True))

    text, files = Text(), CSVLogger(tmp_path, name="", version="csv")
    monitor = lq.QuantizationMonitor(4, most_share=None)
    fit(tmp_path, monitor, logger=[text, files, Tables()])
    assert text.texts["quantization_layers of W&B"] == monitor.table[1]
    sampled = [(step, m) for step, m in text.scalars if "quantization/weight_sqnr_db/worst" in m]
    assert [step for step, _ in sampled[::2]] == [0, 4]
    worst = min(row["input_sqnr_db"] for row in monitor.table)
    assert sampled[-1][1]["quantization/input_sqnr_db/worst"] == worst
    assert sampled[-1][1]["quantization/weight_scale_drift/mean"] > 0
    assert text.texts["quantization_layers"].count("\n") == 3
    rows = list(csv.DictReader((tmp_path / "csv" / "quantization_layers.csv").open()))
    assert [row["layer"] for row in rows] == ["conv", "head"]
    assert float(rows[0]["weight_scale_drift_total"]) == monitor.table[0]["weight_scale_drift_total"] > 0
    assert "quantization/input_clip_rate/mean" in (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0]


def test_the_interval_grows_with_the_cost(tmp_path):
    monitor = lq.QuantizationMonitor(1)
    monitor.sample_seconds, _ = 0.5, monitor._durations.extend([0.1, 0.1, 9.0])
    assert monitor.interval == math.ceil(0.5 / 0.1 / 0.01)
    for seconds, last in ((1e-6, 0), (1e6, 7)):

        class Timed(lq.QuantizationMonitor):
            step_seconds = seconds

        monitor = Timed(1)
        fit(tmp_path, monitor)
        assert monitor.table[0]["step"] == last
    with pytest.raises(ValueError, match="most_share=2"):
        lq.QuantizationMonitor(most_share=2)


def test_a_resumed_run_keeps_its_first_scales(tmp_path):
    """Witness: the run that was not interrupted."""
    saver = ModelCheckpoint(tmp_path / "c", filename="last", save_on_train_epoch_end=True)
    whole = lq.QuantizationMonitor(3, most_share=None)
    _, witness = fit(tmp_path, whole, max_epochs=2)
    broken = [lq.QuantizationMonitor(3, most_share=None), StopBeforeEpoch(1), saver]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, *broken, max_epochs=2, enable_checkpointing=True)
    monitor, module = lq.QuantizationMonitor(3, most_share=None), Classifier(seed=8)
    qat = lq.QuantizationAwareTraining("int8", certify=False)
    run = trainer(tmp_path, [qat, monitor], max_epochs=2, num_sanity_val_steps=0)
    run.fit(module, loader(), loader(8), ckpt_path=tmp_path / "c" / "last.ckpt", weights_only=True)
    assert monitor.table == whole.table
    assert torch.equal(module.conv.weight, witness.conv.weight)


class BreaksAScale(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            with torch.no_grad():
                pl_module.conv.weight_quantizer.learned.exponent.fill_(math.nan)


def test_a_learned_scale_that_broke_is_left_to_those_who_roll_back(tmp_path):
    monitor = lq.QuantizationMonitor(1, most_share=None)
    reduction = lq.PlateauBitReduction([8, 4], every_n_steps=2, patience=1, min_delta=1.0)
    config = lq.QATConfig("int8", learnable_step_size=True)
    callbacks = [lq.QuantizationAwareTraining(config), BreaksAScale(), monitor, reduction]
    with pytest.warns(UserWarning, match="rolled back at step 7"):
        trainer(tmp_path, callbacks, max_epochs=2).fit(Classifier(), loader())
    assert monitor.table[0]["step"] == 15
    assert all(math.isfinite(row["weight_scale"]) for row in monitor.table)


def test_no_hook_stays_when_a_step_fails(tmp_path):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            self(batch[0])
            if self.trainer.global_step or self.conv.weight_quantizer.calls:
                raise RuntimeError("broken step")

    module = Failing()
    lq.prepare(module, "int8")
    module.conv.weight_quantizer.calls = 0
    before = hooks(module)
    forward = module.forward

    def counted(x):
        module.conv.weight_quantizer.calls += module.trainer.training and hooks(module) > before
        return forward(x)

    module.forward = counted
    with pytest.raises(RuntimeError, match="broken step"):
        fit(tmp_path, lq.QuantizationMonitor(), module=module)
    assert module.conv.weight_quantizer.calls
    assert hooks(module) == before


def test_a_compiled_module_is_sampled_without_another_compilation(tmp_path):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            self.body = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), backend=backend)

        def forward(self, x):
            return self.head(self.body(torch.relu(self.bn(self.conv(x))).mean((2, 3))))

    counts, states = [], []
    start = copy.deepcopy(Compiled().body.state_dict())
    for callbacks in ([], [lq.QuantizationMonitor(2, most_share=None)]):
        torch._dynamo.reset()
        compiled.clear()
        module = Compiled()
        module.body.load_state_dict(start)
        fit(tmp_path, *callbacks, module=module)
        counts.append(len(compiled))
        states.append([v for v in module.state_dict().values() if isinstance(v, torch.Tensor)])
    assert counts[0] == counts[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    rows = {row["layer"]: row for row in callbacks[0].table}
    assert rows["head"]["input_sqnr_db"] is not None
