"""What a checkpoint of quantization-aware training is good for: in a fresh process, without the callback, in float."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from classifier import Classifier, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_qat as lq


def qat():
    return lq.QuantizationAwareTraining("int8", freeze_step=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: its folder with ``last.ckpt``, its module and what it predicts."""
    folder = tmp_path_factory.mktemp("trained")
    module, saver = Classifier(), ModelCheckpoint(folder, filename="last", every_n_train_steps=8)
    trainer(folder, [qat(), saver], enable_checkpointing=True).fit(module, loader(), loader(8, seed=1))
    return folder, module


def evaluations(callbacks, module, **options):
    """Return what test, validate and predict say."""
    run = trainer(None, callbacks)
    test = run.test(module, loader(8), verbose=False, **options)[0]["test/loss"]
    validation = run.validate(module, loader(8), verbose=False, **options)[0]["val/loss"]
    return test, validation, torch.cat(run.predict(module, loader(8), **options)).tolist()


FRESH = """
import json, sys
import torch
from classifier import Classifier
from test_checkpoints import evaluations, qat
torch.set_num_threads(1)
print(json.dumps(evaluations([qat()], Classifier(seed=7), ckpt_path=sys.argv[1], weights_only=True)))
"""


def test_a_fresh_process_evaluates_what_was_trained(trained):
    folder, module = trained
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])}
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder / "last.ckpt")], env=environment, capture_output=True, text=True
    )
    assert fresh.returncode == 0, fresh.stderr[-2000:]
    assert tuple(json.loads(fresh.stdout.splitlines()[-1])) == evaluations([qat()], module)


@pytest.mark.parametrize("callbacks", [[lq.DelayedQATStart(100)], [lq.QuantizationAwareTraining("int8", start_step=9)]])
def test_other_callbacks_with_the_same_plan_evaluate_it_too(trained, callbacks):
    """The phase is that of the checkpoint, not of their schedule."""
    folder, module = trained
    fresh = evaluations(callbacks, Classifier(seed=7), ckpt_path=folder / "last.ckpt", weights_only=True)
    assert fresh == evaluations([qat()], module)


def test_without_the_callback_it_is_refused_by_name_and_loads_as_plain_float(trained, tmp_path):
    folder, module = trained
    with pytest.raises(RuntimeError, match="conv.weight_quantizer.scale"):
        trainer(tmp_path).test(Classifier(), loader(8), ckpt_path=folder / "last.ckpt", verbose=False)
    path = lq.float_checkpoint(folder / "last.ckpt", tmp_path / "sub" / "float.ckpt")
    plain = Classifier(seed=7)
    plain.load_state_dict(lq.float_state_dict(module.state_dict()))
    expected = evaluations([], plain)
    assert evaluations([], Classifier(seed=8), ckpt_path=path, weights_only=True) == expected
    assert evaluations([], Classifier.load_from_checkpoint(path, weights_only=True)) == expected
    assert evaluations([qat()], Classifier(seed=8), ckpt_path=path) == expected
    prepared = lq.prepare(Classifier(seed=8), "int8")  # a Trainer needs no callback to evaluate a prepared module
    ours = evaluations([], prepared, ckpt_path=folder / "last.ckpt", weights_only=True)
    assert ours == evaluations([qat()], module)
    assert ours != expected


OTHER_PLANS = {
    "bits": "w4a8",
    "codes": lq.QATConfig("int8", per_channel=True, symmetric=False),
    "layers": lq.QuantizationPlan([lq.LayerRule("head")], base="int8"),
    "observer": lq.QATConfig("int8", per_channel=True, activation_observer="histogram"),
}


@pytest.mark.parametrize("plan", OTHER_PLANS.values(), ids=OTHER_PLANS)
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_another_plan_is_told_before_names_and_shapes_do_not_fit(trained, tmp_path, verb, plan):
    run, module = trainer(tmp_path, [lq.QuantizationAwareTraining(plan)], max_epochs=2), Classifier()
    with pytest.raises(ValueError, match="trained with another plan .* give it the same, or take the float weights"):
        getattr(run, verb)(module, loader(8), ckpt_path=trained[0] / "last.ckpt")
    assert "on_load_checkpoint" not in module.__dict__


