"""Converted convolutions with and without codes between them."""

import pytest
import torch

import lightning_qat as lq
from lightning_qat.nn import conv as conv_module


def converted(model, x, plan="int8"):
    lq.calibrate(lq.prepare(model, plan), [x])
    return lq.convert(model)


def module_by_module(model, x):
    """The same model without regions."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(conv_module, "inside_region", lambda: False)
        return model(x)
