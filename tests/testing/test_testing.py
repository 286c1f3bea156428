"""What users assert for their own modules holds for a sound one and fails, with the reason, for a broken one."""

from pathlib import Path

import lightning as L
import pytest
import torch
from classifier import Classifier, loader
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq
import lightning_qat.testing
from lightning_qat.testing import (
    assert_compile_fullgraph,
    assert_convert_parity,
    assert_rank_equal,
    assert_resume_exact,
)

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Dropping(Classifier):
    """With dropout and a scheduler."""

    def forward(self, x):
        return self.head(F.dropout(F.relu(self.bn(self.conv(x))), 0.2, self.training).mean((2, 3)))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def qat():
    return [lq.QuantizationAwareTraining("int8", start_step=3, freeze_step=9, certify=False)]


def stateful():
    return StatefulDataLoader(loader().dataset, batch_size=4), loader(8)


def shuffled():
    return loader(shuffle=True), loader(8)


def test_a_sound_module_resumes_exactly(tmp_path):
    before = torch.get_rng_state()
    assert_resume_exact(Dropping, stateful, qat, [1, 3, 8, 10], folder=tmp_path)
    assert_resume_exact(Dropping, shuffled, qat, [8, 16], folder=tmp_path, max_epochs=3)
    assert_resume_exact(Dropping, stateful, qat, [1, 4], folder=tmp_path, accumulate_grad_batches=2)
    assert torch.equal(before, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []


class Forgetful(lq.QuantizationAwareTraining):
    """Starts over on resume: a schedule that is not in the checkpoint."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps = getattr(self, "steps", 0) + 1
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        for layer in (pl_module.conv, pl_module.head):
            layer.weight_quantizer.quantizing = self.steps > 5


class Drawing(lq.QuantizationAwareTraining):
    """Draws random numbers before a batch, as measuring layers on a module that does may."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        with torch.no_grad():
            pl_module.head.bias.add_(torch.rand(()))


def test_random_numbers_of_callbacks_are_those_of_the_uninterrupted_run(tmp_path):
    assert_resume_exact(Classifier, stateful, lambda: [Drawing("int8", certify=False)], [3], folder=tmp_path)


def test_a_broken_resume_is_found(tmp_path):
    broken = lambda: [Forgetful("int8", certify=False)]  # noqa: E731
    with pytest.raises(AssertionError, match=r"after step 8 and resumed, .* after step 9: '.*weight"):
        assert_resume_exact(Classifier, loader, broken, [8], folder=tmp_path)


class Hiding(Classifier):
    """Keeps something that the checkpoint does not have."""

    def training_step(self, batch, batch_idx):
        self.scale = getattr(self, "scale", 1.0) * 0.9
        return self.scale * super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("module", "step", "message"),
    [
        (Classifier, 5, "without the quantization callbacks, .*a loader without state_dict starts its epoch anew"),
        (Hiding, 8, "after step 9: .*plain Lightning.*keeps something that is not in the checkpoint"),
    ],
)
def test_what_is_not_ours_is_told(tmp_path, module, step, message):
    with pytest.raises(AssertionError, match=message):
        assert_resume_exact(module, loader, qat, [step], folder=tmp_path)


def test_a_step_beyond_the_run_is_told(tmp_path):
    with pytest.raises(ValueError, match="interrupt_at=16: the run takes 16 steps"):
        assert_resume_exact(Classifier, loader, qat, [16], folder=tmp_path)


def test_parity_of_a_trained_and_of_a_float_module(tmp_path):
    module = Classifier()
    run = L.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=qat(), default_root_dir=tmp_path, enable_progress_bar=False,
        enable_checkpointing=False, logger=CSVLogger(tmp_path), enable_model_summary=False,
    )  # fmt: skip
    run.fit(module, loader())
    assert assert_convert_parity(module, [X]).passed
    assert module.trainer is run
    plain = Classifier()
    assert_convert_parity(plain, [X])
    assert type(plain.conv) is nn.Conv2d