def test_a_state_dict_of_other_codes_is_told_by_layer(trained):
    prepared = lq.prepare(Classifier(), OTHER_PLANS["codes"])
    with pytest.raises(ValueError, match="WeightQuantizer of layer 'conv' was trained as"):
        prepared.load_state_dict(trained[1].state_dict())


def test_load_from_checkpoint_takes_the_float_weights_or_all(trained):
    folder, module = trained
    path = folder / "last.ckpt"
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Classifier.load_from_checkpoint(path)
    plain = Classifier.load_from_checkpoint(path, strict=False, weights_only=True)
    assert not any(isinstance(layer, lq.QATConv2d) for layer in plain.modules())
    x = torch.randn(3, 1, 8, 8)
    state = torch.load(path, weights_only=True)["state_dict"]
    prepared = lq.prepare(Classifier(seed=7), "int8")
    prepared.load_state_dict(state)
    assert prepared.phase()[:3] == (True, True, 8)
    assert torch.equal(prepared.eval()(x), module.eval()(x))
    assert torch.equal(lq.convert(prepared)(x), lq.convert(module)(x))
    plain_twin = Classifier(seed=7)
    plain_twin.load_state_dict(lq.float_state_dict(state))
    assert torch.equal(plain.eval()(x), plain_twin.eval()(x))


class PreparesItself(Classifier):
    def __init__(self, seed=0):
        super().__init__(seed=seed)
        lq.prepare(self, "int8")


def test_a_module_that_prepares_itself_loads_and_resumes(trained, tmp_path):
    folder, module = trained
    loaded = PreparesItself.load_from_checkpoint(folder / "last.ckpt", weights_only=True)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    run = trainer(tmp_path, [qat()], max_epochs=2)
    run.fit(PreparesItself(seed=7), loader(), ckpt_path=folder / "last.ckpt")
    assert run.global_step == 16


def test_testing_the_best_checkpoint_works_after_a_conversion(tmp_path):
    module, saver = Classifier(), ModelCheckpoint(tmp_path, monitor="val/loss")
    run = trainer(tmp_path, [qat(), saver], enable_checkpointing=True)
    run.fit(module, loader(), loader(8, seed=1))
    before = run.test(module, loader(8), ckpt_path="best", verbose=False)
    converted = lq.convert(module)
    assert run.test(module, loader(8), ckpt_path="best", verbose=False) == before
    shipped = run.test(converted, loader(8), verbose=False)
    assert shipped[0]["test/loss"] == pytest.approx(before[0]["test/loss"], rel=1e-4)
    assert trainer(tmp_path).test(converted, loader(8), verbose=False) == shipped
    for verb in ("test", "validate", "predict"):
        with pytest.raises(ValueError, match="Classifier is converted and holds its weights as integers"):
            getattr(run, verb)(converted, loader(8), ckpt_path="best")
        assert "on_load_checkpoint" not in converted.__dict__


