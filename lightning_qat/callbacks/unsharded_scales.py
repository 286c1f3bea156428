"""Learned scales of a module that ``fully_shard`` has sharded before the scales were there."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_qat.quantizers.sharded import is_sharded
from lightning_qat.transforms.param_groups import learned_scales


@torch.no_grad()
def average_unsharded(module: nn.Module, optimizer: Optimizer, *, leads: bool) -> None:
    """Average the gradients of scales over the ranks that shard ``module``, where FSDP2 does not.

    A ``configure_model`` that calls ``fully_shard`` comes before the module is prepared: FSDP2 averages gradients of
    the parameters that it saw, and scales would learn of one rank's data alone and part. Every rank has to call this.

    Args:
        module: has gradients.
        optimizer: whose parameters are meant; those of others may wait for more gradients.
        leads: False does nothing: one callback of several is to do it.
    """
    if not (leads and dist.is_available() and dist.is_initialized()):
        return
    mesh = next((p.device_mesh for p in module.parameters() if is_sharded(p)), None)  # type: ignore[attr-defined]
    if mesh is None:  # DDP and others average what they find
        return
    stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
    scales = [p for scale in learned_scales(module) for p in scale.parameters()]
    scales = [p for p in scales if id(p) in stepping and not is_sharded(p)]
    if not scales:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in scales]
    known = gradients[0].new_tensor([p.grad is not None for p in scales], dtype=torch.float32)
    flat = torch.cat([known, *(g.reshape(-1).float() for g in gradients)])
    for dim in range(mesh.ndim):
        dist.all_reduce(flat, group=mesh.get_group(dim))
    known, *averages = flat.split([len(scales), *(p.numel() for p in scales)])
    all_here = all(p.grad is not None for p in scales)  # mostly; then nothing waits for the device
    seen_by_a_rank = [1.0] * len(scales) if all_here else known.tolist()
    for parameter, seen, average in zip(scales, seen_by_a_rank, averages, strict=True):
        if seen:  # a gradient of 0 would let momentum go on
            parameter.grad = (average / mesh.size()).reshape(parameter.shape).to(parameter.dtype)
