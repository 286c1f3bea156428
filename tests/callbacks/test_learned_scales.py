"""Learned scales in a Trainer: the optimizer, the schedule, resuming, clipping, ranks, averaging.

As a script it is one of two ranks: ``python test_learned_scales.py <folder>``.
"""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from classifier import Classifier, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from ranks import Plain
from ranks import loader as ranks_loader
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

import lightning_qat as lq
from lightning_qat.callbacks import LearnedScales
from lightning_qat.testing import assert_resume_exact
from lightning_qat.transforms.param_groups import learned_scales, quantization_param_groups

CONFIG = lq.QATConfig("int4", activation_bits=4, learnable_step_size=True, per_channel=True)


def qat(**kwargs):
    return lq.QuantizationAwareTraining(CONFIG, **{"calibration_batches": 2, "certify": False, **kwargs})


def learned_of(module):
    return {k: v.detach().clone() for k, v in module.named_parameters() if ".learned." in k}


class Configured(Classifier):
    """With a ``configure_optimizers`` that is given."""

    def __init__(self, configure=None):
        super().__init__()
        self.configure = configure

    def configure_optimizers(self):
        return super().configure_optimizers() if self.configure is None else self.configure(self)


class Two(Configured):
    """Two optimizers, by hand."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()


def adam(module, parameters=None):
    return torch.optim.AdamW(module.parameters() if parameters is None else parameters, 0.01, weight_decay=0.5)


def with_dict(m):
    o = adam(m)
    return {"optimizer": o, "lr_scheduler": {"scheduler": OneCycleLR(o, 0.02, total_steps=8), "interval": "step"}}


def with_plateau(m):
    o = adam(m)
    return {"optimizer": o, "lr_scheduler": ReduceLROnPlateau(o), "monitor": "val/loss"}


def with_lists(m):
    o = adam(m)
    return [o], [{"scheduler": LambdaLR(o, lambda step: 1 / (step + 1)), "interval": "step"}]


def by_hand(m):
    return torch.optim.AdamW([m.conv.weight, m.head.weight], 0.01, weight_decay=0.5)


def grouped(m):
    return torch.optim.AdamW(quantization_param_groups(m, 0.01, 0.03), weight_decay=0.5)


def two_dicts(m):
    first, second = adam(m, m.conv.parameters()), adam(m, m.head.parameters())
    return [{"optimizer": first, "lr_scheduler": StepLR(first, 1)}, {"optimizer": second}]


def two_optimizers(m):
    return adam(m, m.conv.parameters()), adam(m, [m.head.weight])


FORMS = {
    "one": (Configured, adam),
    "list": (Configured, lambda m: [adam(m)]),
    "lists": (Configured, with_lists),
    "dict": (Configured, with_dict),
    "dict with monitor": (Configured, with_plateau),
    "list of one dict": (Configured, lambda m: [with_dict(m)]),
    "selected by hand": (Configured, by_hand),
    "groups by hand": (Configured, grouped),
    "list of dicts": (Two, two_dicts),
    "tuple": (Two, two_optimizers),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_scales_are_in_groups_of_their_own_for_every_form(tmp_path, form):
    kind, configure = FORMS[form]
    module, run = kind(configure), trainer(tmp_path, [qat()])
    run.fit(module, loader(), loader())
    ids = {id(p) for learned in learned_scales(module) for p in learned.parameters()}
    seen = []
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            inside = {id(p) for p in group["params"]}
            assert inside <= ids or not inside & ids
            if inside and inside <= ids:
                assert group["weight_decay"] == 0
                seen += inside
            else:
                assert group["weight_decay"] == 0.5 or form == "groups by hand"
    assert sorted(seen) == sorted(ids)
    for config in run.lr_scheduler_configs:
        assert len(config.scheduler._last_lr) == len(config.scheduler.optimizer.param_groups)
    if form == "groups by hand":
        assert [g["lr"] for g in run.optimizers[0].param_groups] == [0.01, 0.03]
    fresh = lq.prepare(Configured(), CONFIG)
    assert any((learned_of(module)[k] != v).any() for k, v in learned_of(fresh).items())
    assert "configure_gradient_clipping" not in vars(module)
    lq.convert(module.eval(), verify=[torch.randn(4, 1, 8, 8)])


@pytest.mark.filterwarnings("ignore")
def test_no_optimizer_is_fine(tmp_path):
    trainer(tmp_path, [qat()]).fit(Configured(lambda m: None), loader())


def test_a_learning_rate_of_their_own_goes_through_the_schedule(tmp_path):
    run = trainer(tmp_path, [LearnedScales(lr=0.001), qat()], limit_train_batches=3)
    run.fit(Configured(with_lists), loader())
    rest, scales = run.optimizers[0].param_groups
    assert scales["lr"] == pytest.approx(rest["lr"] / 10)


# --- when -----------------------------------------------------------------------------------------


class Steps(L.Callback):
    def __init__(self):
        self.steps, self.norms = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(learned_of(pl_module))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scales_move_from_the_start_until_they_freeze(tmp_path, momentum):
    seen = Steps()
    module = Configured(lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=momentum))
    run = trainer(tmp_path, [qat(start_step=2, freeze_step=5), seen], limit_train_batches=8)
    run.fit(module, loader())
    key = "head.weight_quantizer.learned.exponent"
    moved = [not torch.equal(a[key], b[key]) for a, b in itertools.pairwise(seen.steps)]
    # After step 2 it begins anew, at the start of step 3; the steps 3, 4 and 5 move it.
    assert moved == [False, True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("configure", "options"),
    [
        (with_dict, {"start_step": 3, "freeze_step": 12}),
        (with_lists, {"calibration_batches": 0}),
        (by_hand, {"start_step": 8}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(configure, options):
    def module():
        return Configured(lambda m: long(configure, m))

    assert_resume_exact(module, loader, lambda: [qat(**options)], [8], num_sanity_val_steps=0)


def long(configure, module):
    made = configure(module)
    if isinstance(made, dict):
        o = made["optimizer"]
        made["lr_scheduler"]["scheduler"] = OneCycleLR(o, 0.02, total_steps=16)
    return made


def test_progressive_bits_resume_with_learned_scales():
    def callbacks():
        return [qat(), lq.ProgressiveBitReduction({0: 8, 6: 4, 10: 2})]

    assert_resume_exact(Configured, loader, callbacks, [8], num_sanity_val_steps=0)


# --- clipping -------------------------------------------------------------------------------------


class Norms(L.Callback):
    """Norms of the gradients that the optimizer steps with: of the scales and of the rest."""

    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        scales = [p for k, p in pl_module.named_parameters() if ".learned." in k and p.grad is not None]
        rest = [p for k, p in pl_module.named_parameters() if ".learned." not in k and p.grad is not None]
        if scales and rest:
            self.norms.append([float(nn.utils.get_total_norm([p.grad for p in ps])) for ps in (scales, rest)])


@pytest.mark.parametrize("kind", [Configured, Two])
def test_gradients_of_scales_are_clipped_by_themselves(tmp_path, kind):
    seen = Norms()
    options = {} if kind is Two else {"gradient_clip_val": 0.5}
    callbacks = [qat(), LearnedScales(clip=1e-4), seen]
    trainer(tmp_path, callbacks, limit_train_batches=4, **options).fit(kind(), loader())
    assert len(seen.norms) >= 3
    for scales, rest in seen.norms:
        assert scales == pytest.approx(1e-4, rel=1e-3) or scales < 1e-4
        assert rest <= 0.5 + 1e-4
    assert any(scales > 0.9e-4 for scales, _ in seen.norms)


def test_the_weights_gradients_are_clipped_as_if_there_were_no_scales(tmp_path):
    """Gradients of scales a thousand times larger change nothing about the weights' step."""
    states = []
    for factor in (1.0, 1000.0):

        class Larger(Configured):
            larger = factor

            def on_before_optimizer_step(self, optimizer):
                for key, p in self.named_parameters():
                    if ".learned." in key and p.grad is not None:
                        p.grad.mul_(self.larger)

        module = Larger(lambda m: torch.optim.SGD(m.parameters(), 0.05))
        run = trainer(tmp_path, [LearnedScales(clip=None), qat()], limit_train_batches=1, gradient_clip_val=0.01)
        run.fit(module, loader())
        states.append(module.head.weight.detach().clone())
    assert torch.equal(*states)


