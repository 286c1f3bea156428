"""A compiled module is distilled in every fit, and in none that does not ask for it."""

import lightning as L
import pytest
import torch
from classifier import loader, trainer
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq


class Compiled(L.LightningModule):
    """Does not log: with torch 2.13 Lightning's own ``self.log`` fails in a compiled ``training_step``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, module, *, compiled, distilled):
    callbacks = [lq.QuantizationAwareTraining("w4a4", start_step=1, certify=False)]
    callbacks += [lq.SelfDistillation(5.0)] if distilled else []
    given = torch.compile(module, backend="eager") if compiled else module
    run = trainer(folder, callbacks, max_epochs=1)
    run.fit(given, loader(), loader(8))
    return run.callback_metrics.get("quantization/distillation_loss")


@pytest.mark.parametrize(("before", "wanted"), [(False, (True, False)), (True, (False, True)), (False, (False, True))])
def test_graphs_of_another_fit_are_not_used(tmp_path, before, wanted):
    """Of another module, and of the same one again; graphs are kept by the code of ``training_step``."""
    torch.compiler.reset()
    fit(tmp_path, Compiled(), compiled=True, distilled=before)
    found = []
    for compiled in (True, False):
        module = Compiled()
        losses = [fit(tmp_path, module, compiled=compiled, distilled=distilled) for distilled in wanted]
        assert [loss is not None and bool(loss > 0) for loss in losses] == list(wanted)
        found.append(module)
    for mine, eager in zip(*(module.parameters() for module in found), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)
