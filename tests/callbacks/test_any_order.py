"""Callbacks that lead the others do what any other would have done in their place."""

import importlib
import pkgutil

import pytest
import torch
from classifier import Classifier, loader, trainer

import lightning_qat as lq
import lightning_qat.callbacks
from lightning_qat.callbacks.base import QuantizationCallback
from lightning_qat.callbacks.schedule import Schedule

CONFIG = lq.QATConfig("int8", per_channel=True, learnable_step_size=True, start_step=2, freeze_step=13)


def callbacks():
    return [
        lq.QuantizationAwareTraining(CONFIG, calibration_batches=2, certify=False),
        lq.LearnedScales(lr=1e-3, clip=0.1),
        lq.ProgressiveBitReduction({0: 8, 5: 6, 9: 4}),
        lq.SelfDistillation(0.5),
        lq.QuantizationPenalty(0.1),
    ]


def trained(folder, order):
    torch.manual_seed(0)
    module, found = Classifier(), callbacks()
    trainer(folder, [found[i] for i in order], max_epochs=2).fit(module, loader())
    return module


@pytest.fixture  # of each test: one of the module would run before threads are limited
def expected(tmp_path_factory):
    module = trained(tmp_path_factory.mktemp("expected"), range(5))
    quantizer = module.head.weight_quantizer
    assert quantizer.quantizing
    assert quantizer.frozen
    assert quantizer.bits == 4
    return module.state_dict()


@pytest.mark.parametrize("first", range(5))
def test_whichever_leads(tmp_path, expected, first):
    order = [first, *(i for i in reversed(range(5)) if i != first)]
    found = trained(tmp_path, order).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


def test_one_that_only_adds_to_a_prepared_model_leads_it_too(tmp_path):
    module = lq.prepare(Classifier(), lq.QATConfig("int8", learnable_step_size=True))
    scales = lq.LearnedScales(lr=1e-3)
    trainer(tmp_path, [scales], max_epochs=1).fit(module, loader())
    assert isinstance(scales._schedule, Schedule)
    assert module.head.input_quantizer.calibrated


def test_no_callback_replaces_what_leading_needs():
    """A private method of the same name, meant for something else, would silently take the base's place."""
    for found in pkgutil.iter_modules(lightning_qat.callbacks.__path__):
        importlib.import_module(f"lightning_qat.callbacks.{found.name}")
    waiting, checked = list(QuantizationCallback.__subclasses__()), 0
    while waiting:
        child = waiting.pop()
        waiting += child.__subclasses__()
        checked += 1
        own = {name for name in vars(child) if name.startswith("_") and not name.startswith("__")} - {"_abc_impl"}
        assert not own & set(vars(QuantizationCallback)), child
    assert checked > 5
