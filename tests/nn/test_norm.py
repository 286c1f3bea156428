"""fold_bn_into_conv against the evaluated pair, in float."""

import pytest
import torch
from torch import nn

from lightning_qat import fold_bn_into_conv


def trained_norm(norm):
    torch.manual_seed(1)
    channels = norm.num_features
    norm.running_mean.copy_(torch.randn(channels))
    norm.running_var.copy_(torch.rand(channels) + 0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels))
        norm.bias.copy_(torch.randn(channels))
        norm.weight[0] = 0.0
    return norm.eval()


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), (2, 3, 8, 8)),
        (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 8, 8)),
        (nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), (2, 3, 8)),
        (nn.ConvTranspose2d(3, 5, 3), nn.BatchNorm2d(5), (2, 3, 8, 8)),
        (nn.Linear(6, 5), nn.BatchNorm1d(5), (4, 6)),
    ],
)
def test_folding_computes_the_same(layer, norm, shape):
    trained_norm(norm)
    before = layer.weight.detach().clone()
    folded = fold_bn_into_conv(layer, norm)
    x = torch.randn(shape)
    torch.testing.assert_close(folded(x), norm(layer(x)), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, before)
    assert torch.isfinite(folded.weight).all()


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="5 output channels but the BatchNorm has 6"):
        fold_bn_into_conv(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match="no running statistics"):
        fold_bn_into_conv(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False))
    with pytest.raises(ValueError, match="groups=2"):
        fold_bn_into_conv(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))