@pytest.mark.parametrize(
    "callbacks",
    [
        [],
        [qat()],
        [lq.ProgressiveBitReduction({0.5: 4}, activations=True), lq.FreezeQuantization("1 epoch")],
        [lq.QuantizationAwareTraining(lq.QuantizationPlan([lq.LayerRule("head", "int8_weight_only")], base="w4a8"))],
        [lq.BatchNormFolding(False), lq.ObserverCalibration(1), lq.DelayedQATStart(2)],
    ],
)
def test_every_checkpoint_loads_with_weights_only_and_becomes_a_float_one(tmp_path, callbacks):
    run = trainer(tmp_path, callbacks)
    run.fit(Classifier(), loader(), loader(8))
    run.save_checkpoint(tmp_path / "all.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("all.ckpt", "weights.ckpt"):
        assert torch.load(tmp_path / name, weights_only=True)["state_dict"]
        plain = lq.float_checkpoint(tmp_path / name, tmp_path / "float.ckpt")
        Classifier.load_from_checkpoint(plain, weights_only=True)
    kept = torch.load(tmp_path / "all.ckpt", weights_only=True)
    content = torch.load(lq.float_checkpoint(tmp_path / "all.ckpt", tmp_path / "float.ckpt"), weights_only=True)
    assert kept.keys() - content.keys() == ({"lightning_qat"} if callbacks else set())


def float_run(folder, **options):
    module, run = Classifier(), trainer(folder, **options)
    run.fit(module, loader(), loader(8))
    run.save_checkpoint(folder / "float.ckpt")
    return module


def test_a_float_checkpoint_starts_quantization_aware_training(tmp_path):
    """Its weights in a new run, as by hand; or ``ckpt_path``: the float run goes on, quantized, at its step."""
    plain = float_run(tmp_path)
    module = Classifier.load_from_checkpoint(tmp_path / "float.ckpt", weights_only=True)
    twin = Classifier(seed=7)
    twin.load_state_dict(plain.state_dict())
    for each in (module, twin):
        run = trainer(tmp_path, [qat()])
        run.fit(each, loader(), loader(8))
        assert run.global_step == 8
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    assert module.phase()[:2] == (True, True)

    callback, on = lq.QuantizationAwareTraining("int8", start_step=10, freeze_step=12), Classifier(seed=7)
    run = trainer(tmp_path, [callback], max_epochs=2)
    run.fit(on, loader(), loader(8), ckpt_path=tmp_path / "float.ckpt", weights_only=True)
    assert run.global_step == 16
    train = {step: phase[:2] for where, step, phase in on.record if where == "train"}
    assert train == {step: (step >= 10, step >= 12) for step in range(8, 16)}
    assert callback.certificate.passed


def test_a_trainer_that_ran_before_begins_anew_with_a_float_checkpoint(tmp_path):
    float_run(tmp_path)
    run = trainer(tmp_path, [lq.QuantizationAwareTraining("int8", calibration_batches=2)])
    run.fit(Classifier(), loader())
    run.fit_loop.max_epochs, module, calls = 2, Classifier(), []
    run.callbacks[0].calibration_forward = lambda: lambda m, batch: calls.append(m(batch[0]))
    run.fit(module, loader(), ckpt_path=tmp_path / "float.ckpt")
    assert len(calls) == 2


def test_the_float_run_goes_on_from_a_quantized_one(trained, tmp_path):
    path = lq.float_checkpoint(trained[0] / "last.ckpt", tmp_path / "float.ckpt")
    module, run = Classifier(seed=7), trainer(tmp_path, max_epochs=2)
    run.fit(module, loader(), loader(8), ckpt_path=path, weights_only=True)
    assert run.global_step == 16
    assert module.record[-1][2] is None


def test_float_checkpoints_are_written_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    source, target = trained[0] / "last.ckpt", tmp_path / "float.ckpt"
    target.write_text("kept")

    def fails(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="no space"):
            lq.float_checkpoint(source, target)
    assert [file.name for file in tmp_path.iterdir()] == ["float.ckpt"]
    assert target.read_text() == "kept"
    lq.float_checkpoint(source, target)
    once = torch.load(target, weights_only=True)["state_dict"]
    assert lq.float_checkpoint(target, str(target)) == target  # in place, and float already
    again = torch.load(target, weights_only=True)["state_dict"]
    assert once.keys() == again.keys() == Classifier().state_dict().keys()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(source.stat().st_mode)


def test_what_is_no_checkpoint_is_told(trained, tmp_path):
    with pytest.raises(ValueError, match="is a folder, as sharded strategies save"):
        lq.float_checkpoint(trained[0], tmp_path / "float.ckpt")
    torch.save(Classifier().state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="no Lightning checkpoint: it has no 'state_dict'"):
        lq.float_checkpoint(tmp_path / "bare.pt", tmp_path / "float.ckpt")
    assert not (tmp_path / "float.ckpt").exists()


def test_the_weights_that_an_average_was_taken_of_become_float_too(trained, tmp_path):
    content = torch.load(trained[0] / "last.ckpt", weights_only=True)
    torch.save({**content, "current_model_state": content["state_dict"]}, tmp_path / "averaged.ckpt")
    path = lq.float_checkpoint(tmp_path / "averaged.ckpt", tmp_path / "float.ckpt")
    assert torch.load(path, weights_only=True)["current_model_state"].keys() == Classifier().state_dict().keys()
