"""Only checkpoints of the quantized phase, measured in it, can be the best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from classifier import Classifier, StopBeforeEpoch, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_qat as lq


class Worsening(Classifier):
    """Its validation metric gets worse with every step: what was float is always the best."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("score", float(self.trainer.global_step))


def fit(tmp_path, *savers, start=8, callbacks=(), **options):
    qat = [lq.DelayedQATStart(start), *callbacks]
    run = trainer(tmp_path, [*qat, *savers], enable_checkpointing=True, **{"max_epochs": 3, **options})
    module = Worsening()
    run.fit(module, loader(), loader(8))
    return run, module


def steps(paths):
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in paths)


def quantizing(path):
    return torch.load(path, weights_only=True)["state_dict"]["head.weight_quantizer._extra_state"]["quantizing"]


@pytest.mark.parametrize("top", [1, 2, -1])
def test_best_is_quantized(tmp_path, top):
    """Witness: Lightning's own callback, which takes the float checkpoint of step 8."""
    ours = lq.QuantizedModelCheckpoint(tmp_path / "ours", monitor="score", save_top_k=top, save_last=True)
    plain = ModelCheckpoint(tmp_path / "plain", monitor="score", save_top_k=top)
    fit(tmp_path, ours, plain, start=9)
    assert steps([plain.best_model_path]) == [8]
    assert not quantizing(plain.best_model_path)
    assert steps([ours.best_model_path]) == [16]
    assert steps(ours.best_k_models) == ([16, 24] if top != 1 else [16])
    assert all(quantizing(path) for path in ours.best_k_models)
    assert Path(ours.last_model_path).name == "last.ckpt"
    assert steps([ours.last_model_path]) == [24 if top != 1 else 16]  # ModelCheckpoint: only where it saved


def test_the_float_phase_writes_last_only(tmp_path):
    saver = lq.QuantizedModelCheckpoint(tmp_path / "c", monitor="score", save_last=True)
    with pytest.warns(UserWarning, match="no best checkpoint: none of the quantized phase was due until step 24"):
        fit(tmp_path, saver, start=1000)
    assert (saver.best_model_path, saver.best_k_models) == ("", {})
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["last.ckpt"]
    assert steps([saver.last_model_path]) == [24]


def test_a_metric_measured_in_float_does_not_count(tmp_path):
    """Step 12 is quantized; its metric is of the validation of step 8, which was not."""
    options = dict(monitor="score", every_n_train_steps=6, save_top_k=-1)
    ours = lq.QuantizedModelCheckpoint(tmp_path / "ours", **options)
    plain = ModelCheckpoint(tmp_path / "plain", **options)
    fit(tmp_path, ours, plain, start=9)
    theirs, found = ({(int(score), steps([path])[0]) for path, score in s.best_k_models.items()} for s in (plain, ours))
    assert (8, 12) in theirs
    assert found == {(score, step) for score, step in theirs if score > 8} != set()


@pytest.mark.parametrize("options", [dict(every_n_train_steps=5), dict(every_n_epochs=1), dict()], ids=str)
def test_without_a_metric_the_last_quantized_is_best(tmp_path, options):
    saver = lq.QuantizedModelCheckpoint(tmp_path / "c", save_top_k=-1, **options)
    fit(tmp_path, saver, start=12)
    saved = steps(tmp_path.glob("c/*.ckpt"))
    assert saved == ([15, 20] if "every_n_train_steps" in options else [16, 24])
    assert steps([saver.best_model_path]) == saved[-1:]


def test_only_the_final_bits_count(tmp_path):
    reduction = lq.ProgressiveBitReduction({0: 8, 17: 4})
    ours = lq.QuantizedModelCheckpoint(tmp_path / "ours", monitor="score", save_top_k=-1)
    other = lq.QuantizedModelCheckpoint(tmp_path / "any", monitor="score", save_top_k=-1, final_bits_only=False)
    fit(tmp_path, ours, other, start=9, callbacks=[reduction])
    assert (steps(ours.best_k_models), steps(other.best_k_models)) == ([24], [16, 24])