# --- errors ---------------------------------------------------------------------------------------


def test_a_broken_scale_stops_the_run_and_is_not_saved(tmp_path):
    class Breaks(Configured):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            with torch.no_grad():
                self.head.weight_quantizer.learned.exponent.fill_(float("nan"))

    with pytest.raises(ValueError, match="scale is NaN for the weight of layer 'head'"):
        trainer(tmp_path, [qat(), LearnedScales(check_every=1)], limit_train_batches=3).fit(Breaks(), loader())
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(ValueError, match="layer 'head'"):
        trainer(tmp_path, [qat(), saver], enable_checkpointing=True).fit(Breaks(), loader())
    assert not list(tmp_path.glob("*.ckpt"))


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="lr=-1"):
        LearnedScales(lr=-1)
    with pytest.raises(ValueError, match="clip=0"):
        LearnedScales(clip=0)


def test_a_model_without_learned_scales_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no learned scale"):
        trainer(tmp_path, [LearnedScales()]).fit(Configured(), loader())


def test_alone_on_a_model_prepared_by_hand(tmp_path):
    module = lq.prepare(Configured(), CONFIG)
    before = learned_of(module)
    trainer(tmp_path, [LearnedScales()]).fit(module, loader())
    assert all((before[k] != v).any() for k, v in learned_of(module).items() if "exponent" in k)


