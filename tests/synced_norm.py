"""SyncBatchNorm across ranks on CPUs: PyTorch's own ``forward``, which has sums on GPUs only, with others."""

import contextlib
from unittest import mock

import torch
from torch import nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

_TRUE_FORWARD = nn.SyncBatchNorm.forward


class _SumOverRanks(Function):
    """Every rank's output depends on every rank's input: gradients are summed too."""

    @staticmethod
    def forward(ctx, x):
        return _summed(x)

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad)


def _summed(x):
    x = x.contiguous().clone()
    torch.distributed.all_reduce(x)
    return x


class SumsByGloo:
    """What ``torch.nn.modules._functions.SyncBatchNorm`` computes, summed in float64; ranks may have other counts."""

    calls = 0

    @classmethod
    def apply(cls, x, weight, bias, running_mean, running_var, eps, momentum, process_group, world_size):
        cls.calls += 1
        wide, dims = x.double(), [0, *range(2, x.dim())]
        count = torch.full((1,), float(x.numel() // x.shape[1]), dtype=torch.float64)
        sums = _SumOverRanks.apply(torch.cat([wide.sum(dims), wide.square().sum(dims), count]))
        total, squares, count = sums.split([x.shape[1], x.shape[1], 1])
        mean = total / count
        var = squares / count - mean.square()
        with torch.no_grad():
            running_mean += momentum * (mean - running_mean)
            running_var += momentum * (var * count / (count - 1) - running_var)
        shape = [1, -1] + [1] * (x.dim() - 2)
        factor = weight / (var + eps).sqrt()
        return ((wide - mean.view(shape)) * factor.view(shape) + bias.view(shape)).to(x.dtype)


def _forward_on_cpu(self, input):
    # The name of a device that may be another maker's: by this one a tensor on the CPU is let through.
    with mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"):
        return _TRUE_FORWARD(self, input)


@contextlib.contextmanager
def synced_on_cpu():
    """Let every ``nn.SyncBatchNorm`` in training compute over all gloo ranks inside, as on GPUs."""
    refuses_cpu = "_passing_sync_batchnorm_handle"
    with (
        mock.patch.object(DistributedDataParallel, refuses_cpu),
        mock.patch.object(nn.SyncBatchNorm, "forward", _forward_on_cpu),
        mock.patch.object(nn.modules.batchnorm, "sync_batch_norm", SumsByGloo),
    ):
        yield
