"""Activation ranges from batches of data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_qat import calibrate, prepare
from lightning_qat.transforms.calibrate import calibrating
from lightning_qat.transforms.ranges import deferred_ranges, update_ranges


@pytest.mark.parametrize("deferred", [False, True])
def test_batches_of_a_calibration_count_alike(deferred: bool) -> None:
    """By the moving average's momentum alone, 0.99, the range would be 97 % that of the first batch."""
    model = prepare(nn.Sequential(nn.Linear(4, 4)), "int8")
    batches = [torch.full((2, 4), -float(size)) for size in (1, 3, 8, 4)]
    if deferred:
        with deferred_ranges(model), calibrating(model):
            for batch in batches:
                model(batch)
                update_ranges(model, across_ranks=False)
    else:
        calibrate(model, batches)
    observer = model[0].input_quantizer.observer
    torch.testing.assert_close(observer.min_val, torch.tensor(-4.0))
    assert observer.averaged is None
    model.train()(torch.full((2, 4), -104.0))  # training goes on with the momentum
    torch.testing.assert_close(observer.min_val, torch.tensor(-5.0))
