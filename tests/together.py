"""The callback beside another one on a small classifier."""

import pytest
import torch
from classifier import Classifier, loader, trainer

import lightning_qat as lq

SAME = {"rtol": 1e-4, "atol": 1e-5}


def qat(plan="int8", **kwargs):
    return lq.QuantizationAwareTraining(plan, **{"calibration_batches": 2, **kwargs})


def fit(tmp_path, callbacks, module=None, **kwargs):
    module = Classifier() if module is None else module
    torch.manual_seed(1)
    run = trainer(tmp_path, callbacks, **kwargs)
    run.fit(module, loader(), loader(8, seed=1))
    return module, run


def assert_ships(module, callback=None):
    if callback is not None:
        assert callback.certificate.passed
    converted = lq.convert(module)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(converted(x), module(x), **SAME)
    return converted


def tensors(state):
    return {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}


def equal(first, second):
    first, second = tensors(first), tensors(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


in_any_order = pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])


def ordered(ours_first, ours, *others):
    return [ours, *others] if ours_first else [*others, ours]