def test_parity_that_does_not_hold_names_the_layer():
    class Cheating(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2.0 if isinstance(self, lq.nn.QATLayer) else 1.0)

    model = nn.Sequential(nn.Linear(8, 8), Cheating(8, 2))
    with pytest.raises(AssertionError, match="converted, Sequential is not the module that trained: .*'1'"):
        assert_convert_parity(model, [torch.randn(4, 8)])


def test_a_sound_module_compiles():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert_compile_fullgraph(model, torch.randn(4, 8))
    assert type(model[0]) is nn.Linear


def test_a_graph_break_is_told():
    class Printing(nn.Linear):
        def forward(self, x):
            if x.sum() > 0:
                return super().forward(x)
            return super().forward(-x)

    torch._dynamo.reset()
    with pytest.raises(AssertionError, match="Sequential does not compile as one graph without quantization either"):
        assert_compile_fullgraph(nn.Sequential(Printing(8, 2)), torch.randn(4, 8))

    class Breaking(nn.Linear):
        def forward(self, x):
            if isinstance(self, lq.nn.QATLayer) and x.sum() > 0:
                return super().forward(x)
            return super().forward(-x)

    with pytest.raises(AssertionError, match="does not compile as one graph in float training: .*"):
        assert_compile_fullgraph(nn.Sequential(Breaking(8, 2)), torch.randn(4, 8))


def alone():
    return [lq.QuantizationAwareTraining("int8", certify=False)]


class Different(Classifier):
    """Puts something of its rank into a weight."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.head.bias.add_(self.trainer.global_rank * (self.trainer.global_step == 1))
        return loss


RANKS = dict(max_epochs=1, limit_train_batches=3, start_method="fork")


def test_ranks_are_equal(tmp_path):
    assert_rank_equal(Classifier, loader, alone, folder=tmp_path, **RANKS)


def test_ranks_that_differ_are_told(tmp_path):
    message = "rank 1 differs from rank 0 after step 2: 'head.bias'"
    with pytest.raises(AssertionError, match=message):
        assert_rank_equal(Different, loader, alone, folder=tmp_path, **RANKS)


def watched():
    return [*alone(), lq.QuantizationMonitor(1, most_share=None), lq.QuantizationGap(), lq.QuantizationGap("val/loss")]


def with_validation():
    return loader(), loader(8)


def test_monitor_and_gap_run_on_ranks(tmp_path):
    assert_rank_equal(Classifier, with_validation, watched, folder=tmp_path, num_sanity_val_steps=0, **RANKS)


def test_processes_may_be_spawned(tmp_path):
    assert_rank_equal(Classifier, loader, list, folder=tmp_path, **{**RANKS, "start_method": "spawn"})


def test_functions_made_in_a_test_run_on_ranks_too(tmp_path):
    class Local(Classifier):
        pass

    options = {"max_epochs": 1, "limit_train_batches": 2}
    assert_rank_equal(lambda: Local(), loader, lambda: alone(), folder=tmp_path, **options)


def test_a_rank_that_fails_is_told(tmp_path):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="(?s)a rank failed.*no memory"):
        assert_rank_equal(Failing, loader, alone, folder=tmp_path, **RANKS)


def test_pytest_is_imported_by_the_plugin_only():
    files = Path(lightning_qat.testing.__file__).parent.glob("*.py")
    assert [file.name for file in files if "import pytest" in file.read_text()] == ["plugin.py"]


pytest_plugins = ["pytester"]


def test_the_plugin_offers_them_as_fixtures(pytester):
    pytester.makepyfile(
        """
        from torch import nn
        import torch

        def test_parity(assert_convert_parity):
            assert_convert_parity(nn.Sequential(nn.Linear(4, 2)), [torch.randn(3, 4)])

        def test_wrong(assert_compile_fullgraph, assert_resume_exact, assert_rank_equal):
            assert assert_resume_exact.keywords == assert_rank_equal.keywords
            raise AssertionError("told")
        """
    )
    # By name, whether or not the package that is installed offers it by itself.
    options = ("no:lightning_qat", "lightning_qat.testing.plugin", "no:cacheprovider")
    result = pytester.runpytest_inprocess(*(part for option in options for part in ("-p", option)))
    result.assert_outcomes(passed=1, failed=1)
