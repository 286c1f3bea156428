"""Weights that code multiplies without calling their layer, as ``F.linear(x, self.qkv.weight)`` does.

A prepared layer fake-quantizes its weight where it is called; whoever reads ``layer.weight`` gets the float weight, and
in a converted model what the codes stand for. The attention pool of CLIP, BEiT, EVA and Swin v2 of timm and LayoutLMv3
read so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from lightning_qat.nn import QATLayer, QATMultiheadAttention
from lightning_qat.nn.recurrent import RecurrentLayer
from lightning_qat.transforms.prepare import qat_layers

#: What makes outputs of weights and of something else. Results of anything else are followed up to one of these.
_MULTIPLYING = {
    *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv"),
    *("einsum", "tensordot", "scaled_dot_product_attention"),
    *("embedding", "__getitem__", "index_select", "gather"),  # by positions that are computed: a look-up
}


class _WeightReads(TorchFunctionMode):
    """Follows the weights of prepared layers, outside of these, to where they multiply what is none."""

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._layers = layers
        self._followed: dict[int, tuple[Tensor, str]] = {}  # the tensors are held: an id stays theirs
        self._inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._inside:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = [self._name_of(tensor) for tensor in tensors]
        read = next((name for name in names if name is not None), None)
        if read is None:
            return result
        multiplies = func is F.multi_head_attention_forward or getattr(func, "__name__", "") in _MULTIPLYING
        if multiplies and None in names:
            for name in filter(None, names):
                self.found.setdefault(name, (resolve_name(func) or func.__name__).rpartition(".")[2])
        else:
            self._followed |= {id(leaf): (leaf, read) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result

    def _name_of(self, tensor: Tensor) -> str | None:
        return self._layers.get(id(tensor)) or self._followed.get(id(tensor), (None, None))[1]

    def starts(self, *_: Any) -> None:
        self._inside += 1

    def done(self, *_: Any) -> None:
        self._inside -= 1


@contextlib.contextmanager
def watch_weight_reads(model: nn.Module) -> Iterator[dict[str, str]]:
    """Yield a dict that fills, in the forward run inside, with the layers whose weight is multiplied without them.

    Name of the layer -> name of the function. A weight that a float layer holds too stays as it is, and is left out.
    """
    prepared = dict(qat_layers(model))
    kept = {id(p) for m in model.modules() if not isinstance(m, QATLayer) for p in m._parameters.values()}
    weights = {id(p): name for name, layer in prepared.items() for p in layer.weight_parameters() if id(p) not in kept}
    watch = _WeightReads(weights)
    handles = []
    for module in model.modules():
        if isinstance(module, (QATLayer, QATMultiheadAttention, RecurrentLayer)):
            handles.append(module.register_forward_pre_hook(watch.starts, prepend=True))
            handles.append(module.register_forward_hook(watch.done, always_call=True))
    try:
        with watch:
            yield watch.found
    finally:
        for handle in handles:
            handle.remove()
