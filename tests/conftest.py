"""What all tests share."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_qat.schemes import get_scheme


@pytest.fixture(autouse=True)
def _one_thread():
    # Thousands of tiny ops: on a busy machine waiting for a second thread took 6 times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _compiled_anew():
    # Dynamo counts how often a function is compiled: the ninth model in one process would be one too many.
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch):
    """Shapes of the weights that were fake-quantized."""
    scheme = get_scheme("int8")
    shapes = []

    def counting(function):
        def counted(x, *args, **kwargs):
            if isinstance(x, nn.Parameter):
                shapes.append(tuple(x.shape))
            return function(x, *args, **kwargs)

        return counted

    for name in ("fake_quantize", "fake_quantize_through", "fake_quantize_by_extremes"):
        monkeypatch.setattr(scheme, name, counting(getattr(scheme, name)))
    return shapes