# --- averaging and ranks --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("average", [WeightAveraging, lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1)])
def test_weights_are_averaged_and_scales_are_not(tmp_path, average):
    seen = Steps()
    module = Configured()
    trainer(tmp_path, [qat(), seen, average()], max_epochs=4).fit(module, loader())
    last = seen.steps[-1]
    for key, value in learned_of(module).items():
        torch.testing.assert_close(value, last[key], rtol=0, atol=0, msg=key)
    lq.convert(module.eval(), verify=[torch.randn(4, 1, 8, 8)])


def fit_on(folder, world, rank):
    """A run with a float phase, a learning one and a frozen one; DDP looks for no unused parameters."""
    ranks = dict(devices=world, strategy=DDPStrategy()) if world > 1 else {}
    options = dict(max_epochs=2, num_sanity_val_steps=0, use_distributed_sampler=False, **ranks)
    module, seen = Plain(), Steps()
    run = trainer(folder, [qat(start_step=2, freeze_step=6), seen], **options)
    run.fit(module, ranks_loader(world, rank))
    return seen.steps


@pytest.mark.slow
def test_two_ranks_have_the_same_scales_and_are_one_with_twice_the_batch(tmp_path):
    first, second = run_two(tmp_path)
    for mine, theirs in zip(first, second, strict=True):
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key
    alone = fit_on(tmp_path, 1, 0)
    assert len(alone) == len(first) == 8
    for mine, theirs in zip(first, alone, strict=True):
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=key)
    steps = [step["head.weight_quantizer.learned.exponent"] for step in first]
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(steps)][-1] is False
    assert not torch.equal(steps[3], steps[4])


def run_two(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1"}  # fmt: skip
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    both["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, __file__, str(folder)]
    logs = [(folder / f"{rank}.log").open("w") for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **both, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=logs[r], stderr=logs[r]
        )
        for r in (0, 1)
    ]
    try:
        for rank, process in enumerate(ranks):
            if process.wait(timeout=120):
                raise RuntimeError((folder / f"{rank}.log").read_text()[-3000:])
    finally:
        for process in ranks:
            process.kill()
        for log in logs:
            log.close()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    me = torch.distributed.get_rank()
    torch.save(fit_on(sys.argv[1], 2, me), f"{sys.argv[1]}/{me}.pt")
