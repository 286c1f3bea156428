"""Progress bars, loggers, LightningCLI and Fabric."""

import pytest
import torch
from classifier import Classifier, loader
from lightning.fabric import Fabric
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger
from together import assert_ships, fit, qat
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.nn import QuantizedLayer
from lightning_qat.ops import workspace


@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_progress_bars(tmp_path, bar, capsys):
    callbacks = [qat(), getattr(lightning_callbacks, bar)(), lightning_callbacks.RichModelSummary()]
    module, _ = fit(tmp_path, callbacks, enable_progress_bar=True, enable_model_summary=True)
    out, err = capsys.readouterr()
    assert "8/8" in out + err
    assert_ships(module, callbacks[0])


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_loggers(tmp_path, kind):
    if kind == "tensorboard":
        pytest.importorskip("tensorboard", reason="TensorBoardLogger needs it")
        from lightning.pytorch.loggers import TensorBoardLogger as Logger
    else:
        Logger = CSVLogger  # noqa: N806
    logger, callback = Logger(tmp_path), qat()
    module, _ = fit(tmp_path, [callback, lightning_callbacks.LearningRateMonitor()], logger=logger)
    assert_ships(module, callback)
    logger.finalize("success")
    if kind == "csv":
        header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"train/loss", "val/loss", "lr-SGD", "parity/output_sqnr", "parity/worst_layer_sqnr"} <= set(header)
    else:
        assert list((tmp_path / "lightning_logs" / "version_0").glob("events.*"))


CONFIGS = {
    "preset": """
      init_args:
        config: w4a8
        start_step: 2
    """,
    "config": """
      init_args:
        config: {scheme: int4, bits: 4, freeze_step: 0.5}
    """,
    "plan": """
      init_args:
        start_step: 0.5 epochs
        plan:
          base: int8
          rules:
            - {match: head}
            - {match: conv, weight: w4a8}
    """,
}
STEPS = {"preset": (2, None), "config": (0, 0.5), "plan": ("0.5 epochs", None)}


@pytest.mark.parametrize("name", CONFIGS)
def test_lightning_cli(tmp_path, name):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
    from lightning.pytorch.cli import LightningCLI

    path = tmp_path / "config.yaml"
    path.write_text(
        "trainer:\n  max_epochs: 1\n  accelerator: cpu\n  logger: false\n  enable_progress_bar: false\n"
        "  enable_checkpointing: false\n  callbacks:\n    - class_path: lightning_qat.QuantizationAwareTraining"
        + CONFIGS[name]
    )
    cli = LightningCLI(Classifier, run=False, args=["--config", str(path)], save_config_callback=None)
    cli.trainer.fit(cli.model, loader(), loader(8, seed=1))
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, lq.QuantizationAwareTraining)]
    assert callback.certificate.passed
    kinds = {name: type(layer).__name__ for name, layer in lq.convert(cli.model).named_modules()}
    assert kinds["head"] == ("Linear" if name == "plan" else "QuantizedLinear")
    assert (callback.start_step, callback.freeze_step) == STEPS[name]
    converted = lq.convert(cli.model)
    assert isinstance(converted.conv, QuantizedLayer)
    assert converted.conv.weight_format.bits == 4


def test_lightning_cli_with_a_scheme_of_its_own_bits(tmp_path):
    """YAML writes every default, so it says ``bits: null`` for a scheme whose bits are not eight."""
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
    from lightning.pytorch.cli import LightningCLI

    path = tmp_path / "config.yaml"
    path.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_qat.QuantizationAwareTraining\n"
        "      init_args:\n        config:\n          class_path: lightning_qat.QATConfig\n"
        "          init_args: {scheme: nf4, bits: null, activation_bits: null}\n"
    )
    cli = LightningCLI(Classifier, run=False, args=["--config", str(path)], save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, lq.QuantizationAwareTraining)]
    assert callback.config == lq.QATConfig("nf4", activation_bits=None)
    assert callback.config.bits == 4


def test_fabric(tmp_path):
    """The example of the README: prepare and calibrate before ``setup``, convert the module afterwards."""
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    model, batches = Classifier(), list(loader())
    lq.prepare(model, "int8")
    lq.calibrate(model, (x for x, _ in batches))
    module, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.05))
    for step, (x, y) in enumerate(fabric.setup_dataloaders(loader())):
        lq.apply_phase(module, lq.Phase(frozen=step >= 6, observing=step < 6))
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(module(x), y))
        optimizer.step()
    fabric.save(tmp_path / "last.ckpt", {"model": module, "optimizer": optimizer})
    quantized = lq.convert(model.eval(), verify=(x for x, _ in batches))

    assert model.head.weight_quantizer.frozen
    assert isinstance(quantized.conv, QuantizedLayer)
    assert isinstance(quantized.bn, nn.Module)
    assert lq.parity_report(quantized).passed
    x = batches[0][0]
    torch.testing.assert_close(quantized(x), module(x), rtol=1e-4, atol=1e-5)
    twin = fabric.setup(lq.prepare(Classifier(seed=3), "int8"))
    fabric.load(tmp_path / "last.ckpt", {"model": twin})
    assert torch.equal(twin.eval()(x), module(x))


def test_memory_of_the_training_step_is_given_back(tmp_path):
    workspace._WORKSPACE.pieces.append(workspace._Piece(2**20))
    fit(tmp_path, [qat()])
    assert not workspace._WORKSPACE.pieces
