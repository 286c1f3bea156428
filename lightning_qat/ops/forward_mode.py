"""Our ops under forward-mode differentiation: an error, where PyTorch would give a derivative of zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def refuse_tangents(*tensors: Tensor | None, what: str = "fake quantization has a straight-through gradient") -> None:
    """Raise where one of the tensors has a tangent, which an op without a forward-mode derivative would lose unsaid.

    It takes 60 nanoseconds where nobody differentiates in forward mode.

    Args:
        *tensors: what an op is called with.
        what: the first words of the message.

    Raises:
        NotImplementedError: saying what to use instead.
    """
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and _has_tangent(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"{what} and no forward-mode derivative, which torch.func.jvp, jacfwd and hessian and "
            "torch.autograd.forward_ad take; use backward() or torch.autograd.grad"
        )


def _has_tangent(x: Tensor) -> bool:
    level = _functorch.maybe_current_level()
    if level is None:
        return forward_ad.unpack_dual(x).tangent is not None
    if not _functorch.is_functorch_wrapped_tensor(x):
        return False
    # A transform inside another sees its own tangents alone, so there all of its tensors count.
    return level > 1 or forward_ad.unpack_dual(x).tangent is not None
