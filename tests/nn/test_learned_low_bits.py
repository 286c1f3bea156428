"""What learned scales are for: few bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.transforms.param_groups import quantization_param_groups


def test_learned_scales_beat_those_of_the_extremes_at_few_bits():
    """W2A4 on scikit-learn's digits from one float model: a mean over three seeds."""
    digits = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x, y = torch.from_numpy(digits[0]).float() / 16, torch.from_numpy(digits[1]).long()
    held = torch.arange(len(x)) % 4 == 0

    def train(model, seed, groups):
        generator = torch.Generator().manual_seed(seed)
        index = (~held).nonzero().squeeze()
        optimizer = torch.optim.Adam(groups)
        for _ in range(200):
            batch = index[torch.randint(len(index), (64,), generator=generator)]
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()

    accuracy = {False: [], True: []}
    for seed in range(3):
        for learn in accuracy:
            torch.manual_seed(seed)
            layers = [nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)]
            model = nn.Sequential(*layers)
            train(model, seed, quantization_param_groups(model, 3e-3, 1.0))
            config = lq.QATConfig("int8", bits=2, activation_bits=4, learnable_step_size=learn)
            lq.calibrate(lq.prepare(model, config), [x[~held][:256]])
            train(model, seed, quantization_param_groups(model, 1e-3, 1e-2))
            model.eval()
            accuracy[learn].append((model(x[held]).argmax(1) == y[held]).float().mean().item())
    fixed, learned = (sum(values) / 3 for values in accuracy.values())
    assert learned > fixed + 0.01, accuracy