def test_a_link_leads_to_what_was_saved(tmp_path):
    saver = lq.QuantizedModelCheckpoint(tmp_path / "c", save_last="link", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, saver, start=8, max_epochs=1, limit_train_batches=7)
    assert not Path(saver.last_model_path).is_symlink()
    assert steps([saver.last_model_path]) == [7]  # at the end of the epoch too, as a link would
    saver = lq.QuantizedModelCheckpoint(tmp_path / "d", save_last="link", every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, saver, start=6, max_epochs=1)
    assert Path(saver.last_model_path).is_symlink()
    assert steps([saver.last_model_path]) == [8]


def test_it_goes_on_after_a_resume(tmp_path):
    """Witness: the run that was not interrupted."""

    def savers(folder):
        options = dict(monitor="score", save_top_k=2, mode="max")
        return [
            lq.QuantizedModelCheckpoint(tmp_path / folder, filename="{step}", **options),
            lq.QuantizedModelCheckpoint(tmp_path / folder, filename="n{step}", every_n_train_steps=8, save_top_k=-1),
        ]

    whole = savers("whole")
    fit(tmp_path, *whole, start=9, max_epochs=4)
    first, keeper = savers("broken"), ModelCheckpoint(tmp_path / "k", filename="k", save_on_train_epoch_end=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, *first, keeper, start=9, max_epochs=4, callbacks=[StopBeforeEpoch(3)])
    resumed = savers("broken")
    run = trainer(tmp_path, [lq.DelayedQATStart(9), *resumed], enable_checkpointing=True, max_epochs=4)
    run.fit(Worsening(seed=5), loader(), loader(8), ckpt_path=tmp_path / "k" / "k.ckpt", weights_only=True)
    for ours, theirs in zip(resumed, whole, strict=True):
        names = [{Path(path).name: score for path, score in saver.best_k_models.items()} for saver in (ours, theirs)]
        assert names[0] == names[1]
        assert Path(ours.best_model_path).name == Path(theirs.best_model_path).name
    assert steps(resumed[0].best_k_models) == [24, 32]


def test_best_is_what_test_loads(tmp_path):
    saver = lq.QuantizedModelCheckpoint(tmp_path / "c", monitor="score")
    run, module = fit(tmp_path, saver, start=9)
    run.test(module, loader(8), ckpt_path="best", verbose=False)
    assert module.record[-1][2][0]


def test_a_trainer_without_quantization_is_refused(tmp_path):
    run = trainer(tmp_path, [lq.QuantizedModelCheckpoint(tmp_path / "c")], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"QuantizedModelCheckpoint .* no quantization callback; add one"):
        run.fit(Classifier(), loader())
    run.test(Classifier(), loader(8), verbose=False)


IN_PYTORCH_LIGHTNING = """
import sys
import lightning_qat as lq
gap = lq.QuantizationGap(limit_batches=2)
import pytorch_lightning as pl
import torch
from torch import nn

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().sum()
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.net(batch).square().sum())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

monitor = lq.QuantizationMonitor(most_share=None)
saver = lq.QuantizedModelCheckpoint(sys.argv[1], monitor="quantization_gap/loss")
callbacks = [saver, lq.DelayedQATStart(9), monitor, gap]
trainer = pl.Trainer(callbacks=callbacks, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                     enable_model_summary=False, check_val_every_n_epoch=2)
data = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=4)
trainer.fit(Module(), data, data)
assert trainer.checkpoint_callback is saver and trainer.callbacks[-1] is saver
assert "step=16" in saver.best_model_path, saver.best_model_path
assert len(monitor.table) == 2
"""


def test_projects_that_import_pytorch_lightning_have_the_three(tmp_path):
    pytest.importorskip("pytorch_lightning", reason="it is a dependency of lightning")
    run = [sys.executable, "-W", "ignore", "-c", IN_PYTORCH_LIGHTNING, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
